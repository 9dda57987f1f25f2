"""What attacks learn from the global model: equal to its definition by real backward passes."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from global_models import Federation, infer, perceptron
from numpy.typing import NDArray
from small_run import plan_of, setups_for
from torch import nn

from testbed.attacks import Knowledge, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.restricted import RestrictedAdversary
from testbed.data import load
from testbed.models.build import initialise_uniform
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer
from testbed.samples import Samples
from testbed.startup import ScenarioSetup

CLASSES, PER_CLASS, BATCH = 10, 12, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["cnn", "resnet20"])
def setup(request: pytest.FixtureRequest) -> ScenarioSetup:
    plan = plan_of(f"model.name={request.param}", f"data.auxiliary_per_class={PER_CLASS}")
    return setups_for([plan]).make(plan)


def state_of(setup: ScenarioSetup, key: int = 0) -> NDArray[np.float32]:
    state = torch.empty(setup.layout.size)
    setup.initialise(state, (0, key))
    return state.numpy()


def adversary_of(setup: ScenarioSetup, key: int = 0) -> GlobalModel:
    model = GlobalModel(setup.model, setup.auxiliary(), setup.samples.shape)
    model.enter(state_of(setup, key), 0, (0, key))
    return model


def has_norms(setup: ScenarioSetup) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in setup.model.module.modules())


def reference_module(setup: ScenarioSetup, key: int = 0) -> nn.Module:
    """Return the global model as a module of its own, in training mode as on a client."""
    setup.model.load(torch.from_numpy(state_of(setup, key)))
    module = copy.deepcopy(setup.model.module)
    for parameter in module.parameters():
        parameter.grad = None
    return module.train()


def row_sums(module: nn.Module, images: torch.Tensor, label: int) -> NDArray[np.float64]:
    """Return the row sums of the last layer's gradient of a class-pure batch, by autograd."""
    labels = torch.full((len(images),), label)
    loss = nn.functional.cross_entropy(module(images), labels)
    (gradient,) = torch.autograd.grad(loss, [module.get_parameter("classifier.weight")])
    return gradient.double().sum(dim=1).numpy()


