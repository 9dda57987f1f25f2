"""A small network from gradient features to label shares, alike for all classes. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]

# Standardised inputs are cut here: victims may lie far outside of what was simulated.
_CUT = np.float32(5)
_DECAY = 1e-4
_MOMENTA = (0.9, 0.999)
# Rows (classes of updates) in a minibatch.
_ROWS = 1280


@dataclass(frozen=True)
class Network:
    """Shares of the classes from what is known of each of them.

    Every class is read by the same two layers; between them each class is told the mean over all
    classes. So the classes' order does not matter (Zaheer et al., "Deep Sets", NeurIPS 2017),
    and what is learned from one class serves all: few auxiliary samples per class are enough.

    Attributes
    ----------
    center, spread
        float32 [F]: of the inputs.
    read, read_bias
        float32 [F, H] and [H].
    own, pooled, hidden_bias
        float32 [H, H], [H, H] and [H]: second layer, on the class's and on the mean values.
    out
        float32 [H]: to the logit of a class's share.
    """

    center: Singles
    spread: Singles
    read: Singles
    read_bias: Singles
    own: Singles
    pooled: Singles
    hidden_bias: Singles
    out: Singles

    def shares(self, inputs: Singles) -> Singles:
        """Return the shares [S, C] for inputs [S, C, F]."""
        shares: Singles = _forward(_standardise(inputs, self.center, self.spread), vars(self))[-1]
        return shares


def fit_network(
    inputs: Singles,
    shares: Singles,
    *,
    hidden: int,
    steps: int,
    rng: np.random.Generator,
    rate: float = 1e-2,
) -> Network:
    """Fit a network to simulated updates.

    It minimises the total variation between the shares, ``sum_c |s_c - t_c| / 2``, which is 1 less
    the attack success rate before rounding: its minimum is the answer with the highest expected
    success, not the posterior mean. Adam with decoupled weight decay; the rate rises over a tenth
    of the steps, then falls as a cosine.

    Parameters
    ----------
    inputs
        [S, C, F].
    shares
        [S, C]; each row sums to 1.
    hidden
        H.
    steps
        Of Adam.
    rng
        Initialises, and draws minibatches.
    rate
        Largest step size.
    """
    samples, classes, width = inputs.shape
    center = inputs.mean(axis=(0, 1))
    spread = inputs.std(axis=(0, 1)) + np.float32(1e-6)
    inputs = _standardise(inputs, center, spread)

    def uniform(*shape: int, fan: int) -> Singles:
        values: Singles = (rng.random(shape, np.float32) * 2 - 1) / np.float32(fan) ** 0.5
        return values

    weights = {
        "read": uniform(width, hidden, fan=width),
        "read_bias": uniform(hidden, fan=width),
        "own": uniform(hidden, hidden, fan=2 * hidden),
        "pooled": uniform(hidden, hidden, fan=2 * hidden),
        "hidden_bias": uniform(hidden, fan=2 * hidden),
        "out": uniform(hidden, fan=hidden),
    }
    first = {name: np.zeros_like(values) for name, values in weights.items()}
    second = {name: np.zeros_like(values) for name, values in weights.items()}
    size = min(samples, max(8, _ROWS // classes))
    order = np.zeros(0, np.int64)
    for step in range(steps):
        if len(order) < size:
            order = rng.permutation(samples)
        chosen, order = order[:size], order[size:]
        gradients = _gradients(inputs[chosen], shares[chosen], weights)
        progress = (step + 1) / steps
        now = rate * min(progress / 0.1, 0.5 + 0.5 * np.cos(np.pi * max(progress - 0.1, 0) / 0.9))
        for name, values in weights.items():
            gradient = gradients[name]
            first[name] += np.float32(1 - _MOMENTA[0]) * (gradient - first[name])
            second[name] += np.float32(1 - _MOMENTA[1]) * (gradient * gradient - second[name])
            mean = first[name] / np.float32(1 - _MOMENTA[0] ** (step + 1))
            power = second[name] / np.float32(1 - _MOMENTA[1] ** (step + 1))
            values *= np.float32(1 - now * _DECAY)
            values -= np.float32(now) * mean / (np.sqrt(power) + np.float32(1e-8))
    return Network(center=center, spread=spread, **weights)


def _standardise(inputs: Singles, center: Singles, spread: Singles) -> Singles:
    standard: Singles = np.clip((inputs - center) / spread, -_CUT, _CUT)
    return standard


def _forward(
    inputs: Singles, weights: Mapping[str, Singles]
) -> tuple[Singles, Singles, Singles, Singles]:
    """Return both layers' values [S, C, H], the first one's mean [S, 1, H], and the shares."""
    read = np.maximum(inputs @ weights["read"] + weights["read_bias"], 0)
    mean = read.mean(axis=1, keepdims=True)
    hidden = read @ weights["own"] + (mean @ weights["pooled"] + weights["hidden_bias"])
    hidden = np.maximum(hidden, 0)
    logits = hidden @ weights["out"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return read, mean, hidden, odds / odds.sum(axis=1, keepdims=True)


def _gradients(
    inputs: Singles, target: Singles, weights: Mapping[str, Singles]
) -> dict[str, Singles]:
    read, mean, hidden, shares = _forward(inputs, weights)
    samples, classes, width = inputs.shape
    slope = np.sign(shares - target) / np.float32(2 * samples)
    logits = shares * (slope - (slope * shares).sum(axis=1, keepdims=True))
    back = logits[:, :, None] * weights["out"] * (hidden > 0)
    pooled = back.sum(axis=1)
    to_read = back @ weights["own"].T + (pooled @ weights["pooled"].T)[:, None] / np.float32(
        classes
    )
    to_read *= read > 0
    flat = back.reshape(-1, back.shape[2])
    to_flat = to_read.reshape(-1, back.shape[2])
    return {
        "read": inputs.reshape(-1, width).T @ to_flat,
        "read_bias": to_flat.sum(axis=0),
        "own": read.reshape(flat.shape).T @ flat,
        "pooled": mean[:, 0].T @ pooled,
        "hidden_bias": pooled.sum(axis=0),
        "out": hidden.reshape(flat.shape).T @ logits.reshape(-1),
    }
