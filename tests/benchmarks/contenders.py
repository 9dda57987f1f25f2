"""The programs that the round benchmark compares; `measure.run_contender` starts them.

All do the same work: 8 clients per round, each with the gradient of the mean cross entropy over a
batch of 8 images, at the round's global model; the mean of these gradients, and one step. All use
one thread per process and the same model.

``loop``
    One process, plain torch: nothing is flattened, copied or sent. What the arithmetic costs.
``minimal``
    The least that mpi4py needs: a root and workers, preallocated flat float32 buffers, upper-case
    Bcast, and Send and Recv in client order. No header, check, truth, record or failure handling.
``patient``
    The same, but where a rank waits, it tests and naps instead of spinning in the MPI library. It
    tells what a spinning wait adds to the CPU time, and takes from ranks that share the core.
``testbed``
    ``testbed run``, its writer of results included.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import Marks
from torch import nn

CLIENTS, BATCH, RATE = 8, 8, 0.1
SHAPE, CLASSES = (1, 28, 28), 10
MODELS = {"cnn": "cnn", "mlp": "models:MLP"}


class Client:
    """Computes gradients of a module on batches of MNIST."""

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        from testbed.data import load
        from testbed.models.build import build

        torch.set_num_threads(1)
        self.device = torch.device(task["device"])
        dataset = load("mnist", Path(task["data"]))
        self._images = torch.from_numpy(dataset.images).to(self.device)
        self._labels = torch.from_numpy(dataset.labels).to(self.device)
        self._rng = np.random.default_rng(seed)
        self.module: nn.Module = build(
            MODELS[task["model"]],
            shape=SHAPE,
            classes=CLASSES,
            activation=None,
            arguments={},
            init="torch",
            seed=0,
        ).to(self.device)
        self.parameters = list(self.module.parameters())

    def gradient(self) -> tuple[torch.Tensor, ...]:
        """Return the gradient of every parameter on a new batch."""
        drawn = torch.from_numpy(self._rng.integers(len(self._labels), size=BATCH)).to(self.device)
        images = self._images[drawn].to(torch.float32) / 255
        loss = nn.functional.cross_entropy(self.module(images), self._labels[drawn])
        return torch.autograd.grad(loss, self.parameters)


def loop(task: dict[str, Any], marks: Marks) -> None:
    """Run the rounds in one process."""
    client = Client(task, 0)
    parameters = [parameter.data for parameter in client.parameters]
    aggregate = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(_total(task)):
        torch._foreach_zero_(aggregate)
        for _ in range(CLIENTS):
            torch._foreach_add_(aggregate, client.gradient())
        torch._foreach_add_(parameters, aggregate, alpha=-RATE / CLIENTS)
        marks.round_done()
    marks.write({})


def minimal(task: dict[str, Any], marks: Marks) -> None:
    """Run the rounds over MPI, the root as the server."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    workers = comm.size - 1
    client = Client(task, comm.rank)
    parameters = [parameter.data for parameter in client.parameters]
    sizes = [parameter.numel() for parameter in parameters]
    model, update = np.empty((2, sum(sizes)), np.float32)
    patient = task["contender"] == "patient"

    def wait(request: MPI.Request) -> None:
        while not request.Test():
            time.sleep(5e-5)

    if comm.rank:
        model_parts, update_parts = (
            [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
            for flat in (torch.from_numpy(model), torch.from_numpy(update))
        )
        mine = len(range(comm.rank - 1, CLIENTS, workers))
        for _ in range(_total(task)):
            wait(comm.Ibcast(model)) if patient else comm.Bcast(model)
            torch._foreach_copy_(parameters, model_parts)
            for _ in range(mine):
                torch._foreach_copy_(update_parts, client.gradient())
                wait(comm.Isend(update, 0)) if patient else comm.Send(update, 0)
        return

    whole, received = torch.from_numpy(model), torch.from_numpy(update)
    torch.cat([parameter.cpu().flatten() for parameter in parameters], out=whole)
    aggregate = torch.zeros_like(whole)
    for _ in range(_total(task)):
        wait(comm.Ibcast(model)) if patient else comm.Bcast(model)
        aggregate.zero_()
        for number in range(CLIENTS):
            source = 1 + number % workers
            wait(comm.Irecv(update, source)) if patient else comm.Recv(update, source)
            aggregate.add_(received)
        whole.sub_(aggregate, alpha=RATE / CLIENTS)
        marks.round_done()
    marks.write({})


def testbed(task: dict[str, Any], marks: Marks) -> None:
    """Run the rounds in the testbed.

    A round is over when the writer has taken it. This is noted in a writer derived from the
    testbed's, so that all contenders go by the same clock, with nothing of a round left out: the
    phases in the results file are what the testbed itself thinks to time.
    """
    import h5py

    import testbed.run as runs
    from testbed.__main__ import main as testbed_main
    from testbed.results.writer import ResultsWriter, Rows

    class Noting(ResultsWriter):
        def append(self, scenario: int, round_: int, rows: Rows) -> None:
            super().append(scenario, round_, rows)
            marks.round_done()

        def complete(self) -> None:
            super().complete()
            with h5py.File(self.path) as file:
                timings = file["scenarios/0000/timings"]
                counted = slice(task["warmup"], task["warmup"] + task["rounds"])
                phases = {
                    name: 1000 * float(np.nan_to_num(values[counted]).mean())
                    for name, values in timings.items()
                    if isinstance(values, h5py.Dataset) and name != "client_rank"
                }
            marks.write(phases)

    runs.ResultsWriter = Noting
    folder = Path(task["output"]).parent
    experiment = {
        "data": {"name": "mnist", "root": task["data"]},
        "labels": {"distribution": "natural"},
        "model": {"name": MODELS[task["model"]], "init": "torch"},
        "federation": {
            "rounds": _total(task),
            "clients": CLIENTS,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "attack_every": 1 if task["attacks"] else _total(task),
        },
        "attacks": task["attacks"] or ["random"],
        "compute": {"device": task["device"]},
    }
    path = folder / "experiment.yaml"
    # Every rank writes the same content; only the root, which reads it, may not find half of it.
    own = folder / f"experiment.{time.monotonic_ns()}.yaml"
    own.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    own.replace(path)
    arguments = ["run", str(path), "-o", str(folder / "results.h5"), "--progress", "none"]
    status = testbed_main(arguments)
    if status:
        raise SystemExit(status)


def main(task: dict[str, Any]) -> None:
    """Run a contender.

    Parameters
    ----------
    task
        ``contender``, ``model`` (cnn or mlp), ``data`` (MNIST's folder), ``device``, ``warmup``
        and ``rounds`` (numbers of rounds), ``attacks`` (names; each round is attacked unless the
        list is empty), and ``output`` (the file for the result).
    """
    marks = Marks(task["warmup"], task["rounds"], Path(task["output"]))
    programs = {"loop": loop, "minimal": minimal, "patient": minimal, "testbed": testbed}
    programs[task["contender"]](task, marks)


def _total(task: dict[str, Any]) -> int:
    total: int = task["warmup"] + task["rounds"] + 1
    return total


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
