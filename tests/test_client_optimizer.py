"""The local optimiser against `torch.optim.SGD`, and FedProx against its closed form."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from testbed.client_optimizer import LocalOptimizer

# No multiple of a vector register: the tails of loops count too.
SIZE = 1003


def vectors(seed: int, count: int, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def run(
    optimizer: LocalOptimizer, start: torch.Tensor, gradients: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the parameters after steps with given gradients, and the directions."""
    parameters = start.clone()
    optimizer.begin(parameters)
    directions = []
    for gradient in gradients:
        direction = optimizer.direction(gradient.clone(), parameters)
        directions.append(direction.clone())
        optimizer.step(parameters, direction)
    return parameters, directions


def run_torch(start: torch.Tensor, gradients: list[torch.Tensor], **values: float) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    reference = torch.optim.SGD([parameter], **values)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        reference.step()
    return parameter.detach()


SETTINGS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.01},
    {"momentum": 0.5, "weight_decay": 0.1},
]


@pytest.mark.parametrize("values", SETTINGS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_are_those_of_torch_bitwise(values: dict[str, float], steps: int) -> None:
    start, *gradients = vectors(0, steps + 1)
    found, _ = run(LocalOptimizer(0.1, **values), start, gradients)
    assert torch.equal(run_torch(start, gradients, lr=0.1, **values), found)
    assert not torch.equal(found, start)


def test_training_is_that_of_torch() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    images, labels = torch.randn(4, 16, 12), torch.randint(5, (4, 16))

    def gradient(batch: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(module(images[batch]), labels[batch])
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]
        )

    optimizer = LocalOptimizer(0.5, momentum=0.9, weight_decay=1e-3)
    reference = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    optimizer.begin(flat)
    for batch in range(4):
        optimizer.step(flat, optimizer.direction(gradient(batch), flat))
        reference.zero_grad()
        nn.functional.cross_entropy(module(images[batch]), labels[batch]).backward()
        reference.step()
        expected = torch.cat([p.detach().flatten() for p in module.parameters()])
        torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-7)


def test_plain_gradient_stays_as_it_is() -> None:
    parameters, gradient = vectors(1, 2)
    kept = gradient.clone()
    optimizer = LocalOptimizer(0.1)
    optimizer.begin(parameters)
    for _ in range(2):
        direction = optimizer.direction(gradient, parameters)
        assert direction is gradient
        assert torch.equal(gradient, kept)


@pytest.mark.parametrize("values", [*SETTINGS, {"proximal": 1.0, "momentum": 0.9}])
def test_sum_of_directions_is_the_change_of_the_parameters(values: dict[str, float]) -> None:
    start, *gradients = vectors(2, 9)
    end, directions = run(LocalOptimizer(0.05, **values), start, gradients)
    torch.testing.assert_close(
        torch.stack(directions).sum(dim=0), (start - end) / 0.05, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("values", SETTINGS)
def test_without_proximal_term_fedprox_is_plain_bitwise(values: dict[str, float]) -> None:
    start, *gradients = vectors(3, 7)
    plain, _ = run(LocalOptimizer(0.1, **values), start, gradients)
    zero, _ = run(LocalOptimizer(0.1, proximal=0.0, **values), start, gradients)
    some, directions = run(LocalOptimizer(0.1, proximal=0.5, **values), start, gradients)
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, some)
    # At the global model itself, the term is nothing.
    _, without = run(LocalOptimizer(0.1, **values), start, gradients[:1])
    assert torch.equal(directions[0], without[0])


@given(
    steps=st.integers(1, 60),
    rate=st.floats(0.01, 0.5),
    mu=st.floats(0.01, 2.0),
    seed=st.integers(0, 99),
)
def test_fedprox_has_its_closed_form(steps: int, rate: float, mu: float, seed: int) -> None:
    # With a constant gradient g, w_t - w0 = -g (1 - (1 - rate mu)^t) / mu.
    start, gradient = vectors(seed, 2, 8)
    end, _ = run(LocalOptimizer(rate, proximal=mu), start, [gradient] * steps)
    expected = start.double() - gradient.double() * (1 - (1 - rate * mu) ** steps) / mu
    torch.testing.assert_close(end.double(), expected, rtol=1e-4, atol=1e-4)


def test_fedprox_finds_the_minimum_of_its_objective() -> None:
    # |w - a|^2 / 2 + mu |w - w0|^2 / 2 is least at (a + mu w0) / (1 + mu).
    start, target = vectors(4, 2)
    parameters = start.clone()
    optimizer = LocalOptimizer(0.2, momentum=0.5, proximal=3.0)
    optimizer.begin(parameters)
    for _ in range(200):
        optimizer.step(parameters, optimizer.direction(parameters - target, parameters))
    torch.testing.assert_close(parameters, (target + 3 * start) / 4, rtol=1e-5, atol=1e-5)


def test_constant_gradient_builds_up_momentum_as_a_geometric_series() -> None:
    start, gradient = vectors(5, 2)
    _, directions = run(LocalOptimizer(0.1, momentum=0.5), start, [gradient] * 5)
    for step, direction in enumerate(directions):
        torch.testing.assert_close(direction, gradient * (2 - 0.5**step))


def test_a_client_begins_without_what_another_left() -> None:
    optimizer = LocalOptimizer(0.1, momentum=0.9, proximal=0.1)
    first, other, *gradients = vectors(6, 6)
    expected, _ = run(optimizer, first, gradients)
    run(optimizer, other, gradients)
    run(optimizer, other[:10], [gradient[:10] for gradient in gradients])
    again, _ = run(optimizer, first, gradients)
    assert torch.equal(expected, again)


def test_directions_may_be_changed_by_whoever_gets_them() -> None:
    start, *gradients = vectors(7, 5)
    _, expected = run(LocalOptimizer(0.1, momentum=0.9), start, gradients)
    optimizer = LocalOptimizer(0.1, momentum=0.9)
    optimizer.begin(start)
    for gradient, direction in zip(gradients, expected, strict=True):
        found = optimizer.direction(gradient.clone(), start)
        assert torch.equal(found, direction)
        found.zero_()


def test_the_global_model_is_copied() -> None:
    start, gradient = vectors(8, 2)
    optimizer = LocalOptimizer(0.1, proximal=2.0)
    parameters = start.clone()
    optimizer.begin(parameters)
    parameters.add_(1.0)
    direction = optimizer.direction(gradient.clone(), parameters)
    torch.testing.assert_close(direction, gradient + 2.0, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    start, *gradients = vectors(9, 6)
    optimizer = LocalOptimizer(0.1, momentum=0.9, weight_decay=0.01, proximal=0.5)
    expected, _ = run(optimizer, start, gradients)
    found, _ = run(optimizer, start.cuda(), [gradient.cuda() for gradient in gradients])
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate: inf"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "momentum: 1.0"),
        ({"learning_rate": 0.1, "momentum": -0.1}, "momentum: -0.1"),
        ({"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay: -1.0"),
        ({"learning_rate": 0.1, "proximal": float("nan")}, "proximal: nan"),
    ],
)
def test_numbers_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}; expected"):
        LocalOptimizer(**values)
