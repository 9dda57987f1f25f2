"""What a scenario needs on a rank before its first round: data, model, attacks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.base import Attack
from testbed.data import Dataset, Parts, load, split
from testbed.data.partition import Partition, partition
from testbed.defenses.pipeline import Pipeline
from testbed.errors import UserError
from testbed.experiment import Scenario
from testbed.knowledge import auxiliary_samples
from testbed.models.build import build, initialise_uniform
from testbed.models.flat import FlatModel, flat_state
from testbed.models.last_layer import find_last_layer
from testbed.models.norms import Norm, Norms
from testbed.per_sample import supports
from testbed.plan import ScenarioPlan
from testbed.samples import Samples
from testbed.sections import ModelSection
from testbed.seeds import Purpose, seed64, stream
from testbed.transport.base import Transport
from testbed.update import UpdateLayout

# Name, root, variant, limit.
DataKey = tuple[str, Path | None, str | None, int | None]


@dataclass(frozen=True)
class ScenarioSetup:
    """Data, model and attacks of a scenario.

    Attributes
    ----------
    model
        A module for whoever holds the set-up; its values are those of the last use.
    initialise
        Fills a flat model [parameters + buffers] on the host with the initial values that belong
        to a key of `testbed.seeds`.
    auxiliary
        Makes the adversary's samples.
    partition
        Which of the victims' samples are whose; None where every client draws from all.
    pipeline
        What the clients do before they share.
    weigh
        Returns what a client of the population weighs in the mean of the updates.
    shared_buffers
        How many float buffers come with an update.
    """

    samples: Samples
    parts: Parts
    model: FlatModel
    attacks: Mapping[str, Attack]
    initialise: Callable[[torch.Tensor, tuple[int, ...]], None]
    auxiliary: Callable[[], AuxiliarySamples]
    partition: Partition | None
    pipeline: Pipeline
    weigh: Callable[[int], int]
    shared_buffers: int

    @property
    def capacity(self) -> int:
        """The most bytes that an update takes as it is shared, where it is shared by itself."""
        return self.pipeline.capacity if self.pipeline.compresses else 4 * self.layout.size

    @property
    def shared(self) -> int:
        """Length of what an update shares: parameters, and buffers where these are shared."""
        return self.layout.parameters + self.shared_buffers

    @property
    def layout(self) -> UpdateLayout:
        """Where things lie in an update."""
        return self.model.layout


class Setups:
    """Makes the set-ups of scenarios on one rank; what scenarios share is made once.

    Parameters
    ----------
    transport
        Shares the data sets among the ranks of a host.
    device
        Where this rank computes.
    """

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport = transport
        self._device = device
        self._samples: dict[DataKey, tuple[Dataset, Samples]] = {}
        self._parts: tuple[object, Parts] | None = None
        self._partition: tuple[object, Partition] | None = None
        self._models: dict[bool, tuple[object, FlatModel, torch.Tensor]] = {}

    def load_data(self, plans: Sequence[ScenarioPlan]) -> None:
        """Load every data set of the plan; all ranks call this, in the same order."""
        for plan in plans:
            keys = {"data.root": _data_key(plan.scenario)}
            other = _auxiliary_key(plan.scenario)
            if other is not None:
                keys["adversary.auxiliary_root"] = other
            for setting, key in keys.items():
                if key not in self._samples:
                    dataset = self._share(key, setting)
                    self._samples[key] = (dataset, Samples(dataset, self._device))

    def _share(self, key: DataKey, setting: str) -> Dataset:
        def read() -> tuple[tuple[str, int, float, int | None], dict[str, NDArray[np.generic]]]:
            try:
                dataset = load(*key)
            except UserError as error:
                # The loaders know of one place where a root may stand.
                name = setting.replace("_root", "_data").replace(".root", ".name")
                text = str(error).replace("data.root", setting).replace("data.name", name)
                raise UserError(text) from None
            description = (dataset.name, dataset.classes, dataset.scale, dataset.test_start)
            arrays: dict[str, NDArray[np.generic]]
            arrays = {"images": dataset.images, "labels": dataset.labels}
            if dataset.users is not None:
                arrays["users"] = dataset.users
            return description, arrays

        (name, classes, scale, test_start), arrays = self._transport.share(read)
        return Dataset(
            name=name,
            images=arrays["images"],  # type: ignore[arg-type]
            labels=arrays["labels"],  # type: ignore[arg-type]
            classes=classes,
            scale=scale,
            test_start=test_start,
            users=arrays.get("users"),  # type: ignore[arg-type]
        )

    def make(self, plan: ScenarioPlan, *, copy: bool = False) -> ScenarioSetup:
        """Return the set-up of a scenario.

        Parameters
        ----------
        plan
            The scenario.
        copy
            Whether it gets a module apart from that of set-ups made without.

        Raises
        ------
        UserError
            The model cannot be built, does not fit the data, or the data do not suffice.
        """
        scenario = plan.scenario
        dataset, samples = self._samples[_data_key(scenario)]
        parts = self._split(scenario, dataset)
        if scenario.labels.distribution == "unbalanced" and dataset.classes < 2:
            raise UserError(
                "labels.distribution: unbalanced needs two classes, "
                f"the data set {dataset.name!r} has {dataset.classes}"
            )
        if scenario.federation.evaluate_every and len(parts.test) == 0:
            raise UserError(
                "federation.evaluate_every: there is no test part to evaluate on: "
                "set data.test_fraction above 0, or evaluate_every to 0"
            )
        divided = self._divide(plan, dataset, parts)
        model, buffers = self._model(scenario, dataset, copy=copy)
        _check_batches(scenario, model, dataset.shape, divided)
        shared = model.layout.buffers if scenario.federation.shares_statistics else 0
        pipeline = Pipeline(plan.defenses, model.tensors, shared)
        _check_defenses(scenario, model, pipeline)

        def initialise(state: torch.Tensor, key: tuple[int, ...]) -> None:
            seed = seed64(scenario.seed, Purpose.MODEL, *key)
            if scenario.model.initialisation == "uniform":
                initialise_uniform(state[: model.layout.parameters], seed)
                state[model.layout.parameters :].copy_(buffers)
            else:
                state.copy_(flat_state(_build(scenario.model, dataset, seed)))

        def auxiliary() -> AuxiliarySamples:
            key = _auxiliary_key(scenario)
            other = None if key is None else self._samples[key][1]
            return auxiliary_samples(scenario, samples, parts, dataset.classes, other)

        attacks = {section.label: section.make() for section in scenario.attacks}
        return ScenarioSetup(
            samples=samples,
            parts=parts,
            model=model,
            attacks=attacks,
            initialise=initialise,
            auxiliary=auxiliary,
            partition=divided,
            pipeline=pipeline,
            weigh=_weights(plan, divided),
            shared_buffers=shared,
        )

    def _divide(self, plan: ScenarioPlan, dataset: Dataset, parts: Parts) -> Partition | None:
        """Divide the victims' samples among the clients."""
        scenario, section = plan.scenario, plan.scenario.partition
        if section.kind == "shared":
            return None
        key = (scenario.data, scenario.seed, section, plan.population)
        if self._partition is None or self._partition[0] != key:
            divided = partition(
                section.kind,
                dataset.labels,
                parts.victim,
                plan.population,
                dataset.classes,
                # Not of the scenario's number: all scenarios divide the samples alike.
                stream(scenario.seed, Purpose.PARTITION),
                alpha=section.alpha,
                classes_per_client=section.classes_per_client,
                users=dataset.users,
            )
            self._partition = (key, divided)
        return self._partition[1]

    def _split(self, scenario: Scenario, dataset: Dataset) -> Parts:
        key = (scenario.data, scenario.seed)
        if self._parts is None or self._parts[0] != key:
            parts = split(
                dataset.labels,
                dataset.classes,
                dataset.test_start,
                auxiliary_per_class=scenario.data.auxiliary_per_class,
                test_fraction=scenario.data.test_fraction,
                # Not of the scenario's number: all scenarios divide a data set alike.
                rng=stream(scenario.seed, Purpose.PARTS),
            )
            self._parts = (key, parts)
        return self._parts[1]

    def _model(
        self, scenario: Scenario, dataset: Dataset, *, copy: bool
    ) -> tuple[FlatModel, torch.Tensor]:
        key = (scenario.model, _data_key(scenario))
        if copy not in self._models or self._models[copy][0] != key:
            model = _flat(scenario.model, dataset, 0, self._device)
            self._models[copy] = (key, model, model.buffers.cpu().clone())
        _, model, buffers = self._models[copy]
        return model, buffers


