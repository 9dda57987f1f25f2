"""The root's part of a run: its results file and checkpoints, scenario after scenario."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from testbed.checkpoint import Checkpoints, ModelKey, ScenarioState
from testbed.errors import UserError
from testbed.experiment import Experiment
from testbed.failure import Position
from testbed.plan import ScenarioPlan
from testbed.progress import Progress
from testbed.results.placed import describe_hosts, describe_sharing
from testbed.results.records import Loss, Rank
from testbed.results.writer import ResultsWriter
from testbed.signals import EXIT_STOPPED, StopSignal
from testbed.transport.base import ClientState, Lost, Transport, Worker

if TYPE_CHECKING:  # these import torch
    from testbed.pretraining import Pretraining
    from testbed.server import ScenarioServer
    from testbed.startup import ScenarioSetup


@dataclass(frozen=True)
class Beginning:
    """Where the ranks begin, or go on.

    Attributes
    ----------
    position
        Number of the scenario in this run; the length of the plan where all is done.
    round
        Its first round that is to be computed.
    states
        Whether clients remember something, which is handed out first.
    """

    position: int
    round: int = 0
    states: bool = False


class RunStopped(Exception):  # noqa: N818
    """A signal has asked for the end of the run, and what is done has been saved."""


class Saving:
    """When to save, and whether to stop then; see `testbed.server.Checkpoint`."""

    def __init__(self, checkpoints: Checkpoints, stop: StopSignal) -> None:
        self._checkpoints = checkpoints
        self._stop = stop

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self._stop.requested

    def due(self) -> bool:
        """Return whether to save."""
        return self.stopping or self._checkpoints.due()

    def models_due(self) -> bool:
        """Return whether to save models that were trained before the first round."""
        return self.stopping or self._checkpoints.models_due()

    def write(self, scenario: int, state: ScenarioState) -> None:
        """Save a scenario's state."""
        self._checkpoints.write(scenario, state)

    def write_models(self, models: Mapping[ModelKey, NDArray[np.float32]]) -> None:
        """Save models that were trained before the first round."""
        self._checkpoints.write_models(models)

    def stop_if_asked(self) -> None:
        """Raise `RunStopped` if a signal has come."""
        if self.stopping:
            raise RunStopped


