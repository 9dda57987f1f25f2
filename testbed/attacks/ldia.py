"""Label distribution inference by a model trained on shadow updates (Gu and Bai, 2023)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Array,
    Attack,
    Calibration,
    CalibrationArrays,
    Knowledge,
    LabelDistribution,
    Observations,
    Observed,
    Outputs,
)
from testbed.attacks.estimation import leading_directions
from testbed.attacks.registry import register
from testbed.attacks.simulation import softmax

Floats = NDArray[np.float64]

# Shadow updates that are held at once, and how many numbers they have at most.
_CHUNK, _NUMBERS = 50, 1 << 24
_BATCH = 32
# An input that varies less than this, of the one that varies most, is constant.
_CONSTANT = 1e-6
_RATE, _DECAYS, _TINY = 1e-3, (0.9, 0.999), 1e-8


@register
@dataclass(frozen=True)
class LDIA(Attack):
    """Learns the way from updates to label shares on clients that the server makes up.

    The server draws label distributions of every sparsity (as many present classes as there are
    to choose from, at random, with Dirichlet shares), simulates clients that hold auxiliary
    samples with these labels, and trains a small network with one hidden layer to predict the
    shares (KL divergence, Adam) from the last layer's update.

    Here from one round's update; the paper joins those of up to ten rounds. The update is not
    taken whole: its bias gradient, and its weight gradient on the leading principal directions of
    the auxiliary samples' features. For several local steps, the last layer alone moves in the
    simulated clients. With few auxiliary samples more directions and more epochs overfit
    (measured on MNIST with 50 samples per class; the paper has 500 in all, and 100 epochs).

    Attributes
    ----------
    shadows
        How many clients are made up.
    features
        How many directions of the feature axis are kept.
    hidden
        Width of the hidden layer.
    epochs
        Passes over the shadow updates.
    """

    shadows: Annotated[int, Field(ge=2, le=100_000)] = 1000
    features: Annotated[int, Field(ge=1, le=1024)] = 2
    hidden: Annotated[int, Field(ge=1, le=4096)] = 128
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 30

    name: ClassVar[str] = "ldia"
    title: ClassVar[str] = "LDIA"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    simulates: ClassVar[bool] = True
    source: ClassVar[str] = "Gu and Bai, J. Inf. Secur. Appl. 2023; one round"
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT, Observed.WEIGHT_GRADIENT})
    answers: ClassVar = LabelDistribution.answer

    @override
    def arrays(self) -> CalibrationArrays:
        """Declare the projection and the network; the inputs are C times (features + 1)."""
        return {
            "projection": (("feature", self.features), "f8"),
            "weight_in": (("class", self.features + 1, self.hidden), "f8"),
            "bias_in": ((self.hidden,), "f8"),
            "weight_out": ((self.hidden, "class"), "f8"),
            "bias_out": (("class",), "f8"),
        }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        rng = np.random.Generator(np.random.PCG64(adversary.seed))
        outputs = adversary.on_auxiliary()
        projection = leading_directions(outputs.features, self.features)
        inputs, shares = self._shadows(adversary, outputs, projection, rng)
        mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
        # What hardly varies is rounding noise: a client's own would be blown up by it.
        scale[scale <= _CONSTANT * scale.max()] = 1.0
        weight_in, bias_in, weight_out, bias_out = _train(
            (inputs - mean) / scale, shares, self.hidden, self.epochs, rng
        )
        # Standardised inputs are left to the training alone.
        weight_in /= scale[:, None]
        bias_in -= mean @ weight_in
        shape = (adversary.classes, self.features + 1, self.hidden)
        return {
            "projection": projection[None],
            "weight_in": weight_in.reshape(1, *shape),
            "bias_in": bias_in[None],
            "weight_out": weight_out[None],
            "bias_out": bias_out[None],
        }

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelDistribution:
        xp, where = array_namespace(observations.row_sums), device(observations.row_sums)

        def stored(name: str) -> Array:
            return xp.asarray(calibration[name], dtype=xp.float64, device=where)

        inputs = _inputs(
            observations.weight_gradient, observations.bias_gradient, stored("projection")
        )
        weight_in = stored("weight_in")
        weight_in = xp.reshape(weight_in, (weight_in.shape[0], -1, self.hidden))
        hidden = xp.matmul(xp.reshape(inputs, (len(inputs), 1, -1)), weight_in)[:, 0, :]
        hidden = xp.clip(hidden + stored("bias_in"), min=0.0)
        logits = xp.matmul(hidden[:, None, :], stored("weight_out"))[:, 0, :] + stored("bias_out")
        # A diverged model's calibration says nothing.
        good = xp.all(xp.isfinite(logits), axis=1)[:, None]
        logits = xp.where(good, logits, xp.zeros_like(logits))
        odds = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
        return LabelDistribution(odds / xp.sum(odds, axis=1, keepdims=True))

    def _shadows(
        self,
        adversary: Adversary,
        outputs: Outputs,
        projection: Floats,
        rng: np.random.Generator,
    ) -> tuple[Floats, Floats]:
        """Return inputs [S, C (features + 1)] and label shares [S, C] of simulated clients."""
        labels, classes = outputs.labels, adversary.classes
        if labels is None:
            raise ValueError("shadow clients need the labels of the samples")
        present = np.unique(labels)
        members = {int(c): np.flatnonzero(labels == c) for c in present}
        size = adversary.local_steps * adversary.batch_size
        inputs, shares = [], []
        rows = max(size, classes) * outputs.features.shape[1]
        chunk = max(1, min(_CHUNK, _NUMBERS // rows))
        for start in range(0, self.shadows, chunk):
            count = min(chunk, self.shadows - start)
            drawn = np.empty((count, size), np.int64)
            for row in drawn:
                width = int(rng.integers(1, len(present) + 1))
                chosen = rng.choice(present, width, replace=False)
                row[:] = rng.choice(chosen, size, p=rng.dirichlet(np.ones(width)))
            samples = np.empty_like(drawn)
            for c, own in members.items():
                where = drawn == c
                samples[where] = rng.choice(own, int(where.sum()))
            schedule = (count, adversary.local_steps, adversary.batch_size)
            seen = adversary.simulate(samples.reshape(schedule))
            part = _inputs(seen.weight_gradient, seen.bias_gradient, projection[None])
            inputs.append(part.reshape(count, -1))
            shares.append(np.eye(classes)[drawn].mean(axis=1))
        return np.concatenate(inputs), np.concatenate(shares)


def _inputs(weight: Array, bias: Array, projection: Array) -> Array:
    """Return weight gradients [n, C, D] on the directions, and the bias [n, C] behind them."""
    xp = array_namespace(weight)
    projected = xp.matmul(_finite(weight), projection)
    return xp.concat([projected, _finite(bias)[..., None]], axis=2)


def _finite(array: Array) -> Array:
    """Return an array in double precision, with zeros for what a diverged model left."""
    xp = array_namespace(array)
    double = xp.astype(array, xp.float64)
    return xp.where(xp.isfinite(double), double, xp.zeros_like(double))


def _train(
    inputs: Floats, shares: Floats, hidden: int, epochs: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats, Floats]:
    """Fit ``softmax(relu(x V + a) W + b)`` to shares: KL divergence, Adam, batches of 32.

    Returns
    -------
    tuple
        V [F, hidden], a [hidden], W [hidden, C], b [C].
    """
    width, classes = inputs.shape[1], shares.shape[1]
    parameters = [
        rng.standard_normal((width, hidden)) * np.sqrt(2 / width),
        np.zeros(hidden),
        rng.standard_normal((hidden, classes)) * np.sqrt(1 / hidden),
        np.zeros(classes),
    ]
    first = [np.zeros_like(values) for values in parameters]
    second = [np.zeros_like(values) for values in parameters]
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(inputs))
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            step += 1
            gradients = _backward(parameters, inputs[chosen], shares[chosen])
            for values, slow, square, gradient in zip(
                parameters, first, second, gradients, strict=True
            ):
                slow += (1 - _DECAYS[0]) * (gradient - slow)
                square += (1 - _DECAYS[1]) * (gradient**2 - square)
                spread = np.sqrt(square / (1 - _DECAYS[1] ** step)) + _TINY
                values -= _RATE * slow / (1 - _DECAYS[0] ** step) / spread
    v, a, w, b = parameters
    return v, a, w, b


def _backward(parameters: list[Floats], inputs: Floats, shares: Floats) -> list[Floats]:
    v, a, w, b = parameters
    hidden = np.maximum(inputs @ v + a, 0)
    residual = (softmax(hidden @ w + b) - shares) / len(inputs)
    back = (residual @ w.T) * (hidden > 0)
    return [inputs.T @ back, back.sum(axis=0), hidden.T @ residual, residual.sum(axis=0)]
