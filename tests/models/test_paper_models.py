import pytest
import torch
from torch import nn

from testbed.models.catalog import ACTIVATIONS, MODELS
from testbed.models.paper import ACTIVATION_MODULES, MODULES, ResidualBlock

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 19, 12)]
CASES = [
    (name, shape)
    for name, info in MODELS.items()
    for shape in SHAPES
    if min(shape[1:]) >= info.min_size
] + [("cnn", (3, 218, 178))]


def make(name: str, shape: tuple[int, int, int], classes: int, activation: str) -> nn.Module:
    return MODULES[name](shape, classes, ACTIVATION_MODULES[activation])


def test_modules_and_catalog_name_the_same_things() -> None:
    assert set(MODULES) == set(MODELS)
    assert tuple(ACTIVATION_MODULES) == ACTIVATIONS


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_sizes_are_the_catalogs(name: str, shape: tuple[int, int, int], classes: int) -> None:
    module = make(name, shape, classes, "relu")
    info = MODELS[name]
    assert sum(p.numel() for p in module.parameters()) == info.parameters(shape, classes)
    floats = [buffer.numel() for buffer in module.buffers() if buffer.is_floating_point()]
    assert sum(floats) == info.buffers
    assert module.get_submodule("classifier").in_features == info.features(shape)
    assert module(torch.zeros(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize("info", MODELS.values(), ids=MODELS)
def test_smallest_input_trains_with_one_image(info) -> None:
    module = make(info.name, (1, info.min_size, info.min_size), 3, "relu")
    module(torch.ones(1, 1, info.min_size, info.min_size)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cnn", 3),
        ("cnn_bn", 3),
        ("cnn_gn", 3),
        ("fcnn", 2),
        ("lenet", 4),
        ("resnet20", 19),
        ("resnet20_gn", 19),
    ],
)
def test_activation_replaces_every_activation(name: str, count: int, activation: str) -> None:
    kinds = [type(m) for m in make(name, (1, 28, 28), 10, activation).modules()]
    known = set(ACTIVATION_MODULES.values())
    assert [kind for kind in kinds if kind in known] == [ACTIVATION_MODULES[activation]] * count


@pytest.mark.parametrize("name", MODELS)
def test_activations_change_the_output(name: str) -> None:
    outputs = []
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for activation in ACTIVATIONS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make(name, (1, 28, 28), 10, activation).eval()
        outputs.append(module(images))
    assert len(torch.unique(torch.stack(outputs), dim=0)) == len(ACTIVATIONS)


def test_cnn_features_are_the_sigmoids_outputs() -> None:
    module = make("cnn", (1, 28, 28), 10, "sigmoid")
    features = module[:-1](torch.rand(4, 1, 28, 28))
    assert features.shape == (4, 588)
    assert ((features > 0) & (features < 1)).all()


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("cnn", nn.BatchNorm2d, 0),
        ("cnn_bn", nn.BatchNorm2d, 3),
        ("cnn_gn", nn.GroupNorm, 3),
        ("resnet20", nn.BatchNorm2d, 19),
        ("resnet20_gn", nn.GroupNorm, 19),
    ],
)
def test_normalisation_follows_every_convolution(
    name: str, kind: type[nn.Module], count: int
) -> None:
    modules = [
        module
        for module in make(name, (3, 32, 32), 10, "relu").modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm))
    ]
    norms = [module for module in modules if not isinstance(module, nn.Conv2d)]
    assert [type(norm) for norm in norms] == [kind] * count
    if norms:
        for convolution, norm in zip(modules[::2], modules[1::2], strict=True):
            assert norm.weight.shape == (convolution.out_channels,)


@pytest.mark.parametrize("name", ["cnn_gn", "resnet20_gn"])
def test_group_norm_treats_every_image_by_itself(name: str) -> None:
    module = make(name, (1, 28, 28), 10, "relu")
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([module(image[None]) for image in images])
    torch.testing.assert_close(module(images), alone, rtol=1e-4, atol=1e-5)


def test_batch_norm_mixes_the_images() -> None:
    module = make("cnn_bn", (1, 28, 28), 10, "relu")
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([module(image[None]) for image in images])
    assert not torch.allclose(module(images), alone, rtol=1e-3, atol=1e-3)


def test_resnet_features_can_be_negative() -> None:
    module = make("resnet20", (1, 28, 28), 10, "relu")
    assert (module[:-1](torch.rand(4, 1, 28, 28)) < 0).any()


def test_resnet_stages_halve_the_size_and_double_the_channels() -> None:
    module = make("resnet20", (3, 32, 32), 10, "relu")
    x = torch.rand(2, 3, 32, 32)
    shapes = []
    for name, child in module.named_children():
        x = child(x)
        shapes += [tuple(x.shape[1:])] if name.startswith("stage") else []
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_shortcut_takes_every_second_pixel_and_pads_the_channels() -> None:
    block = ResidualBlock(16, 32, 2, nn.ReLU).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 7, 6, generator=torch.Generator().manual_seed(0))
    out = block(x)
    assert out.shape == (2, 32, 4, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
