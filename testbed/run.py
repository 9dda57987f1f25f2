"""A run: set up every rank, run the scenarios, fail everywhere where one rank fails.

Also a run that goes on: after a stop or a crash, from its file; after the loss of ranks, from where
it is. Both begin the scenario that is not done at the round that the root says.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from testbed.begun import (
    MOVABLE,
    Begun,
    check_roots,
    check_same,
    find_begun,
    find_same,
    new_run,
)
from testbed.checkpoint import Checkpoints
from testbed.errors import UserError
from testbed.experiment import load_experiment, parse_experiment
from testbed.failure import Position, agree, guarded
from testbed.headers import scenario_header
from testbed.importing import import_torch
from testbed.naming import check_new_name, check_replaceable
from testbed.plan import ScenarioPlan, Task, make_plan
from testbed.results.provenance import provenance
from testbed.results.records import Rank, ScenarioHeader
from testbed.results.writer import ResultsWriter, check_output
from testbed.root import Beginning, Root, RunStopped
from testbed.signals import StopSignal
from testbed.transport.base import ClientState, Lost, RanksLost, Transport, Worker
from testbed.update import Message

if TYPE_CHECKING:  # these import torch
    from testbed.pretraining import Pretraining
    from testbed.startup import ScenarioSetup, Setups


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run.

    Attributes
    ----------
    experiment, overrides, profile
        The experiment file, ``key=value`` overrides of it, and which of its profiles to take. None
        takes the experiment from the results file of an earlier start.
    output
        The results file.
    overwrite
        Whether it may be replaced.
    progress
        ``auto``, ``live``, ``log`` or ``none``; see `testbed.progress`.
    share
        (i, n): which of n shares of the scenarios to run; see `testbed.plan.make_plan`.
    resume
        Whether to go on with what an earlier start has left under this name.
    on_rank_loss
        Whether the run ends or goes on when another rank than the root is lost.
    deadline
        See `Transport`.
    """

    experiment: Path | None
    overrides: Sequence[str]
    output: Path
    overwrite: bool
    progress: str
    profile: str | None = None
    share: tuple[int, int] = (0, 1)
    resume: bool = False
    on_rank_loss: Literal["end", "continue"] = "end"
    deadline: float | None = None


@dataclass(frozen=True)
class _Job:
    """What is to be run, as the root tells it to the other ranks."""

    experiment: str
    begun: Begun
    resuming: bool


def run(transport: Transport, options: RunOptions, stop: StopSignal | None = None) -> int:
    """Run an experiment on this rank, and return its exit status; every rank calls this.

    An error of the user's is reported once, by the root, and ends all ranks with status 2 before
    any of them computes. Any other exception ends all ranks with status 1; see `guarded`.

    Parameters
    ----------
    transport
        Connects the ranks.
    options
        The same on every rank.
    stop
        Notes signals that ask for the end of the run.
    """
    position = Position()
    stop = stop or StopSignal()
    stop.heeded = transport.is_root
    transport.deadline = options.deadline

    def body() -> None:
        if options.on_rank_loss == "continue" and transport.cannot_recover():
            agree(transport, lambda: _refuse(transport.cannot_recover()))
        job = transport.broadcast(agree(transport, lambda: _read(transport, options)))
        assert job is not None
        if job.begun.complete:
            return
        _Run(transport, options, job, position, stop).execute()

    try:
        return guarded(transport, position, body)
    finally:
        stop.heeded = False  # nothing is left that a signal could interrupt


def _refuse(reason: str) -> None:
    raise UserError(f"--on-rank-loss continue: {reason}")


def _read(transport: Transport, options: RunOptions) -> _Job | None:
    job = _job(options) if transport.is_root else None
    if job is not None and job.begun.complete:
        return job
    try:
        import_torch()  # takes seconds, on all ranks at once
    except ImportError as error:
        raise UserError(
            f"PyTorch cannot be imported ({error}), and rounds need it: pip install '.[run]'"
        ) from None
    return job


def _job(options: RunOptions) -> _Job:
    """Return what is to be run; on the root."""
    if options.experiment is not None:
        check_new_name(options.output, options.experiment)
    begun = None
    if options.experiment is not None:
        resolved = load_experiment(options.experiment, options.overrides, options.profile)
        if options.resume:
            begun = find_same(options.output, resolved, options.share)
    else:
        begun = find_begun(options.output)
        if begun is None:
            raise UserError(
                f"{options.output}: no such file, nor {options.output.name}.partial: there is "
                "nothing to resume"
            )
        resolved = parse_experiment(begun.experiment, options.overrides, str(options.output))
        check_same(options.output, begun.experiment, resolved)
    if begun is not None:
        if begun.complete:
            print(f"{options.output}: the run is complete", file=sys.stderr)
            # It may have been killed before it did so itself.
            Checkpoints(options.output, begun.run, seconds=0).remove()
            return _Job("", begun, resuming=False)
        resolved.require_data()
        if options.experiment is None:
            check_roots(resolved, options.overrides)
        return _Job(resolved.to_yaml(), begun, resuming=True)
    check_output(options.output, overwrite=options.overwrite)
    if options.overwrite:
        check_replaceable(options.output)
    resolved.require_data()
    if options.share[0] >= len(resolved.points):
        raise UserError(
            f"--share {options.share[0]}/{options.share[1]}: the experiment has only "
            f"{len(resolved.points)} scenarios: there is none in this share"
        )
    return _Job(resolved.to_yaml(), new_run(resolved, options.share), resuming=False)