class Root:
    """Keeps the results file of a run, over all its ranks' losses.

    Parameters
    ----------
    writer
        Of the results file.
    checkpoints
        Beside it.
    experiment, plans
        What is run.
    position
        Is kept up to date.
    stop
        Asks for the end of the run.
    mode
        Of `Progress`.
    """

    def __init__(
        self,
        writer: ResultsWriter,
        checkpoints: Checkpoints,
        experiment: Experiment,
        plans: Sequence[ScenarioPlan],
        position: Position,
        stop: StopSignal,
        mode: str,
    ) -> None:
        self._writer = writer
        self._checkpoints = checkpoints
        self._experiment = experiment
        self._plans = plans
        self._position = position
        self._stop = stop
        self.saving = Saving(checkpoints, stop)
        total = sum(plan.rounds for plan in plans)
        done = sum(writer.recorded(plan.position) for plan in plans)
        self.progress = Progress(experiment.title, total, mode, done)
        self._server: ScenarioServer | None = None
        self._at = -1
        self._state: ScenarioState | None = None
        self._losses: list[tuple[Lost, str, float, Position]] = []

    def beginning(self) -> Beginning:
        """Return where the ranks begin, or go on after a loss."""
        self._state = None
        for at, plan in enumerate(self._plans):
            recorded = self._writer.recorded(plan.position)
            if recorded == plan.rounds:
                continue
            if self._server is not None and self._at == at and not plan.keeps_state:
                return Beginning(at, self._server.number)
            self._server = None
            if plan.fresh_model:
                return Beginning(at, recorded)
            self._state = self._saved(plan, recorded)
            if self._state is None:
                return Beginning(at)
            return Beginning(at, self._state.round, bool(self._state.clients))
        return Beginning(len(self._plans))

    def saved_models(self) -> dict[ModelKey, NDArray[np.float32]]:
        """Return the models that an earlier start has trained before the first round."""
        try:
            return self._checkpoints.read_models()
        except UserError as error:
            self.say(f"{error}; training them again")
            return {}

    def _saved(self, plan: ScenarioPlan, recorded: int) -> ScenarioState | None:
        path, state = self._checkpoints.path, None
        why = f"{path}: " + ("of other rounds" if path.exists() else "missing")
        try:
            state = self._checkpoints.read(plan.position)
        except UserError as error:
            why = str(error)
        if state is not None and state.round > recorded:
            # The file system has kept the checkpoint, and lost the end of the file.
            why = f"{path}: of round {state.round}, and only {recorded} rounds are committed"
            state = None
        if state is None and recorded:
            # The run is not lost: every round can be done again.
            self.say(f"{why}; going through scenario {plan.index} from its first round")
        elif state is not None and state.round < recorded:
            self.progress.remark(
                f"going through rounds {state.round} to {recorded - 1} of scenario {plan.index} "
                "again, from the checkpoint"
            )
        return state

    def states(self, plan: ScenarioPlan, workers: int) -> dict[int, dict[int, ClientState]]:
        """Return what clients remember where the ranks begin, by worker and identity."""
        found: dict[int, dict[int, ClientState]] = {}
        if self._state is not None:
            for identity, state in self._state.clients.items():
                found.setdefault(plan.home(identity, workers), {})[identity] = state
        return found

    def run(
        self,
        transport: Transport,
        plan: ScenarioPlan,
        setup: "ScenarioSetup",
        pretraining: "Pretraining",
        worker: Worker | None,
        begin: int,
    ) -> None:
        """Run a scenario from a round on.

        Parameters
        ----------
        transport
            To the other ranks, which serve.
        plan, setup, pretraining
            The scenario, its data and model, and its first model.
        worker
            Computes, where the root is alone.
        begin
            The first round, as `beginning` says.
        """
        from testbed.server import ScenarioServer
        from testbed.summing import message_capacity

        at = self._plans.index(plan)
        if self._server is None or self._at != at:
            server = ScenarioServer(
                plan,
                setup,
                transport.workers,
                self._writer,
                partial(pretraining.initial, plan),
                self.saving,
            )
            if self._state is not None:
                self._restore(server, self._state)
            elif begin:
                server.skip(begin)
            self._server, self._at, self._state = server, at, None
        with transport.open(
            plan,
            setup.layout,
            worker,
            buffers=self._experiment.compute.receive_buffers,
            capacity=message_capacity(plan, setup),
            start=self._server.number,
        ) as downlink:
            recorded = self._writer.recorded(plan.position)
            for number in self._server.rounds(downlink, self._position):
                if number < recorded:
                    self.progress.repeat(plan, number, recorded)
                    continue
                self.progress.advance(plan)
                self._tell_losses()
        self._server = None

    def _restore(self, server: "ScenarioServer", state: ScenarioState) -> None:
        try:
            server.restore(state)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._checkpoints.path}: this checkpoint does not fit the run ({error}): remove "
                "it, and the rounds are gone through again"
            ) from None

    def lost(self, lost: Sequence[Lost], since: float, ranks: int) -> None:
        """Take down who was lost; told in the file when the next round is there.

        Parameters
        ----------
        lost
            The ranks.
        since
            When it was noticed, on the monotonic clock.
        ranks
            How many ranks are left.
        """
        names = []
        for one in lost:
            what = "does not answer and was killed" if one.stuck else "has died"
            names.append(f"rank {one.number} on {one.host} {what}")
            here = Position(self._position.scenario, self._position.round)
            self._losses.append((one, "stuck" if one.stuck else "killed", since, here))
        self.say(
            f"{', '.join(names)}{self._position}: going on with {ranks} rank{'s' * (ranks > 1)}"
        )

    def _tell_losses(self) -> None:
        for lost, reason, since, where in self._losses:
            places = [plan.position for plan in self._plans if plan.index == where.scenario]
            self._writer.record_loss(
                Loss(
                    rank=lost.number,
                    host=lost.host,
                    reason=reason,
                    scenario=places[0] if places else -1,
                    round=-1 if where.round is None else where.round,
                    seconds=time.monotonic() - since,
                )
            )
        self._losses.clear()

    def commit(self) -> None:
        """Commit what has been recorded."""
        self._writer.commit()

    def complete(self) -> None:
        """Give the results file its name: every round is there."""
        self._tell_losses()
        self._writer.complete()
        self._checkpoints.remove()

    def close(self) -> None:
        """Close the file, complete or not."""
        self._writer.close()

    def stopped(self, advice: str) -> int:
        """Say that the run was stopped, and how it goes on; return the exit status."""
        scenario, number = self._position.scenario, self._position.round
        where = "" if scenario is None else f" in scenario {scenario}"
        if number is not None:
            where += f", round {number}"
            plan = next(plan for plan in self._plans if plan.index == scenario)
            if number < self._writer.committed(plan.position):
                where += ", which is gone through again"
        total = sum(plan.rounds for plan in self._plans)
        done = sum(self._writer.committed(plan.position) for plan in self._plans)
        self.say(
            f"stopped by {self._stop.name}{where}; {done} of {total} rounds are committed; {advice}"
        )
        return EXIT_STOPPED

    def tell_placement(self, ranks: Sequence[Rank], threads: int) -> None:
        """Tell the user where the ranks are, and what they share."""
        if len(ranks) > 1:
            kinds = dict.fromkeys(rank.device.partition(" ")[2] or rank.device for rank in ranks)
            self.progress.remark(f"{describe_hosts(ranks)}; {', '.join(kinds)}")
            for line in describe_sharing(ranks, threads):
                self.progress.remark(line)

    def say(self, text: str) -> None:
        """Tell the user something on standard error."""
        self.progress.note(text)
