"""Gradients of single samples: equal to a loop with autograd, clipped, averaged."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from testbed.errors import UserError
from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer
from testbed.per_sample import PerSampleGradients, supports

SHAPE, CLASSES, ROWS = (1, 10, 10), 7, 6
# Relative, of float32 in networks of up to twenty layers.
ROUNDING = 2e-5


def flat(module: nn.Module) -> FlatModel:
    return FlatModel(module, find_last_layer(module, SHAPE, CLASSES), torch.device("cpu"))


def paper(name: str) -> FlatModel:
    return flat(
        build(
            name,
            shape=SHAPE,
            classes=CLASSES,
            activation="tanh",
            arguments={},
            init="torch",
            seed=1,
        )
    )


def batch(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, and label distributions that are no single labels."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand((rows, *SHAPE), generator=generator)
    targets = torch.rand((rows, CLASSES), generator=generator) ** 4
    return images, targets / targets.sum(dim=1, keepdim=True)


def single(model: FlatModel, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each sample's gradient [B, P], one by one."""
    rows = []
    for image, target in zip(images, targets, strict=True):
        out = torch.empty(model.layout.parameters)
        logits = model.module(image[None])
        model.gradient(-(target * torch.log_softmax(logits[0], 0)).sum(), out)
        rows.append(out)
    return torch.stack(rows)


def offsets(model: FlatModel) -> NDArray[np.int64]:
    return np.cumsum([0, *(parameter.numel() for parameter in model.module.parameters())])


def clipped_mean(
    gradients: torch.Tensor, bounds: NDArray[np.int64], bound: float
) -> tuple[torch.Tensor, int]:
    """Return the mean by the definition, in double precision, and how many parts were clipped."""
    mean, clipped = torch.zeros(gradients.shape[1], dtype=torch.float64), 0
    for gradient in gradients.double():
        for start, stop in pairwise(bounds):
            part = gradient[start:stop]
            factor = bound / max(bound, float(part.norm()))
            clipped += factor < 1
            mean[start:stop] += factor * part / len(gradients)
    return mean, clipped


def run(
    model: FlatModel, bounds: NDArray[np.int64], bound: float, at_once: int = 1 << 24
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.full((model.layout.parameters,), torch.nan)
    loss, logits = PerSampleGradients(model, at_once).mean_clipped(*batch(), bounds, bound, out)
    return out, loss, logits


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < ROUNDING


def frozen_body() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    module[1].weight.requires_grad_(False)
    return module


def frozen_norm() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(256, CLASSES)
    )
    module[1].eval()
    module[1].running_mean.fill_(0.3)
    return module