def _data_key(scenario: Scenario) -> DataKey:
    data = scenario.data
    return data.name, data.root, data.variant, data.limit


def _auxiliary_key(scenario: Scenario) -> DataKey | None:
    adversary = scenario.adversary
    if adversary.auxiliary_data is None:
        return None
    return adversary.auxiliary_data, adversary.auxiliary_root, None, None


def _weights(plan: ScenarioPlan, divided: Partition | None) -> Callable[[int], int]:
    """Return what each client weighs; see `ScenarioSetup.weigh`."""
    if plan.scenario.federation.weighting == "uniform":
        return lambda _: 1
    if divided is None:
        return lambda _: plan.labels_per_update or 1
    sizes = [len(own) for own in divided.indices]
    return lambda identity: sizes[identity]


def _check_batches(
    scenario: Scenario,
    model: FlatModel,
    shape: tuple[int, int, int],
    divided: Partition | None,
) -> None:
    """Raise where BatchNorm would meet a single value, of which it knows no variance."""
    federation = scenario.federation
    size = federation.batch_size
    single = {"federation.batch_size": size == 1}
    if scenario.pretraining.steps:
        single["pretraining.batch_size"] = scenario.pretraining.batch_size == 1
    if divided is not None and federation.local_epochs is not None:
        rests = [len(own) % size for own in divided.indices]
        single["federation.batch_size, with local_epochs,"] = 1 in rests
    for key, found in single.items():
        if found and federation.batch_norm != "frozen" and Norms(model, shape).single_values:
            raise UserError(
                f"{key}: a BatchNorm layer of the model normalises one value per image, and a "
                "batch of one has no variance: expected at least 2"
            )


