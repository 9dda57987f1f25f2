"""A run: set up every rank, run the scenarios, fail everywhere where one rank fails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.assumptions import assumptions, broken_assumptions, not_applicable
from testbed.errors import UserError
from testbed.experiment import ResolvedExperiment, load_experiment, parse_experiment
from testbed.failure import Position, agree, guarded
from testbed.plan import ScenarioPlan, Task, make_plan
from testbed.progress import Progress
from testbed.results.provenance import provenance
from testbed.results.schema import scenario_arrays, used_lengths
from testbed.results.writer import (
    AttackHeader,
    RankHeader,
    ResultsWriter,
    ScenarioHeader,
    check_output,
)
from testbed.transport.base import Transport, Worker
from testbed.update import Message

if TYPE_CHECKING:  # these import torch
    from testbed.startup import ScenarioSetup, Setups


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run.

    Attributes
    ----------
    experiment, overrides, profile
        The experiment file, ``key=value`` overrides of it, and which of its profiles to take.
    output
        The results file.
    overwrite
        Whether it may be replaced.
    progress
        ``auto``, ``live``, ``log`` or ``none``; see `testbed.progress`.
    share
        (i, n): which of n shares of the scenarios to run; see `testbed.plan.make_plan`.
    """

    experiment: Path
    overrides: Sequence[str]
    output: Path
    overwrite: bool
    progress: str
    profile: str | None = None
    share: tuple[int, int] = (0, 1)


def run(transport: Transport, options: RunOptions) -> int:
    """Run an experiment on this rank, and return its exit status; every rank calls this.

    An error of the user's is reported once, by the root, and ends all ranks with status 2 before
    any of them computes. Any other exception ends all ranks with status 1; see `guarded`.
    """
    position = Position()

    def body() -> None:
        text = agree(transport, lambda: _read(transport, options))
        resolved = parse_experiment(transport.broadcast(text))
        _Run(transport, options, resolved, position).execute()

    return guarded(transport, position, body)


def _read(transport: Transport, options: RunOptions) -> str:
    text = ""
    if transport.is_root:
        check_output(options.output, overwrite=options.overwrite)
        resolved = load_experiment(options.experiment, options.overrides, options.profile)
        resolved.require_data()
        if options.share[0] >= len(resolved.points):
            raise UserError(
                f"--share {options.share[0]}/{options.share[1]}: the experiment has only "
                f"{len(resolved.points)} scenarios: there is none in this share"
            )
        text = resolved.to_yaml()
    try:
        import torch  # noqa: F401 - takes seconds, on all ranks at once
    except ImportError as error:
        raise UserError(
            f"PyTorch cannot be imported ({error}), and rounds need it: pip install '.[run]'"
        ) from None
    return text


class _Run:
    """One run, once its experiment is known to be valid."""

    def __init__(
        self,
        transport: Transport,
        options: RunOptions,
        resolved: ResolvedExperiment,
        position: Position,
    ) -> None:
        self._transport = transport
        self._options = options
        self._resolved = resolved
        self._position = position
        self._plans = make_plan(resolved, options.share)

    def execute(self) -> None:
        """Set up, run all scenarios, and give the file its name."""
        import torch

        from testbed.pretraining import Pretraining
        from testbed.startup import Setups
        from testbed.summing import message_capacity
        from testbed.transport.placement import place

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
        here = RankHeader(transport.host, placement.description, role, transport.local_rank)
        ranks = transport.gather(here)
        if transport.is_root:
            self._serve(setups, headers, ranks)
        else:
            pretraining = Pretraining(transport, setups, self._plans)
            for plan in self._plans:
                self._position.scenario, self._position.round = plan.index, None
                pretraining.prepare(plan)
                setup = setups.make(plan)
                worker = self._worker(plan, setup)
                transport.serve(plan, setup.layout, worker, capacity=message_capacity(plan, setup))
        transport.finish()

    def _prepare(self, setups: "Setups") -> list[ScenarioHeader]:
        """Load the data, and try out the models: all of them on the root, the first elsewhere."""
        setups.load_data(self._plans)
        if self._transport.is_root:
            return [_header(plan, setups) for plan in self._plans]
        setups.make(self._plans[0])
        return []

    def _worker(self, plan: ScenarioPlan, setup: "ScenarioSetup") -> Worker:
        from testbed.client import ClientWorker

        return _Reporting(ClientWorker(plan, setup, self._transport.rank), self._position)

    def _serve(
        self, setups: "Setups", headers: Sequence[ScenarioHeader], ranks: Sequence[RankHeader]
    ) -> None:
        from testbed.pretraining import Pretraining
        from testbed.server import ScenarioServer
        from testbed.summing import message_capacity

        transport, experiment = self._transport, self._resolved.experiment
        writer = ResultsWriter(
            self._options.output,
            attributes={
                **provenance(experiment.title, self._resolved.to_yaml(), transport.library),
                "share": "{}/{}".format(*self._options.share),
            },
            ranks=ranks,
            scenarios=headers,
            overwrite=self._options.overwrite,
            commit_seconds=experiment.results.commit_seconds,
        )
        total = sum(plan.rounds for plan in self._plans)
        pretraining = Pretraining(transport, setups, self._plans)
        try:
            with Progress(experiment.title, total, self._options.progress) as progress:
                for plan in self._plans:
                    self._position.scenario, self._position.round = plan.index, None
                    if plan.pretraining_steps is not None:
                        writer.commit()  # what is done should not wait for a long training
                    with progress.apart():
                        pretraining.prepare(plan, progress.announce)
                    setup = setups.make(plan)
                    worker = None
                    if transport.size == 1:
                        # On a module of its own: the attacks must not touch a client's.
                        worker = self._worker(plan, setups.make(plan, copy=True))
                    with transport.open(
                        plan,
                        setup.layout,
                        worker,
                        buffers=experiment.compute.receive_buffers,
                        capacity=message_capacity(plan, setup),
                    ) as downlink:
                        server = ScenarioServer(
                            plan,
                            setup,
                            downlink,
                            transport.workers,
                            writer,
                            partial(pretraining.initial, plan),
                        )
                        for _ in server.rounds(self._position):
                            progress.advance(plan)
            writer.complete()
        finally:
            writer.close()


