"""The root's optimisers: from the clients' mean update to the next global model.

NumPy only, block by block. Every element is the result of the same single roundings on any machine
and for any number of threads, which fused multiplications would not give.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError, suggest

Vector = NDArray[np.float32]

SERVER_OPTIMIZERS = ("sgd", "momentum", "adam")

# Elements of a block: it and its scratch stay in a core's cache.
_BLOCK = 1 << 15


class ServerOptimizer(Protocol):
    """Makes the next global model from the present one and the pseudo-gradient."""

    def step(self, before: Vector, delta: Vector, out: Vector) -> None:
        """Write the next model.

        Parameters
        ----------
        before
            float32 [P]: the parameters of the present model.
        delta
            float32 [P]: the pseudo-gradient, the mean update times the clients' learning rate; the
            model moves against it.
        out
            float32 [P]: receives the next parameters. It may be ``before`` or ``delta``.

        Raises
        ------
        ValueError
            If a vector is not of the length that the optimiser was made for.
        """

    def state(self) -> dict[str, Vector]:
        """Return a copy of what it carries from step to step, float32 [P] each."""

    def restore(self, state: Mapping[str, Vector]) -> None:
        """Go on from what `state` returned.

        `ValueError` if that came from an optimiser of another kind or length.
        """


def make_server_optimizer(
    kind: str,
    *,
    learning_rate: float,
    momentum: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    size: int,
) -> ServerOptimizer:
    """Return an optimiser of the root, before its first step.

    Parameters
    ----------
    kind
        ``"sgd"``: ``w -= lr * delta``; with a learning rate of 1, plain averaging (McMahan et al.,
        AISTATS 2017). ``"momentum"``: ``v = momentum * v + delta; w -= lr * v`` (FedAvgM, Hsu et
        al. 2019). ``"adam"``: FedAdam (Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
        algorithm 2): ``m = beta1 * m + (1 - beta1) * delta; v = beta2 * v + (1 - beta2) *
        delta^2; w -= lr * m / (sqrt(v) + epsilon)``, without a correction of bias, from m = 0 and
        v = epsilon^2, the least that the algorithm allows.
    learning_rate
        lr of the server, > 0.
    momentum
        In [0, 1); used by ``"momentum"``.
    beta1, beta2
        In [0, 1); used by ``"adam"``.
    epsilon
        The paper's tau, > 0: how adaptive it is; used by ``"adam"``.
    size
        P.

    Raises
    ------
    UserError
        If the kind is unknown.
    ValueError
        If a number that the kind uses is out of range.
    """
    if kind not in SERVER_OPTIMIZERS:
        known = suggest(kind, SERVER_OPTIMIZERS)
        raise UserError(f"federation.server.optimizer: unknown kind {kind!r}; {known}")
    _check_positive("learning_rate", learning_rate)
    if kind == "sgd":
        return _Sgd(learning_rate, size)
    if kind == "momentum":
        _check_decay("momentum", momentum)
        return _Momentum(learning_rate, momentum, size)
    _check_decay("beta1", beta1)
    _check_decay("beta2", beta2)
    _check_positive("epsilon", epsilon)
    return _Adam(learning_rate, beta1, beta2, epsilon, size)


class _Blockwise(ABC):
    """Walks over the vectors and keeps the moments, which are float32 [P] by name."""

    def __init__(self, learning_rate: float, size: int, **moments: float) -> None:
        self._learning_rate = learning_rate
        self._size = size
        self._moments = {
            name: np.full(size, initial, np.float32) for name, initial in moments.items()
        }
        self._scratch = np.empty((2, min(size, _BLOCK)), np.float32)

    def step(self, before: Vector, delta: Vector, out: Vector) -> None:
        shapes = [vector.shape for vector in (before, delta, out)]
        if shapes != [(self._size,)] * 3:
            raise ValueError(f"expected three vectors of length {self._size}; got {shapes}")
        for block in self._blocks():
            scratch = self._scratch[:, : block.stop - block.start]
            descent = self._descent(block, delta[block], scratch)
            np.multiply(descent, self._learning_rate, out=scratch[0])
            np.subtract(before[block], scratch[0], out=out[block])

    def state(self) -> dict[str, Vector]:
        return {name: moment.copy() for name, moment in self._moments.items()}

    def restore(self, state: Mapping[str, Vector]) -> None:
        found = {name: (str(moment.dtype), moment.shape) for name, moment in state.items()}
        expected = dict.fromkeys(self._moments, ("float32", (self._size,)))
        if found != expected:
            raise ValueError(f"state of another optimiser: expected {expected}; got {found}")
        for name, moment in state.items():
            self._moments[name][:] = moment

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self._size, _BLOCK):
            yield slice(start, min(start + _BLOCK, self._size))

    @abstractmethod
    def _descent(self, block: slice, delta: Vector, scratch: Vector) -> Vector:
        """Return a block's direction, before the learning rate; the two rows of scratch are free.

        The caller leaves it as it is.
        """


class _Sgd(_Blockwise):
    def _descent(self, block: slice, delta: Vector, scratch: Vector) -> Vector:  # noqa: ARG002
        return delta


class _Momentum(_Blockwise):
    def __init__(self, learning_rate: float, momentum: float, size: int) -> None:
        super().__init__(learning_rate, size, velocity=0.0)
        self._momentum = momentum

    def _descent(self, block: slice, delta: Vector, scratch: Vector) -> Vector:  # noqa: ARG002
        velocity: Vector = self._moments["velocity"][block]
        velocity *= self._momentum
        velocity += delta
        return velocity


class _Adam(_Blockwise):
    def __init__(
        self, learning_rate: float, beta1: float, beta2: float, epsilon: float, size: int
    ) -> None:
        super().__init__(learning_rate, size, first=0.0, second=epsilon**2)
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon

    def _descent(self, block: slice, delta: Vector, scratch: Vector) -> Vector:
        first, second = self._moments["first"][block], self._moments["second"][block]
        descent: Vector = scratch[0]
        scale: Vector = scratch[1]
        np.multiply(delta, 1 - self._beta1, out=descent)
        first *= self._beta1
        first += descent
        np.square(delta, out=scale)
        scale *= 1 - self._beta2
        second *= self._beta2
        second += scale
        np.sqrt(second, out=scale)
        scale += self._epsilon
        np.divide(first, scale, out=descent)
        return descent


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: {value}; expected 0 <= {name} < 1")


def _check_positive(name: str, value: float) -> None:
    # As single precision has it: what is zero there would divide by zero.
    if not (math.isfinite(value) and np.float32(value) > 0):
        raise ValueError(f"{name}: {value}; expected a finite number above 0 in single precision")