class Tied(nn.Module):
    """Uses one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, CLASSES), nn.Linear(CLASSES, 100)
        self.head = nn.Linear(100, CLASSES)
        self.head.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)))))
        logits: torch.Tensor = self.head(hidden)
        return logits


MAKERS = {
    **{name: lambda name=name: paper(name) for name in ("cnn", "lenet", "fcnn", "cnn_gn")},
    "resnet20_gn": lambda: paper("resnet20_gn"),
    "frozen parameter": lambda: flat(frozen_body()),
    "frozen BatchNorm": lambda: flat(frozen_norm()),
    "tied": lambda: flat(Tied()),
}
ALL = pytest.mark.parametrize("name", MAKERS)


@ALL
def test_whole_gradients_are_clipped_as_in_a_loop(name: str) -> None:
    torch.manual_seed(0)
    model = MAKERS[name]()
    gradients = single(model, *batch())
    norms = gradients.norm(dim=1)
    # Between the norms, so that some are clipped and some are not.
    bound = float((norms.min() + norms.max()) / 2)
    bounds = np.array([0, model.layout.parameters])
    expected, clipped = clipped_mean(gradients, bounds, bound)
    assert 0 < clipped < ROWS
    assert_near(run(model, bounds, bound)[0], expected)


@ALL
def test_tensors_are_clipped_as_in_a_loop(name: str) -> None:
    torch.manual_seed(0)
    model = MAKERS[name]()
    gradients = single(model, *batch())
    bounds = offsets(model)
    parts = [gradients[:, start:stop].norm(dim=1) for start, stop in pairwise(bounds)]
    bound = float(torch.stack(parts).median())
    expected, clipped = clipped_mean(gradients, bounds, bound)
    assert 0 < clipped < ROWS * len(parts)
    assert_near(run(model, bounds, bound)[0], expected)


@ALL
def test_without_clipping_it_is_the_batchs_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = MAKERS[name]()
    images, targets = batch()
    out, loss, logits = run(model, np.array([0, model.layout.parameters]), 1e9)
    plain = torch.empty_like(out)
    answers = model.module(images)
    mean = nn.functional.cross_entropy(answers, targets)
    model.gradient(mean, plain)
    assert_near(out, plain)
    assert not loss.requires_grad
    assert not logits.requires_grad
    torch.testing.assert_close(loss, mean.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, answers.detach(), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_get_zeros() -> None:
    model = flat(frozen_body())
    out, _, _ = run(model, np.array([0, model.layout.parameters]), 1.0)
    assert (out[:800] == 0).all()
    assert (out[800:] != 0).any()


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_how_many_samples_run_at_once_changes_nothing_but_rounding(samples: int) -> None:
    model = paper("lenet")
    bounds, parameters = offsets(model), model.layout.parameters
    whole, loss, logits = run(model, bounds, 0.02)
    out, its_loss, its_logits = run(model, bounds, 0.02, samples * parameters)
    assert_near(out, whole)
    torch.testing.assert_close(its_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(its_logits, logits, rtol=1e-5, atol=1e-6)
    # Less than a sample's gradient is one sample's.
    torch.testing.assert_close(
        run(model, bounds, 0.02, 1)[0], run(model, bounds, 0.02, parameters)[0]
    )


def test_no_sample_adds_more_than_the_bound() -> None:
    model = paper("cnn")
    images, targets = batch(1)
    for bounds in (offsets(model), np.array([0, model.layout.parameters])):
        for bound in (1e-4, 1e-2):
            out = torch.empty(model.layout.parameters)
            each = bound / np.sqrt(len(bounds) - 1)
            PerSampleGradients(model).mean_clipped(images, targets, bounds, each, out)
            assert float(out.norm()) <= bound * (1 + 1e-5)
            assert float(out.norm()) > 0.5 * bound


def test_values_loaded_later_are_used() -> None:
    model = paper("lenet")
    gradients = PerSampleGradients(model)
    bounds = np.array([0, model.layout.parameters])
    out, fresh = (torch.empty(model.layout.parameters) for _ in range(2))
    gradients.mean_clipped(*batch(), bounds, 1.0, out)
    model.load(model.state * 0.5)
    gradients.mean_clipped(*batch(), bounds, 1.0, out)
    PerSampleGradients(model).mean_clipped(*batch(), bounds, 1.0, fresh)
    torch.testing.assert_close(out, fresh, rtol=0, atol=0)
    expected, _ = clipped_mean(single(model, *batch()), bounds, 1.0)
    assert_near(out, expected)


def test_dropout_draws_for_each_sample_and_by_torchs_seed() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(100, CLASSES, bias=False))
    model = flat(module)
    # The same image again and again: its gradient is 0 where it was dropped.
    image = torch.ones((1, *SHAPE))
    target = torch.eye(CLASSES)[:1]
    bounds = np.array([0, model.layout.parameters])

    def dropped(rows: int, seed: int) -> float:
        torch.manual_seed(seed)
        out = torch.empty(model.layout.parameters)
        PerSampleGradients(model).mean_clipped(
            image.expand(rows, *SHAPE), target.expand(rows, CLASSES), bounds, 1.0, out
        )
        return float((out.view(CLASSES, 100)[0] == 0).float().mean())

    assert abs(dropped(1, 0) - 0.5) < 0.25
    # With one mask for all samples, half would still be zero.
    assert dropped(16, 0) < 0.05
    torch.manual_seed(5)
    one = run(model, bounds, 1.0)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(run(model, bounds, 1.0)[0], one, rtol=0, atol=0)


NORMS = {
    "BatchNorm2d": nn.BatchNorm2d(4),
    "without statistics": nn.BatchNorm2d(4, track_running_stats=False).eval(),
    "InstanceNorm2d": nn.InstanceNorm2d(4, track_running_stats=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_layers_that_mix_samples_are_refused(name: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), NORMS[name], nn.Flatten(), nn.Linear(256, CLASSES))
    assert "layer '1' is" in supports(module)
    model = flat(module)
    with pytest.raises(UserError, match="defence 'dp_sgd' needs gradients of single samples"):
        run(model, np.array([0, model.layout.parameters]), 1.0)


def test_the_refusal_of_batchnorm_names_both_ways_out() -> None:
    reason = supports(paper("cnn_bn").module)
    assert "GroupNorm" in reason
    assert "federation.batch_norm: frozen" in reason
    assert supports(paper("cnn_bn").module.eval()) == ""
    assert supports(paper("cnn_gn").module) == ""


class Branching(nn.Module):
    """Does what depends on values, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(100, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.flatten(1)
        logits: torch.Tensor = self.head(-values if values.sum() < 0 else values)
        return logits


def test_a_module_that_vmap_cannot_run_is_refused() -> None:
    model = flat(Branching())
    with pytest.raises(UserError, match=r"cannot take of this model: .*; change the layer"):
        run(model, np.array([0, model.layout.parameters]), 1.0)