class _Reporting:
    """A worker that notes what it is working on, for the report of a failure."""

    def __init__(self, worker: Worker, position: Position) -> None:
        self._worker = worker
        self._position = position

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


def _header(plan: ScenarioPlan, setups: "Setups") -> ScenarioHeader:
    from testbed.attacking import attack_entries
    from testbed.budget import scenario_budget
    from testbed.server import scenario_facts
    from testbed.startup import lowest_feature

    setup = setups.make(plan)
    setup.auxiliary()  # an error of the user's is told before any rank computes
    layout = setup.layout
    entries = attack_entries(plan, setup)
    facts = scenario_facts(plan, setup, lowest_feature(plan, setup))
    idle = {label: not_applicable(entry.attack, facts) for label, entry in entries.items()}
    arrays = scenario_arrays(
        bias=layout.bias is not None,
        weight=plan.keeps_weights,
        statistics=plan.keeps_weights and layout.buffers > 0,
        update=plan.keeps_updates,
        member=plan.summed is not None,
        accumulated=any(entry.accumulated for entry in entries.values()),
        varying=plan.varying_steps,
        attacks={
            label: (entry.attack.answers.value, {} if idle[label] else entry.attack.arrays())
            for label, entry in entries.items()
        },
    )
    lengths = used_lengths(
        arrays,
        {
            "round": plan.rounds,
            "client": plan.observed,
            "member": plan.clients,
            "class": layout.classes,
            "feature": layout.features,
            "buffer": layout.buffers,
            "parameter": layout.size,
        },
    )
    return ScenarioHeader(
        number=plan.index,
        draws=plan.draws,
        swept=plan.swept,
        parameters={
            **_flatten(plan.scenario.model_dump(mode="json")),
            "model.init": plan.scenario.model.initialisation,
        },
        model_parameters=layout.parameters,
        model_buffers=layout.buffers,
        last_layer=setup.model.last_layer.name,
        lengths=lengths,
        arrays=arrays,
        attacks={
            label: AttackHeader(
                name=entry.attack.name,
                title=entry.attack.title,
                knowledge=entry.attack.knowledge.value,
                source=entry.attack.source,
                options=entry.attack.options(),
                answers=entry.attack.answers.value,
                observes=sorted(part.value for part in entry.attack.observes),
                assumes=sorted(item.value for item in assumptions(entry.attack)),
                broken=broken_assumptions(entry.attack, facts),
                not_applicable=idle[label],
                target="accumulated" if entry.accumulated else "update",
                adapted=entry.adapted,
                adaptation=entry.adaptation,
            )
            for label, entry in entries.items()
        },
        privacy=scenario_budget(plan, setup),
    )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pinned(size: int) -> NDArray[np.uint8]:
    """Allocate page-locked host memory, from which a GPU copies without staging."""
    import torch

    buffer: NDArray[np.uint8] = torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer
