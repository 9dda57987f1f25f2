"""Flat state and gradient: the module's own, and equal to what autograd gives without them."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from testbed.errors import UserError
from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

SHAPE, CLASSES = (1, 8, 8), 10
CPU = torch.device("cpu")


class Unused(nn.Module):
    """Has a parameter that the loss does not depend on, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.frozen = nn.Linear(64, 8)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.frozen(x.flatten(1))))
        return logits


class Tied(nn.Module):
    """Uses one weight twice; the last layer's parameter has the other layer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, CLASSES)
        self.second = nn.Linear(CLASSES, 64)
        self.head = nn.Linear(64, CLASSES)
        self.head.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))
        logits: torch.Tensor = self.head(hidden)
        return logits


def norm_net(momentum: float | None = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6, momentum=momentum),
        nn.ReLU(),
        nn.Linear(6, CLASSES),
    )


def paper(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return build(
            name, shape=SHAPE, classes=CLASSES, activation=None, arguments={}, init="torch", seed=1
        )

    return make


MAKERS = {
    "cnn": paper("cnn"),
    "resnet20": paper("resnet20"),
    "unused": Unused,
    "tied": Tied,
    "norm": norm_net,
}
ALL = pytest.mark.parametrize("name", MAKERS)


def flatten(module: nn.Module) -> FlatModel:
    return FlatModel(module, find_last_layer(module, SHAPE, CLASSES), CPU)


def batch(seed: int = 0, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((size, *SHAPE), generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def loss_of(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(module(images), labels)


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors] or [torch.empty(0)])


def float_buffers(module: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def counters(module: nn.Module) -> list[int]:
    return [int(buffer) for buffer in module.buffers() if not buffer.is_floating_point()]


@ALL
def test_state_holds_the_values_of_the_module(name: str) -> None:
    torch.manual_seed(0)
    module = MAKERS[name]()
    reference = copy.deepcopy(module)
    model = flatten(module)
    assert model.layout.parameters == sum(p.numel() for p in reference.parameters())
    assert model.layout.buffers == sum(b.numel() for b in float_buffers(reference))
    expected = join([*reference.parameters(), *float_buffers(reference)])
    assert torch.equal(model.state, expected)
    assert model.state.shape == (model.layout.size,)
    images, _ = batch()
    module.eval()
    reference.eval()
    assert torch.equal(module(images), reference(images))


@ALL
def test_parameters_and_buffers_are_views_of_the_state(name: str) -> None:
    model = flatten(MAKERS[name]())
    with torch.no_grad():
        model.state.copy_(torch.arange(model.layout.size))
    values = join([*model.module.parameters(), *float_buffers(model.module)])
    assert torch.equal(values, torch.arange(model.layout.size).float())
    with torch.no_grad():
        for number, tensor in enumerate([*model.module.parameters()]):
            tensor.fill_(-number)
    numbers = [torch.full((p.numel(),), -float(n)) for n, p in enumerate(model.module.parameters())]
    assert torch.equal(model.state[: model.layout.parameters], torch.cat(numbers))


@ALL
def test_last_layer_lies_where_the_layout_says(name: str) -> None:
    model = flatten(MAKERS[name]())
    layer = model.module.get_submodule(model.last_layer.name)
    assert isinstance(layer, nn.Linear)
    flat = model.state.numpy()
    np.testing.assert_array_equal(model.layout.weight_gradient(flat), layer.weight.detach())
    bias = model.layout.bias_gradient(flat)
    own = dict(layer.named_parameters()).get("bias")
    assert (bias is None) == (own is None)
    if bias is not None and own is not None:
        np.testing.assert_array_equal(bias, own.detach())


def gradient_of(model: FlatModel, loss: torch.Tensor) -> torch.Tensor:
    """Return the gradient, in a buffer that held something else."""
    out = torch.full((model.layout.parameters,), torch.nan)
    model.gradient(loss, out)
    return out


@ALL
def test_gradient_is_that_of_autograd_on_an_untouched_copy(name: str) -> None:
    torch.manual_seed(0)
    module = MAKERS[name]()
    reference = copy.deepcopy(module)
    model = flatten(module)
    for seed in (1, 2):  # the second gradient replaces the first
        images, labels = batch(seed)
        gradient = gradient_of(model, loss_of(module, images, labels))
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(
                reference.parameters(), _gradients(reference, images, labels), strict=True
            )
        ]
        torch.testing.assert_close(gradient, join(gradients), rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0
    torch.testing.assert_close(
        model.state[model.layout.parameters :], join(float_buffers(reference))
    )


def _gradients(
    module: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> list[torch.Tensor | None]:
    parameters = list(module.parameters())
    learned = [p for p in parameters if p.requires_grad]
    loss = loss_of(module, images, labels)
    found = dict(
        zip(map(id, learned), torch.autograd.grad(loss, learned, allow_unused=True), strict=True)
    )
    return [found.get(id(parameter)) for parameter in parameters]


def test_gradient_does_not_care_for_gradients_of_the_modules_own() -> None:
    model = flatten(Unused())
    images, labels = batch()
    first = gradient_of(model, loss_of(model.module, images, labels))
    for parameter in model.module.parameters():
        parameter.grad = torch.full_like(parameter, 9.0)
    assert torch.equal(gradient_of(model, loss_of(model.module, images, labels)), first)


def test_load_sets_everything() -> None:
    model = flatten(norm_net())
    state = torch.arange(model.layout.size).float()
    model.load(state)
    assert torch.equal(join([*model.module.parameters(), *float_buffers(model.module)]), state)
    state.zero_()
    assert model.state[-1] == model.layout.size - 1


def test_load_buffers_leaves_the_parameters() -> None:
    model = flatten(norm_net())
    before = model.state.clone()
    model.load_buffers(torch.full((12,), 3.0))
    split = model.layout.parameters
    assert model.layout.buffers == 12
    assert torch.equal(model.state[:split], before[:split])
    assert torch.equal(model.state[split:], torch.full((12,), 3.0))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("everything", [False, True])
def test_result_does_not_depend_on_clients_served_before(
    momentum: float | None, everything: bool
) -> None:
    # Without a momentum, BatchNorm averages over as many batches as its counter says.
    model = flatten(norm_net(momentum))
    start = model.state.clone()
    results = []
    for served in ((0,), (5, 6, 7, 0)):
        for seed in served:
            if everything:
                model.load(start)
            else:
                model.load_buffers(start[model.layout.parameters :])
            assert counters(model.module) == [0]
            model.module.train()
            gradient = gradient_of(model, loss_of(model.module, *batch(seed)))
            assert counters(model.module) == [1]
        results.append((model.state.clone(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], start)


def test_counters_return_to_what_they_were_and_not_to_zero() -> None:
    module = norm_net()
    module(batch()[0])
    module(batch()[0])
    model = flatten(module)
    model.module(batch()[0])
    model.load_buffers(model.buffers)
    assert counters(model.module) == [2]


@ALL
def test_outputs_are_posterior_and_last_layer_input(name: str) -> None:
    torch.manual_seed(0)
    module = MAKERS[name]()
    module.eval()
    reference = copy.deepcopy(module)
    model = flatten(module)
    batches = [batch(1)[0], batch(2, size=3)[0]]
    posterior, features = model.outputs(batches)
    assert [posterior.dtype.str, features.dtype.str] == ["<f8", "<f8"]
    assert posterior.shape == (8, CLASSES)
    assert features.shape == (8, model.layout.features)

    layer = reference.get_submodule(model.last_layer.name)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        logits = torch.cat([reference(images) for images in batches]).double()
    exponentials = np.exp(logits.numpy())
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(posterior, expected, rtol=1e-6)
    # Weight times features plus bias are the logits, so these are the features.
    again = features @ layer.weight.detach().double().numpy().T
    again += 0 if layer.bias is None else layer.bias.detach().double().numpy()
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)


def test_outputs_leave_no_hook_and_no_graph() -> None:
    model = flatten(norm_net())
    model.outputs([batch()[0]])

    def broken() -> Sequence[torch.Tensor]:
        return [torch.zeros(2, 1, 3, 3)]

    with pytest.raises(RuntimeError):
        model.outputs(broken())
    for module in model.module.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert all(parameter.requires_grad for parameter in model.module.parameters())


class Roundabout(nn.Module):
    """Runs its last layer twice, given by name, on an input with an axis more."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.flatten(1)[:, None]
        self.head(input=2 * inputs)
        logits: torch.Tensor = self.head(input=inputs)
        return logits.view(-1, CLASSES)


def test_outputs_are_of_the_run_that_made_the_logits() -> None:
    model = flatten(Roundabout())
    images = batch()[0]
    posterior, features = model.outputs([images, images])
    assert posterior.shape == (10, CLASSES)
    expected = torch.cat([images, images]).flatten(1).double()
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize("part", ["weight", "buffer"])
def test_other_precisions_are_refused(part: str) -> None:
    module = norm_net()
    if part == "weight":
        module.get_submodule("1").double()
        found = "1.weight is torch.float64"
    else:
        norm = module.get_submodule("2")
        norm.running_mean = norm.get_buffer("running_mean").half()
        found = "2.running_mean is torch.float16"
    last = find_last_layer(norm_net(), SHAPE, CLASSES)
    with pytest.raises(UserError) as caught:
        FlatModel(module, last, CPU)
    assert str(caught.value).startswith(f"model: {found}, expected torch.float32")
    assert str(caught.value).endswith("convert the model with .float()")
