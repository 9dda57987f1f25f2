from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from testbed.errors import UserError
from testbed.models.build import build
from testbed.models.catalog import MODELS
from testbed.models.last_layer import LastLayer, find_last_layer

SHAPE = (1, 4, 4)


class Net(nn.Module):
    """Two linear layers, the last defined first, a spare one, and a function for the output.

    The function reads the features h and the logits z from the network.
    """

    def __init__(
        self,
        finish: Callable[["Net"], object] = attrgetter("z"),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3, bias=bias)
        self.body = nn.Linear(16, 8)
        self.spare = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.9)
        self.finish = finish

    def forward(self, x: torch.Tensor) -> object:
        self.h = torch.relu(self.body(x.flatten(1)))
        self.z = self.head(self.h)
        return self.finish(self)


HEAD = LastLayer(name="head", weight="head.weight", bias="head.bias", classes=3, features=8)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_built_in_models(name: str, shape: tuple[int, int, int]) -> None:
    module = build(
        name, shape=shape, classes=7, activation=None, arguments={}, init="uniform", seed=0
    )
    assert find_last_layer(module, shape, 7) == LastLayer(
        name="classifier",
        weight="classifier.weight",
        bias="classifier.bias",
        classes=7,
        features=MODELS[name].features(shape),
    )


@pytest.mark.parametrize(
    "finish",
    [
        attrgetter("z"),
        lambda net: net.z.view(-1, 3),
        lambda net: net.z.unsqueeze(1).squeeze(1),
        lambda net: net.drop(net.z),
        lambda net: nn.Identity()(net.z),
        lambda net: (net.spare(net.h), net.z)[1],
    ],
    ids=["plain", "view", "squeeze", "dropout", "identity", "auxiliary head runs later"],
)
def test_execution_decides_not_definition(finish) -> None:
    assert find_last_layer(Net(finish), SHAPE, 3) == HEAD


def test_a_residual_body_before_the_head() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 3)
            self.block = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            out: torch.Tensor = self.head(x + self.block(x))
            return out

    assert find_last_layer(Residual(), SHAPE, 3).name == "head"


def test_a_layer_without_bias() -> None:
    found = find_last_layer(Net(bias=False), SHAPE, 3)
    assert found.bias is None
    assert found.weight == "head.weight"


def test_a_sequence_head_with_a_view() -> None:
    module = nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), nn.Flatten())
    assert find_last_layer(module, SHAPE, 3).name == "1"


@pytest.mark.parametrize(
    "finish",
    [
        lambda net: torch.softmax(net.z, 1),
        lambda net: functional.log_softmax(net.z, 1),
        lambda net: torch.relu_(net.z),
        lambda net: net.z.view(-1).mul_(0.5).view(-1, 3),
        lambda net: net.z.flip(1),
        lambda net: net.z + net.h[:, :3],
    ],
    ids=["softmax", "log_softmax", "in place", "in place on a view", "reordered", "residual head"],
)
def test_something_after_the_layer_is_refused(finish) -> None:
    with pytest.raises(UserError, match=r"'head' ran last.*softmax belongs.*`model.last_layer`"):
        find_last_layer(Net(finish), SHAPE, 3)


@pytest.mark.parametrize(
    "finish",
    [lambda z: z.view(-1, 2)[:2], lambda z: z.view(2, -1)[:, :2]],
    ids=["first rows", "first columns"],
)
def test_a_part_of_the_layers_output_is_refused(finish) -> None:
    net = Net(lambda net: finish(net.z))
    net.head = nn.Linear(8, 4)
    with pytest.raises(UserError, match="'head' ran last"):
        find_last_layer(net, SHAPE, 2)


def test_transposed_logits_are_refused() -> None:
    net = Net(lambda net: net.z.T)
    net.head = nn.Linear(8, 2)
    with pytest.raises(UserError, match="'head' ran last"):
        find_last_layer(net, SHAPE, 2)


def test_the_layer_that_ran_last_is_named_in_the_error() -> None:
    with pytest.raises(UserError, match="'spare' ran last"):
        find_last_layer(Net(lambda net: net.z + net.spare(net.h)), SHAPE, 3)