def _advice(options: RunOptions, transport: Transport) -> str:
    """Return how a run that was stopped goes on."""
    # What else was overridden stands in the results file.
    movable = [word for word in options.overrides if word.partition("=")[0] in MOVABLE]
    words = ["resume", str(options.output), *movable]
    if options.on_rank_loss != "end":
        words += ["--on-rank-loss", options.on_rank_loss]
    if options.deadline is not None:
        words += ["--deadline", repr(options.deadline)]
    with_ = "with"
    if options.experiment is not None:
        resume = " and --resume" + (" in place of --overwrite" if options.overwrite else "")
        with_ += " the same command" + ("" if options.resume else resume) + ", or"
    under = ", under mpirun or srun as before," if transport.started > 1 else ""
    return f"go on{under} {with_}: python -m testbed {shlex.join(words)}"


class _Run:
    """One run, once its experiment is known to be valid."""

    def __init__(
        self,
        transport: Transport,
        options: RunOptions,
        job: _Job,
        position: Position,
        stop: StopSignal,
    ) -> None:
        self._transport = transport
        self._options = options
        self._job = job
        self._position = position
        self._stop = stop
        self._resolved = parse_experiment(job.experiment)
        self._plans = make_plan(self._resolved, job.begun.share)
        self._root: Root | None = None
        self._setups: Setups | None = None
        self._pretraining: Pretraining | None = None
        # Losses before there is a file to tell them in.
        self._early: list[tuple[Sequence[Lost], float]] = []

    def execute(self) -> None:
        """Set up, run all scenarios, and give the file its name."""
        try:
            while not self._attempt():
                pass
        except RunStopped:
            assert self._root is not None
            self._stop.heeded = False  # the run ends: in this way, and not by an interruption too
            self._root.close()
            self._transport.stop(self._root.stopped(_advice(self._options, self._transport)))
        finally:
            if self._root is not None:
                self._root.close()

    def _attempt(self) -> bool:
        """Run what is left; return whether it is done, or ranks were lost and it goes on."""
        try:
            if not all(self._transport.gather(self._setups is not None)):
                self._set_up()
            self._run_scenarios()
            if self._root is not None:
                self._root.complete()
            self._transport.finish()
        except RanksLost as lost:
            self._recover(lost)
            return False
        return True

    def _recover(self, lost: RanksLost) -> None:
        if self._options.on_rank_loss == "end":
            raise lost
        since = time.monotonic()
        self._transport, gone = self._transport.recover(lost)
        if self._pretraining is not None:
            self._pretraining.transport = self._transport
        if self._root is not None:
            self._root.lost(gone, since, self._transport.size)
        elif self._transport.is_root:
            self._early.append((gone, since))

    def _set_up(self) -> None:
        import torch

        from testbed.pretraining import Pretraining
        from testbed.startup import Setups
        from testbed.transport.placement import place

        self._setups = None
        transport, compute = self._transport, self._resolved.experiment.compute
        placement = agree(
            transport,
            lambda: place(
                compute.device,
                host=transport.host,
                local_rank=transport.local_rank,
                threads=compute.threads,
            ),
        )
        if placement.device != "cpu":
            transport.allocate = _pinned
        setups = Setups(transport, torch.device(placement.device))
        headers = agree(transport, lambda: self._prepare(setups))
        role = "client"
        if transport.is_root:
            role = "server" if transport.size > 1 else "server+client"
        here = Rank(
            transport.rank,
            transport.host,
            placement.description,
            role,
            transport.local_rank,
            placement.cores,
            placement.gpu,
        )
        ranks = transport.gather(here)
        models = None
        if transport.is_root:
            if self._root is None:
                self._root = self._open(headers, ranks)
                self._root.tell_placement(ranks, compute.threads)
            models = self._root.saved_models()
        self._pretraining = Pretraining(transport, setups, self._plans, models)
        self._setups = setups

    def _prepare(self, setups: "Setups") -> list[ScenarioHeader]:
        """Load the data, and try out the models: all of them on the root, the first elsewhere."""
        setups.load_data(self._plans)
        if self._transport.is_root:
            begun = parse_experiment(self._job.begun.experiment).points
            return [
                scenario_header(plan, setups, begun[plan.index].scenario) for plan in self._plans
            ]
        setups.make(self._plans[0])
        return []

    def _open(self, headers: Sequence[ScenarioHeader], ranks: Sequence[Rank]) -> Root:
        """Begin the results file, or go on with it."""
        experiment, begun, output = self._resolved.experiment, self._job.begun, self._options.output
        attributes = {
            **provenance(experiment.title, begun.experiment, self._transport.library),
            "share": "{}/{}".format(*begun.share),
            "run": begun.run,
        }
        arguments: dict[str, Any] = {
            "attributes": attributes,
            "ranks": ranks,
            "scenarios": headers,
            "commit_seconds": experiment.results.commit_seconds,
            "mode": experiment.results.mode,
        }
        if self._job.resuming:
            writer = ResultsWriter.resume(output, **arguments)
        else:
            if self._options.resume and output.exists():
                raise UserError(
                    f"{output}: another run has made this file meanwhile: the same line again says "
                    "whether it is of this one"
                )
            writer = ResultsWriter(output, overwrite=self._options.overwrite, **arguments)
        checkpoints = Checkpoints(output, begun.run, experiment.results.checkpoint_seconds)
        if not self._job.resuming:
            checkpoints.remove()  # of a run that this one replaces
        return Root(
            writer,
            checkpoints,
            experiment,
            self._plans,
            self._position,
            self._stop,
            self._options.progress,
        )

    def _run_scenarios(self) -> None:
        root = self._root
        if root is None:
            self._work(None)
            return
        for gone, since in self._early:
            root.lost(gone, since, self._transport.size)
        self._early.clear()
        with root.progress:
            self._work(root)

    def _work(self, root: Root | None) -> None:
        transport = self._transport
        assert self._pretraining is not None
        begin = transport.broadcast(Beginning(0) if root is None else root.beginning())
        for plan in self._plans[begin.position :]:
            self._position.scenario, self._position.round = plan.index, None
            setup = self._make(plan, root)
            worker = None
            if root is None or transport.size == 1:
                worker = self._worker(plan, setup, copy=root is not None)
            if begin.states:
                states = {} if root is None else root.states(plan, transport.workers)
                found = transport.distribute(states)
                if worker is not None:
                    worker.states.update(found)
            if root is None:
                assert worker is not None
                self._serve(plan, setup, worker, begin.round)
            else:
                root.run(transport, plan, setup, self._pretraining, worker, begin.round)
            begin = Beginning(begin.position + 1)

    def _make(self, plan: ScenarioPlan, root: Root | None) -> "ScenarioSetup":
        """Train the scenario's models, if it has any to be trained, and make its set-up."""
        assert self._pretraining is not None
        assert self._setups is not None
        if root is None:
            self._pretraining.prepare(plan)
        else:
            if plan.pretraining_steps is not None:
                root.commit()  # what is done should not wait for a long training
            with root.progress.apart():
                self._pretraining.prepare(plan, root.progress.announce, root.saving)
        return self._setups.make(plan)

    def _worker(self, plan: ScenarioPlan, setup: "ScenarioSetup", *, copy: bool) -> Worker:
        from testbed.client import ClientWorker

        if copy:
            # On a module of its own: the attacks must not touch a client's.
            assert self._setups is not None
            setup = self._setups.make(plan, copy=True)
        return _Reporting(ClientWorker(plan, setup, self._transport.number), self._position)

    def _serve(
        self, plan: ScenarioPlan, setup: "ScenarioSetup", worker: Worker, start: int
    ) -> None:
        from testbed.summing import message_capacity

        capacity = message_capacity(plan, setup)
        self._transport.serve(plan, setup.layout, worker, capacity=capacity, start=start)


class _Reporting:
    """A worker that notes what it is working on, for the report of a failure."""

    def __init__(self, worker: Worker, position: Position) -> None:
        self._worker = worker
        self._position = position

    @property
    def states(self) -> dict[int, ClientState]:
        """See `Worker`."""
        return self._worker.states

    def load(self, model: NDArray[np.float32]) -> None:
        """See `Worker`."""
        self._worker.load(model)

    def work(self, task: Task, message: Message) -> None:
        """See `Worker`."""
        position = self._position
        position.scenario, position.round, position.client = task.scenario, task.round, task.client
        self._worker.work(task, message)
        position.client = None

    def take_sum(self) -> NDArray[Any]:
        """See `Worker`."""
        return self._worker.take_sum()


def _pinned(size: int) -> NDArray[np.uint8]:
    """Allocate page-locked host memory, from which a GPU copies without staging."""
    import torch

    buffer: NDArray[np.uint8] = torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer
