"""Scores of features: equal to one backward pass per feature, and nothing is left behind."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from testbed.models.build import build
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer
from testbed.soteria import feature_scores

SHAPE, CLASSES = (1, 10, 10), 7


def flat(module: nn.Module) -> FlatModel:
    return FlatModel(module, find_last_layer(module, SHAPE, CLASSES), torch.device("cpu"))


def paper(name: str) -> FlatModel:
    return flat(
        build(
            name, shape=SHAPE, classes=CLASSES, activation=None, arguments={}, init="torch", seed=1
        )
    )


def images(rows: int = 5) -> torch.Tensor:
    return torch.rand((rows, *SHAPE), generator=torch.Generator().manual_seed(4))


def one_by_one(body: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the scores as the authors' code computes them, a backward pass per feature."""
    graph_inputs = inputs.clone().requires_grad_()
    features = body(graph_inputs)
    norms = torch.zeros_like(features)
    for f in range(features.shape[1]):
        target = torch.zeros_like(features)
        target[:, f] = 1
        graph_inputs.grad = None
        features.backward(target, retain_graph=True)
        assert graph_inputs.grad is not None
        moved = graph_inputs.grad.reshape(len(inputs), -1).norm(dim=1)
        norms[:, f] = moved / (features[:, f].detach() + 0.1)
    return norms.sum(dim=0).detach()


def test_scores_of_linear_features_have_their_closed_form() -> None:
    body = nn.Linear(100, 9)
    model = flat(nn.Sequential(nn.Flatten(), body, nn.Linear(9, CLASSES)))
    inputs = images()
    scores = feature_scores(model, inputs)
    features = body(inputs.flatten(1)).detach()
    expected = (body.weight.detach().norm(dim=1) / (features + 0.1)).sum(dim=0)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["cnn", "cnn_bn", "lenet", "fcnn"])
def test_scores_equal_a_backward_pass_per_feature(name: str, mode: str) -> None:
    model = paper(name)
    model.module.train(mode == "train")
    body = copy.deepcopy(model.module)
    body.classifier = nn.Identity()
    expected = one_by_one(body, images())
    assert expected.std() > 0
    # As a share of the largest: a feature near -0.1 divides by almost nothing.
    for at_once in (1, 3000, 1 << 22):
        scores = feature_scores(model, images(), at_once)
        assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_and_torchs_random_state_are_left_as_they_were(mode: str) -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(100, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, CLASSES)
    )
    model = flat(module)
    module.train(mode == "train")
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    feature_scores(model, images())
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    for name, values in module.state_dict().items():
        torch.testing.assert_close(values, state[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training is (mode == "train")


def test_dropout_before_the_features_is_that_of_the_step_that_follows() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(100, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES)
    )
    model = flat(module)
    module.train()
    torch.manual_seed(8)
    scores = feature_scores(model, images(1))
    with torch.no_grad():
        dropped = module[:3](images(1))[0] == 0
    assert 0 < dropped.sum() < 40
    np.testing.assert_array_equal((scores == 0).numpy(), dropped.numpy())