def test_a_named_layer_may_be_followed_by_something() -> None:
    assert find_last_layer(Net(lambda net: torch.softmax(net.z, 1)), SHAPE, 3, "head") == HEAD


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("haed", "'haed' is not in the model: did you mean 'head'"),
        ("drop", "'drop' is Dropout, expected torch.nn.Linear"),
        ("spare", "'spare' does not run in the forward pass"),
        ("body", "'body' has 8 outputs, expected 3"),
    ],
)
def test_an_unfit_named_layer(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_last_layer(Net(), SHAPE, 3, name)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Net(lambda net: (net.z, net.h)), r"returned tuple, expected a tensor of logits \[n, 3\]"),
        (Net(lambda net: net.h), r"1x4x4 to an output of \[2, 8\], expected \[2, 3\]"),
        (Net(lambda net: net.z.sum()), r"to an output of \[\], expected \[2, 3\]"),
        (nn.Linear(5, 3), "cannot run on 2 images of 1x4x4: RuntimeError"),
        (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), "ran no torch.nn.Linear"),
    ],
    ids=["tuple", "classes", "scalar", "shape", "no linear"],
)
def test_an_unfit_model(module: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_last_layer(module, SHAPE, 3)
    assert "\n" not in str(caught.value)


def test_a_shared_module_has_its_first_name() -> None:
    layer = nn.Linear(16, 16)
    module = nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer)
    expected = LastLayer("1", "1.weight", "1.bias", 16, 16)
    assert find_last_layer(module, SHAPE, 16) == expected
    by_name = find_last_layer(module, SHAPE, 16, "3")
    assert (by_name.name, by_name.weight, by_name.bias) == ("3", "1.weight", "1.bias")


def test_a_tied_weight_has_its_first_owners_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    module[3].weight = module[1].weight
    found = find_last_layer(module, SHAPE, 16)
    assert (found.name, found.weight, found.bias) == ("3", "1.weight", "3.bias")
    assert found.weight in dict(module.named_parameters())


def test_a_computed_weight_is_refused() -> None:
    net = Net()
    parametrizations.weight_norm(net.head)
    with pytest.raises(UserError, match="weight of the last layer 'head' is computed"):
        find_last_layer(net, SHAPE, 3)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_frozen_last_layer_is_refused(part: str) -> None:
    net = Net()
    net.get_parameter(f"head.{part}").requires_grad_(False)
    with pytest.raises(UserError, match=f"the {part} of the last layer 'head' is frozen"):
        find_last_layer(net, SHAPE, 3)


class Restless(nn.Module):
    """Changes its buffers and the random state, even in evaluation mode."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(16, 3)
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("changed", torch.zeros(1))
        self.fail = fail
        self.saw_training: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.saw_training.append(self.training)
        self.replaced = self.replaced + 1
        self.changed.add_(1)
        torch.rand(1)
        if self.fail:
            raise ValueError("no")
        out: torch.Tensor = self.head(self.norm(x).flatten(1))
        return out


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail: bool) -> None:
    module = Restless(fail)
    module.norm.eval()
    buffers = dict(module.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    state = torch.get_rng_state()
    if fail:
        with pytest.raises(UserError, match="ValueError: no"):
            find_last_layer(module, SHAPE, 3)
    else:
        find_last_layer(module, SHAPE, 3)
    assert module.saw_training == [False]
    assert (module.training, module.norm.training, module.head.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.head._forward_hooks
    for name, buffer in module.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name])


@pytest.mark.parametrize("init", ["uniform", "torch"])
def test_gradient_of_the_found_layer_has_the_closed_form(init: str) -> None:
    shape, classes, size = (1, 28, 28), 10, 16
    module = build(
        "cnn", shape=shape, classes=classes, activation=None, arguments={}, init=init, seed=3
    )
    found = find_last_layer(module, shape, classes)
    inputs: list[torch.Tensor] = []
    module.get_submodule(found.name).register_forward_hook(
        lambda *call: inputs.append(call[1][0].detach())
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, *shape, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    logits = module(images)
    functional.cross_entropy(logits, labels).backward()
    error = logits.detach().softmax(1) - functional.one_hot(labels, classes)
    weight = module.get_parameter(found.weight)
    assert inputs[0].shape == (size, found.features)
    torch.testing.assert_close(weight.grad, error.T @ inputs[0] / size, atol=1e-6, rtol=0)
    assert found.bias is not None
    bias = module.get_parameter(found.bias)
    torch.testing.assert_close(bias.grad, error.mean(0), atol=1e-6, rtol=0)