def define(pure: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Return impact and offset from class-pure row sums [class of the batch, class of the row]."""
    own = sum(pure[c, c] for c in range(CLASSES))
    impact = own / (CLASSES * BATCH) * (1 + 1 / CLASSES)
    others = [[pure[c, row] for c in range(CLASSES) if c != row] for row in range(CLASSES)]
    return impact, np.mean(others, axis=1)


def calibrate(
    name: str, model: GlobalModel, **options: object
) -> tuple[float, NDArray[np.float64]]:
    attack = make_attack(name, options)
    calibration = attack.calibrate(RestrictedAdversary(model, attack.knowledge, BATCH, 0))
    assert {array: values.shape for array, values in calibration.items()} == {
        "impact": (1,),
        "offset": (1, CLASSES),
    }
    return calibration["impact"][0], calibration["offset"][0]


def assert_equal(found: tuple[float, NDArray[np.float64]], pure: NDArray[np.float64]) -> None:
    impact, offset = define(pure)
    assert found[0] == pytest.approx(impact, rel=1e-5)
    np.testing.assert_allclose(found[1], offset, rtol=1e-5, atol=1e-5 * np.abs(offset).max())


def test_llg_plus_is_the_mean_over_class_pure_batches(setup: ScenarioSetup) -> None:
    module = reference_module(setup)
    # With BatchNorm all samples of a class are one batch. Without, any batches which have each
    # sample once give the same mean: here of the clients' size.
    size = PER_CLASS if has_norms(setup) else BATCH
    pure = np.empty((CLASSES, CLASSES))
    by_class = setup.parts.auxiliary.reshape(CLASSES, PER_CLASS)
    for label, own in enumerate(by_class):
        batches = [setup.samples.inputs(part) for part in own.reshape(-1, size)]
        pure[label] = np.mean([row_sums(module, images, label) for images in batches], axis=0)
    impact, offset = calibrate("llg_plus", adversary_of(setup))
    assert_equal((impact, offset), pure)
    # Of features that are not negative; those of the ResNet can be.
    assert impact < 0 or has_norms(setup)


@pytest.mark.parametrize(("kind", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_llg_star_is_the_gradient_of_class_pure_dummy_batches(
    setup: ScenarioSetup, kind: str, value: float
) -> None:
    module = reference_module(setup)
    images = torch.full((BATCH, *setup.samples.shape), value)
    pure = np.array([row_sums(module, images, label) for label in range(CLASSES)])
    assert_equal(calibrate("llg_star", adversary_of(setup), dummy=kind), pure)


def test_llg_star_with_random_inputs(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    seen: list[torch.Tensor] = []
    hook = setup.model.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = calibrate("llg_star", model, dummy="random", samples=30)
    hook.remove()
    (images,) = seen
    assert images.shape == (30, *setup.samples.shape)
    assert 0 <= images.min() < 0.05 < 0.95 < images.max() < 1
    module = reference_module(setup)
    pure = np.array([row_sums(module, images, label) for label in range(CLASSES)])
    assert_equal(found, pure)


def test_random_inputs_depend_on_seed_and_round_alone(setup: ScenarioSetup) -> None:
    model, state = adversary_of(setup), state_of(setup)

    def outputs(seed: int, key: int) -> NDArray[np.float64]:
        model.enter(state, seed, (0, key))
        return model.on_dummy("random", 3).features

    first = outputs(0, 0)
    assert not np.array_equal(outputs(0, 1), first)
    assert not np.array_equal(outputs(1, 0), first)
    model.on_dummy("random", 5)
    np.testing.assert_array_equal(outputs(0, 0), first)


CALLS = {
    Knowledge.MODEL: lambda adversary: adversary.on_dummy("zeros", 1),
    Knowledge.AUXILIARY: lambda adversary: adversary.on_auxiliary(),
}


@pytest.mark.parametrize("asked", CALLS)
@pytest.mark.parametrize("declared", Knowledge)
def test_an_attack_gets_what_it_declared(
    setup: ScenarioSetup, declared: Knowledge, asked: Knowledge
) -> None:
    adversary = RestrictedAdversary(adversary_of(setup), declared, BATCH, 7)
    allowed = {
        Knowledge.GRADIENTS: [],
        Knowledge.MODEL: [Knowledge.MODEL],
        Knowledge.AUXILIARY: [Knowledge.MODEL, Knowledge.AUXILIARY],
        Knowledge.MALICIOUS: [Knowledge.MODEL, Knowledge.AUXILIARY],
        Knowledge.TRUTH: [Knowledge.MODEL, Knowledge.AUXILIARY],
    }
    if asked in allowed[declared]:
        assert CALLS[asked](adversary).posterior.shape[1] == CLASSES
        return
    with pytest.raises(PermissionError) as caught:
        CALLS[asked](adversary)
    assert f"knowledge of {declared.value!r} and asks for {asked.value!r}" in str(caught.value)


def test_batch_size_seed_and_classes_are_public(setup: ScenarioSetup) -> None:
    adversary = RestrictedAdversary(adversary_of(setup), Knowledge.GRADIENTS, BATCH, 7)
    assert (adversary.classes, adversary.batch_size, adversary.seed) == (CLASSES, BATCH, 7)


def test_auxiliary_outputs_cover_every_class(setup: ScenarioSetup) -> None:
    outputs = adversary_of(setup).on_auxiliary()
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    np.testing.assert_array_equal(outputs.labels, labels)
    assert outputs.posterior.shape == (CLASSES * PER_CLASS, CLASSES)
    assert outputs.features.shape == (CLASSES * PER_CLASS, setup.layout.features)


def test_each_kind_of_input_is_run_once_for_a_model(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    sizes: list[int] = []
    hook = setup.model.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for _ in range(3):
        for name in ("llg_star", "llg_plus"):
            calibrate(name, model)
    once = list(sizes)
    assert sum(once) <= CLASSES * PER_CLASS + 2
    calibrate("llg_star", model, dummy="ones")
    assert len(sizes) == len(once) + 1
    model.enter(state_of(setup, 1), 0, (0, 1))
    calibrate("llg_star", model)
    assert len(sizes) == len(once) + 2
    hook.remove()


def test_outputs_are_those_of_the_model_that_was_entered(setup: ScenarioSetup) -> None:
    model = adversary_of(setup, 0)
    first = model.on_auxiliary().posterior
    model.enter(state_of(setup, 1), 0, (0, 0))
    assert not np.allclose(model.on_auxiliary().posterior, first)
    # Whatever was done to the module in between.
    state = state_of(setup, 0)
    model.enter(state, 0, (0, 0))
    state[:] = 0
    with torch.no_grad():
        setup.model.state.fill_(1)
    setup.model.module.train()
    np.testing.assert_array_equal(model.on_auxiliary().posterior, first)


def test_what_ran_before_does_not_matter(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    batches = np.arange(8).reshape(1, 2, 4) * 13

    def accuracy() -> object:
        return model.accuracy(setup.samples, setup.parts.test)

    runs = {
        "dummy": lambda: model.on_dummy("random", 6).features,
        "auxiliary": lambda: model.on_auxiliary().features,
        "accuracy": accuracy,
        "simulate": lambda: model.simulate(batches).weight_gradient,
        "local": lambda: model.local_update(batches[0]),
        "logits": lambda: model.logit_gradients(),
    }
    alone = {}
    for name, run in runs.items():
        model.enter(state_of(setup), 0, (0, 0))
        alone[name] = run()
    for name in (*runs, *reversed(runs)):
        np.testing.assert_array_equal(runs[name](), alone[name], err_msg=name)
    np.testing.assert_array_equal(
        model.statistics_sent(), state_of(setup)[setup.layout.parameters :]
    )


def test_running_statistics_are_not_used_for_calibrations(setup: ScenarioSetup) -> None:
    model, state = adversary_of(setup), state_of(setup)
    first = model.on_auxiliary().posterior
    state[setup.layout.parameters :] = 0.3
    model.enter(state, 0, (0, 0))
    np.testing.assert_array_equal(model.on_auxiliary().posterior, first)


def test_accuracy_is_that_in_inference_mode(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    everything = np.arange(len(setup.samples.labels))  # more than one batch
    module = reference_module(setup).eval()
    with torch.no_grad():
        guess = module(setup.samples.inputs(everything)).argmax(dim=1).numpy()
    right = guess == setup.samples.labels
    for indices in (everything, everything[:512], everything[600:601]):
        for _ in range(2):
            assert model.accuracy(setup.samples, indices) == right[indices].mean()
            model.on_auxiliary()
            with torch.no_grad():  # the module may have been used for something else
                setup.model.state.fill_(1)


class Narrow(nn.Module):
    """Normalises single values over the batch, and drops features."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.norm(self.hidden(x.flatten(1))))
        logits: torch.Tensor = self.classifier(self.drop(hidden))
        return logits


@pytest.fixture
def narrow() -> GlobalModel:
    dataset = load("digits", None)
    module = Narrow()
    model = FlatModel(module, find_last_layer(module, dataset.shape, CLASSES), torch.device("cpu"))
    initialise_uniform(model.state[: model.layout.parameters], 0)
    auxiliary = np.concatenate([np.flatnonzero(dataset.labels == c)[:5] for c in range(CLASSES)])
    samples = Samples(dataset, torch.device("cpu"))
    own = AuxiliarySamples(samples.inputs(auxiliary), dataset.labels[auxiliary])
    adversary = GlobalModel(model, own, dataset.shape)
    adversary.enter(model.state.numpy().copy(), 0, (0, 0))
    return adversary


def test_one_dummy_input_suffices_with_norms_of_single_values(narrow: GlobalModel) -> None:
    one, many = narrow.on_dummy("zeros", 1), narrow.on_dummy("zeros", 4)
    assert one.posterior.shape == (1, CLASSES)
    assert one.features.shape == (1, 16)
    np.testing.assert_allclose(np.tile(one.posterior, (4, 1)), many.posterior, rtol=1e-6)
    np.testing.assert_allclose(np.tile(one.features, (4, 1)), many.features, rtol=1e-6)
    impact, _ = calibrate("llg_star", narrow)
    assert impact < 0


def test_dropout_is_off(narrow: GlobalModel) -> None:
    assert (narrow.on_auxiliary().features > 0).all()


def grads_of(module: nn.Module, images: torch.Tensor, labels: NDArray[np.int64]) -> torch.Tensor:
    loss = nn.functional.cross_entropy(module(images), torch.from_numpy(labels))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*module.parameters()])])