def _check_defenses(scenario: Scenario, model: FlatModel, pipeline: Pipeline) -> None:
    """Raise where the model does not go together with a defence."""
    if pipeline.per_sample is None:
        return
    module = model.module.train()
    for layer in module.modules():
        if isinstance(layer, Norm) and scenario.federation.batch_norm == "frozen":
            layer.eval()
    reason = supports(module)
    if reason:
        raise UserError(f"defenses: dp_sgd needs gradients of single samples: {reason}")


def lowest_feature(plan: ScenarioPlan, setup: ScenarioSetup) -> float:
    """Return the smallest input of the last layer of a scenario's first model on random images."""
    none = AuxiliarySamples(torch.empty((0, *setup.samples.shape)), np.zeros(0, np.int64))
    state = torch.empty(setup.layout.size)
    setup.initialise(state, plan.initial_key(0))
    model = GlobalModel(setup.model, none, setup.samples.shape)
    model.enter(state.numpy(), plan.scenario.seed, (plan.draws, 0))
    return model.lowest_feature()


def _flat(section: ModelSection, dataset: Dataset, seed: int, device: torch.device) -> FlatModel:
    module = _build(section, dataset, seed)
    last = find_last_layer(module, dataset.shape, dataset.classes, section.last_layer)
    return FlatModel(module, last, device)


def _build(section: ModelSection, dataset: Dataset, seed: int) -> torch.nn.Module:
    return build(
        section.name,
        shape=dataset.shape,
        classes=dataset.classes,
        activation=section.activation,
        arguments=section.arguments,
        init=section.initialisation,
        seed=seed,
    )
