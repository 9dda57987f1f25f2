import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from testbed.errors import UserError
from testbed.models.build import build, initialise_uniform
from testbed.models.catalog import INITS, MODELS

SHAPE = (1, 28, 28)

SOURCE = """
import sys
import torch
from torch import nn

SIZE = 3

class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(784, 784)
        self.b = nn.Linear(784, 784)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.zeros(3))

def double():
    return Net().double()

def half_norm():
    return nn.Sequential(Net(), nn.BatchNorm1d(10).half())

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def meta():
    return nn.Linear(784, 10, device="meta")

def number():
    return 7

def nothing():
    return nn.ReLU()

def broken():
    raise ValueError("two\\nlines")

def leaves():
    sys.exit("gone")

def late():
    import user_neighbour
    return user_neighbour.make()
"""


def make(name: str = "cnn", **changes: Any) -> nn.Module:
    options: dict[str, Any] = {
        "shape": SHAPE,
        "classes": 10,
        "activation": None,
        "arguments": {},
        "init": "uniform",
        "seed": 1,
    }
    return build(name, **(options | changes))


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in module.named_parameters()])


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's module into the current directory, which is not yet on the path."""
    (tmp_path / "user_nets.py").write_text(SOURCE)
    (tmp_path / "user_neighbour.py").write_text("from user_nets import Net\nmake = Net\n")
    (tmp_path / "user_bad.py").write_text("import no_such_dependency\n")
    (tmp_path / "user_syntax.py").write_text("def f(:\n")
    (tmp_path / "user_script.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("user_nets", "user_neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "user_nets"


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_weights(name: str, init: str) -> None:
    first = flat(make(name, init=init))
    torch.rand(3)
    assert torch.equal(first, flat(make(name, init=init)))
    assert not torch.equal(first, flat(make(name, init=init, seed=2)))


@pytest.mark.parametrize("init", INITS)
def test_global_random_state_is_untouched(init: str, user_module: str) -> None:
    state = torch.get_rng_state()
    make(init=init)
    make(f"{user_module}:Net", init=init)
    with pytest.raises(UserError):
        make(f"{user_module}:broken")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_uniform_fills_every_parameter(name: str) -> None:
    for key, parameter in make(name).named_parameters():
        assert -0.5 <= parameter.min() <= parameter.max() < 0.5, key
        # BatchNorm's ones and zeros would stay equal.
        assert parameter.unique().numel() > 1, key
    values = flat(make(name))
    assert values.mean().abs() < 0.02
    assert values.var().item() == pytest.approx(1 / 12, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_one_flat_tensor_gets_the_same_bits(name: str) -> None:
    module = make(name, seed=2**64 - 1)
    filled = torch.full_like(flat(module), torch.nan)
    initialise_uniform(filled, 2**64 - 1)
    assert torch.equal(filled, flat(module))


def test_a_tied_weight_is_drawn_once(user_module: str) -> None:
    module = make(f"{user_module}:Tied")
    filled = torch.empty(784 * 784 + 2 * 784)
    initialise_uniform(filled, 1)
    assert torch.equal(filled, flat(module))
    assert not module.get_buffer("mean").any()


def test_torch_init_is_the_modules_own() -> None:
    module = make("resnet20", init="torch")
    assert torch.equal(module.get_parameter("norm.weight"), torch.ones(16))
    assert module.get_parameter("hidden.weight").abs().max() <= 64**-0.5
    assert make("resnet20", init="uniform").get_parameter("norm.weight").min() < 0.5


def test_activation_defaults_to_the_papers_and_can_be_chosen() -> None:
    assert any(isinstance(m, nn.Sigmoid) for m in make("cnn").modules())
    assert any(isinstance(m, nn.SELU) for m in make("cnn", activation="selu").modules())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cn", {}, "did you mean 'cnn'"),
        ("cnn", {"activation": "rely"}, "activation 'rely' is unknown: did you mean 'relu'"),
        ("cnn", {"init": "unifrom"}, "initialisation 'unifrom' is unknown: .*'uniform'"),
        ("cnn", {"arguments": {"width": 3}}, "takes no arguments, found width"),
        ("lenet", {"shape": (1, 8, 8)}, "'lenet' cannot take images of 1x8x8"),
    ],
)
def test_mistakes_with_built_in_models(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **changes)


def test_import_path_is_called_with_its_arguments(user_module: str) -> None:
    module = make(f"{user_module}:Net", arguments={"width": 6})
    assert module.get_parameter("1.weight").shape == (6, 784)


def test_import_path_can_import_its_neighbours_late(user_module: str) -> None:
    assert make(f"{user_module}:late").get_parameter("3.bias").shape == (10,)


def test_current_directory_is_added_to_the_path_once(user_module: str) -> None:
    before = list(sys.path)
    make(f"{user_module}:Net")
    make(f"{user_module}:Net")
    assert sys.path == [str(Path.cwd()), *before]


@pytest.mark.parametrize("init", INITS)
def test_a_library_function_is_a_model(init: str) -> None:
    arguments = {"in_features": 4, "out_features": 2}
    module = make("torch.nn:Linear", arguments=arguments, init=init)
    assert torch.equal(flat(module), flat(make("torch.nn:Linear", arguments=arguments, init=init)))


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("user_nets:", {}, "not an import path: expected 'package.module:callable'"),
        (":Net", {}, "not an import path"),
        (".user_nets:Net", {}, "not an import path"),
        ("no_such_module:Net", {}, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("user_bad:Net", {}, "cannot import 'user_bad': .*'no_such_dependency'"),
        ("user_syntax:Net", {}, "SyntaxError"),
        ("user_script:Net", {}, "SystemExit: 3"),
        ("user_nets:Nets", {}, "has no 'Nets': did you mean 'Net'"),
        ("torch.nn:Linaer", {}, "has no 'Linaer': did you mean 'Linear'"),
        ("torch.nn:qqqqqqqq", {}, "has no 'qqqqqqqq': name one that it has"),
        ("user_nets:SIZE", {}, "is int, expected something to call"),
        ("user_nets:broken", {}, "raised ValueError: two lines; mend"),
        ("user_nets:leaves", {}, "raised SystemExit: gone"),
        ("user_nets:Net", {"arguments": {"wdth": 3}}, r"\(wdth=3\) raised TypeError: .*'wdth'"),
        ("user_nets:number", {}, "returned int, expected a torch.nn.Module"),
        ("user_nets:nothing", {}, "has no parameters"),
        ("user_nets:double", {}, r"'1.weight' is torch.float64, expected torch.float32"),
        ("user_nets:half_norm", {}, r"'1.weight' is torch.float16"),
        ("user_nets:lazy", {}, "'1.weight' has no shape yet"),
        ("user_nets:meta", {}, "'weight' is on meta, expected cpu"),
        ("user_nets:Net", {"activation": "relu"}, "'relu' was given with model"),
    ],
)
def test_mistakes_with_import_paths(
    user_module: str, path: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(path, **changes)
    assert "\n" not in str(caught.value)


def test_a_missing_name_in_a_large_library_lists_only_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        make("torch.nn:Linaer")
    assert len(str(caught.value)) < 200


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bits_and_keeps_its_random_state() -> None:
    state = torch.cuda.get_rng_state()
    expected = flat(make())
    filled = torch.empty_like(expected, device="cuda")
    initialise_uniform(filled, 1)
    assert torch.equal(filled.cpu(), expected)
    assert torch.equal(torch.cuda.get_rng_state(), state)