def client(
    setup: ScenarioSetup, batches: NDArray[np.int64], rate: float
) -> tuple[torch.Tensor, list[NDArray[np.float64]]]:
    """Return a client's update over local steps by autograd, and the module's last buffers."""
    module = reference_module(setup)
    own, total = setup.auxiliary(), torch.zeros(setup.layout.parameters)
    for chosen in batches:
        gradient = grads_of(module, own.inputs[chosen], own.labels[chosen])
        total += gradient
        start = 0
        with torch.no_grad():
            for parameter in module.parameters():
                stop = start + parameter.numel()
                parameter -= rate * gradient[start:stop].view(parameter.shape)
                start = stop
    buffers = [b.numpy() for b in module.buffers() if b.is_floating_point()]
    return total, [b.ravel() for b in buffers]


@pytest.mark.parametrize("steps", [1, 3])
def test_local_updates_are_those_of_a_client(setup: ScenarioSetup, steps: int) -> None:
    batches = np.random.default_rng(1).integers(CLASSES * PER_CLASS, size=(steps, BATCH))
    model = adversary_of(setup)
    total, buffers = client(setup, batches, model.learning_rate)
    update = model.local_update(batches)
    split = setup.layout.parameters
    scale = float(total.abs().max())
    np.testing.assert_allclose(update[:split], total.numpy(), rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(update[split:], np.concatenate([*buffers, []]), rtol=1e-4, atol=1e-6)


def test_simulated_updates_are_the_last_layer_of_a_client_s(setup: ScenarioSetup) -> None:
    batches = np.random.default_rng(2).integers(CLASSES * PER_CLASS, size=(3, 1, BATCH))
    model = adversary_of(setup)
    seen = model.simulate(batches)
    for row, batch in enumerate(batches):
        update = model.local_update(batch)
        weight, bias = model.weight_gradient(update), model.bias_gradient(update)
        assert seen.weight_gradient is not None
        scale = np.abs(weight).max()
        np.testing.assert_allclose(seen.weight_gradient[row], weight, atol=1e-5 * scale)
        np.testing.assert_allclose(seen.row_sums[row], weight.sum(axis=1), atol=1e-4 * scale)
        np.testing.assert_allclose(seen.bias_gradient[row], bias, atol=1e-6)
        if has_norms(setup):
            assert seen.statistics is not None
            sent = update[setup.layout.parameters :]
            np.testing.assert_allclose(seen.statistics[row], sent, rtol=1e-5)
        else:
            assert seen.statistics is None
    assert seen.labels.tolist() == [BATCH] * 3


def test_several_simulated_steps_move_the_last_layer_alone(setup: ScenarioSetup) -> None:
    batches = np.random.default_rng(3).integers(CLASSES * PER_CLASS, size=(1, 3, BATCH))
    model = adversary_of(setup)
    seen = model.simulate(batches)
    module, own = reference_module(setup), setup.auxiliary()
    last = module.get_submodule("classifier")
    total = torch.zeros_like(last.weight)
    for chosen in batches[0]:
        targets = torch.from_numpy(own.labels[chosen])
        loss = nn.functional.cross_entropy(module(own.inputs[chosen]), targets)
        weight, bias = torch.autograd.grad(loss, [last.weight, last.bias])
        total += weight
        with torch.no_grad():
            last.weight -= model.learning_rate * weight
            last.bias -= model.learning_rate * bias
    assert seen.local_steps == 3
    assert seen.labels[0] == 3 * BATCH
    scale = float(total.abs().max())
    np.testing.assert_allclose(seen.weight_gradient[0], total.numpy(), atol=2e-4 * scale)


def test_the_model_after_a_client_s_steps(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    batches = np.arange(8).reshape(2, 4) * 11
    update = model.local_update(batches)
    later = model.after(update)
    split = setup.layout.parameters
    state = state_of(setup)
    state[:split] -= model.learning_rate * update[:split]
    state[split:] = update[split:]
    again = adversary_of(setup)
    again.enter(state, 0, (0, 0))
    np.testing.assert_allclose(later.on_auxiliary().posterior, again.on_auxiliary().posterior)
    np.testing.assert_array_equal(later.head().weight, again.head().weight)
    np.testing.assert_array_equal(later.statistics_sent(), update[split:])
    # The model before is what it was.
    np.testing.assert_array_equal(model.statistics_sent(), state_of(setup)[split:])


def test_logit_gradients_lead_to_the_gradient_of_one_sample(setup: ScenarioSetup) -> None:
    if has_norms(setup):
        return  # in a batch with norms, samples have no gradients of their own
    one = setup.auxiliary()
    model = GlobalModel(
        setup.model, AuxiliarySamples(one.inputs[:1], one.labels[:1]), setup.samples.shape
    )
    model.enter(state_of(setup), 0, (0, 0))
    residual = model.on_auxiliary().posterior[0] - np.eye(CLASSES)[one.labels[0]]
    expected = model.local_update(np.zeros((1, 1), np.int64))[: setup.layout.parameters]
    np.testing.assert_allclose(residual @ model.logit_gradients(), expected, atol=1e-5)


def test_the_momentum_of_each_buffer(setup: ScenarioSetup, narrow: GlobalModel) -> None:
    found = adversary_of(setup).momentum()
    assert found.shape == (setup.layout.buffers,)
    assert (found == np.float32(0.1)).all()
    assert narrow.momentum().tolist() == [np.float32(0.1)] * 32


def test_only_a_malicious_server_plants_models(setup: ScenarioSetup) -> None:
    model = adversary_of(setup)
    with pytest.raises(PermissionError, match="asks for 'malicious'"):
        RestrictedAdversary(model, Knowledge.AUXILIARY, BATCH, 0).planted()
    with pytest.raises(PermissionError, match="the same model"):
        RestrictedAdversary(model, Knowledge.MALICIOUS, BATCH, 0).planted()


def test_a_white_box_differentiates_its_gradient(setup: ScenarioSetup) -> None:
    box = RestrictedAdversary(adversary_of(setup), Knowledge.MODEL, BATCH, 0).white_box()
    inputs = torch.rand((2, *box.shape), requires_grad=True)
    gradient = box.gradient(nn.functional.cross_entropy(box.logits(inputs), torch.tensor([1, 4])))
    assert gradient.shape == (box.parameters,)
    (second,) = torch.autograd.grad(gradient.square().sum(), [inputs])
    assert second.abs().max() > 0


# BatchNorm after a linear layer, which has single values to normalise


def with_norms(repeats: int = 1) -> GlobalModel:
    """Return a model with one auxiliary sample of each class, or with copies of it."""
    dataset, module = load("digits", None), perceptron(norm=True)
    own = np.array([np.flatnonzero(dataset.labels == c)[0] for c in range(CLASSES)])
    own = np.repeat(own, repeats)
    model = FlatModel(module, find_last_layer(module, dataset.shape, CLASSES), torch.device("cpu"))
    inputs = Samples(dataset, torch.device("cpu")).inputs(own)
    holder = GlobalModel(model, AuxiliarySamples(inputs, dataset.labels[own]), dataset.shape)
    holder.enter(model.state.numpy().copy(), 0, (0, 0))
    return holder


def of_single_samples(model: GlobalModel, repeats: int = 1) -> dict[str, NDArray[np.floating]]:
    """Return what a model says of each of its samples, or of each with its copies."""
    batches = np.arange(CLASSES * repeats).reshape(CLASSES, 1, repeats)
    outputs, seen = model.on_auxiliary(), model.simulate(batches)
    updates = np.stack([model.local_update(batch) for batch in batches])
    normalised = [model.normalised(row, repeats) for row in seen.statistics]
    return {
        "posterior": outputs.posterior[::repeats],
        "features": outputs.features[::repeats],
        "weight": seen.weight_gradient,
        "bias": seen.bias_gradient,
        "statistics": seen.statistics,
        "updates": updates,
        "logits": model.logit_gradients(),
        "moments": np.stack([found.moments[::repeats] for found in normalised]),
    }


def test_a_batch_of_one_with_norms_is_that_sample_twice() -> None:
    once, twice = of_single_samples(with_norms()), of_single_samples(with_norms(2), 2)
    for name, values in once.items():
        assert np.isfinite(values).all(), name
        scale = np.abs(twice[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(values, twice[name], atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_mixed_batches_of_few_samples_with_norms(batch_size: int) -> None:
    outputs = with_norms().on_auxiliary(batch_size)
    assert outputs.posterior.shape == (CLASSES, CLASSES)
    assert np.isfinite(outputs.features).all()
    # The first two samples at least share a batch: they are not what they are alone.
    assert not np.allclose(outputs.features, with_norms().on_auxiliary().features)


@pytest.mark.parametrize("kind", ["zeros", "ones", "random", "normal"])
def test_one_dummy_input_with_norms(kind: str) -> None:
    outputs = with_norms().on_dummy(kind, 1)
    assert outputs.posterior.shape == (1, CLASSES)
    assert np.isfinite(outputs.features).all()
    np.testing.assert_allclose(outputs.posterior.sum(), 1)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("batchnorm", {"batches": 20}),
        ("batchnorm_joint", {"batches": 20}),
        ("ldia", {"shadows": 20, "epochs": 1}),
        ("posterior_regression", {"forward_batches": 20, "steps": 5}),
    ],
)
@pytest.mark.parametrize("believed", [1, 4])
def test_batches_of_one_in_truth_or_as_believed(
    name: str, knobs: dict[str, int], believed: int
) -> None:
    # The clients have the other.
    federation = Federation(perceptron(norm=True), per_class=1, batch_size=5 - believed)
    observations, _ = federation.draw(2)
    federation.batch_size = believed
    observations = replace(observations, labels=np.full(2, believed))
    attack = make_attack(name, knobs)
    calibration = federation.calibrate(attack, observations)
    for array, values in calibration.items():
        assert np.isfinite(values).all(), array
    infer(attack, observations, calibration)
