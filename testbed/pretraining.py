"""Models that are attacked at a stage of their training, which all ranks share out first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.checkpoint import ModelKey
from testbed.data import Sampler
from testbed.plan import ScenarioPlan
from testbed.seeds import Purpose, seed64, stream
from testbed.startup import ScenarioSetup, Setups
from testbed.transport.base import Transport

State = NDArray[np.float32]

# Each rank trains so long, in steps or one model, before what it has is collected.
_STEPS_AT_ONCE = 500


class Saving(Protocol):
    """Where trained models are saved."""

    def models_due(self) -> bool:
        """Return whether to save."""

    def write_models(self, models: Mapping[ModelKey, State]) -> None:
        """Save all models that there are."""

    def stop_if_asked(self) -> None:
        """End the run here, by an exception, if somebody has asked for that."""


class Pretraining:
    """Trains the models of scenarios, each once, and keeps them on the root at every stage.

    The models are dealt out to the ranks; that of round r depends on the seed and on r alone. The
    root drops what no later scenario attacks.

    Parameters
    ----------
    transport, setups
        Of this rank.
    plans
        All scenarios of the run: those that differ in the number of steps share a training.
    models
        What an earlier start has trained; on the root.

    Attributes
    ----------
    transport
        To be replaced when ranks are lost.
    """

    def __init__(
        self,
        transport: Transport,
        setups: Setups,
        plans: Sequence[ScenarioPlan],
        models: Mapping[ModelKey, State] | None = None,
    ) -> None:
        self.transport = transport
        self._setups = setups
        self._plans = plans
        self._states: dict[ModelKey, State] = dict(models or {})

    def prepare(
        self,
        plan: ScenarioPlan,
        announce: Callable[[str], None] | None = None,
        saving: Saving | None = None,
    ) -> None:
        """Train what a scenario needs and has not been trained yet; every rank calls this.

        Parameters
        ----------
        plan
            The next scenario.
        announce
            Is told what is going on, on the root.
        saving
            Of the root: where models are saved while others are trained.
        """
        later = {
            (_key(other), other.pretraining_steps)
            for other in self._plans
            if other.index >= plan.index
        }
        self._states = {k: state for k, state in self._states.items() if k[:2] in later}
        if plan.pretraining_steps is None:
            return
        key = _key(plan)
        sharing = [other for other in self._plans if _key(other) == key]
        steps = sorted(
            {other.pretraining_steps or 0 for other in sharing if other.index >= plan.index}
        )
        models = max(other.rounds if other.fresh_model else 1 for other in sharing)
        # Only the root knows what there is, from before a loss or from an earlier start.
        missing = self.transport.broadcast(
            [
                number
                for number in range(models)
                if any((key, step, number) not in self._states for step in steps)
            ]
        )
        if announce is not None and missing and steps[-1]:
            count = len(missing)
            announce(f"training {count} model{'s' * (count > 1)} for {steps[-1]} steps")
        setup = self._setups.make(plan)
        ranks = self.transport.size
        # What is trained is collected now and then: it is saved, and not lost with a rank.
        each = max(1, _STEPS_AT_ONCE // max(steps[-1], 1))
        for start in range(0, len(missing), each * ranks):
            part = missing[start : start + each * ranks]
            mine = part[self.transport.rank :: ranks]
            states = [state for number in mine for state in _train(plan, setup, number, steps)]
            for rank, found in enumerate(self.transport.collect(states)):
                labels = ((step, number) for number in part[rank::ranks] for step in steps)
                for (step, number), state in zip(labels, found, strict=True):
                    self._states[key, step, number] = state
            if saving is not None and saving.models_due():
                saving.write_models(self._states)
                saving.stop_if_asked()

    def initial(self, plan: ScenarioPlan, number: int) -> State | None:
        """Return a round's model on the root; None where the scenario has no pretraining."""
        if plan.pretraining_steps is None:
            return None
        return self._states[_key(plan), plan.pretraining_steps, number]


def _key(plan: ScenarioPlan) -> str:
    scenario = plan.scenario
    parts: list[Any] = [scenario.seed, scenario.data, scenario.model]
    return repr([*parts, scenario.pretraining.model_copy(update={"steps": None})])


def _train(
    plan: ScenarioPlan, setup: ScenarioSetup, number: int, stages: Sequence[int]
) -> list[State]:
    """Return a model after each of the given numbers of steps, ascending."""
    seed, section = plan.scenario.seed, plan.scenario.pretraining
    model, samples = setup.model, setup.samples
    split = setup.layout.parameters
    start = torch.empty(setup.layout.size)
    setup.initialise(start, plan.initial_key(number))
    model.load(start)
    model.module.train()
    torch.manual_seed(seed64(seed, Purpose.PRETRAINING, number, 1))
    sampler = Sampler(samples.labels, setup.parts.victim, setup.layout.classes)
    rng = stream(seed, Purpose.PRETRAINING, number)
    gradient = torch.empty(split, device=model.state.device)
    kept = []
    done = 0
    for stage in stages:
        for _ in range(stage - done):
            batch = sampler.draw("natural", section.batch_size, rng)
            logits = model.module(samples.inputs(batch))
            loss = torch.nn.functional.cross_entropy(logits, samples.targets(batch))
            model.gradient(loss, gradient)
            model.state[:split].sub_(gradient, alpha=section.learning_rate)
        done = stage
        kept.append(model.state.cpu().numpy().copy())
    return kept
