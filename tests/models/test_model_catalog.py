import subprocess
import sys
from pathlib import Path

import pytest

from testbed.errors import UserError
from testbed.models.catalog import (
    ACTIVATIONS,
    MODELS,
    check_input,
    is_import_path,
    model_info,
)


def test_catalog_needs_no_torch() -> None:
    code = "import sys, testbed.models.catalog; sys.exit(3 if 'torch' in sys.modules else 0)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("shape", "features"),
    [((1, 28, 28), 588), ((3, 32, 32), 768), ((3, 218, 178), 29700), ((1, 8, 8), 48)],
)
def test_cnn_features_are_the_papers(shape: tuple[int, int, int], features: int) -> None:
    assert MODELS["cnn"].features(shape) == features


def test_known_parameter_counts() -> None:
    # By hand: 12*26 + 2*12*301 + 10*589; 588*785 + 588*589 + 10*589;
    # PyTorch's tutorial LeNet for 32x32; the published ResNet-20 (269 722 with 64-10) with
    # 64-512-10 in place of 64-10.
    assert MODELS["cnn"].parameters((1, 28, 28), 10) == 312 + 7224 + 5890
    # A scale and a shift for each of three times 12 channels.
    for normed in ("cnn_bn", "cnn_gn"):
        assert MODELS[normed].parameters((1, 28, 28), 10) == 312 + 7224 + 5890 + 72
    assert MODELS["fcnn"].parameters((1, 28, 28), 10) == 461580 + 346332 + 5890
    assert MODELS["lenet"].parameters((1, 32, 32), 10) == 81194
    for name in ("resnet20", "resnet20_gn"):
        assert MODELS[name].parameters((3, 32, 32), 10) == 269722 - 650 + 33280 + 5130


def test_batch_norm_alone_has_statistics() -> None:
    sizes = {name: info.buffers for name, info in MODELS.items() if info.buffers}
    assert sizes == {"cnn_bn": 72, "resnet20": 1376}


@pytest.mark.parametrize("info", MODELS.values(), ids=MODELS)
def test_entries_are_consistent(info) -> None:
    assert MODELS[info.name] is info
    assert info.default_activation in ACTIVATIONS


@pytest.mark.parametrize("info", MODELS.values(), ids=MODELS)
def test_too_small_an_input_is_refused(info) -> None:
    size = info.min_size
    check_input(info, (1, size, size), 2)
    for shape in ((1, size - 1, size), (1, size, size - 1)):
        with pytest.raises(UserError, match=f"at least 1 channel and {size}x{size} pixels"):
            check_input(info, shape, 2)


def test_too_small_an_input_names_models_that_fit() -> None:
    with pytest.raises(
        UserError,
        match=r"'lenet' cannot take images of 1x8x8.*one of cnn, cnn_bn, cnn_gn, fcnn, resnet20, "
        r"resnet20_gn,",
    ):
        check_input(MODELS["lenet"], (1, 8, 8), 10)


def test_no_channel_is_refused() -> None:
    with pytest.raises(UserError, match="0x28x28"):
        check_input(MODELS["cnn"], (0, 28, 28), 10)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="got 1 classes, expected at least 2"):
        check_input(MODELS["cnn"], (1, 28, 28), 1)


def test_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'resnet' .*did you mean .*'resnet20'.*import path"):
        model_info("resnet")


def test_import_paths_are_told_from_names() -> None:
    assert is_import_path("my.models:Net")
    assert not is_import_path("cnn")
