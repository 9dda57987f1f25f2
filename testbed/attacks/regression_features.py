"""What the posterior regressions simulate, and what they read from a last layer's gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Adversary, Array
from testbed.attacks.defended import is_defended
from testbed.attacks.label_priors import Prior, draw_label_batches

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Singles = NDArray[np.float32]

# Order statistics of a class's row of the weight gradient, from its minimum to its maximum.
_QUANTILES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# A column that one sample alone has made has half of its absolute sum, negative, at its label.
_PURE = -0.45
# Directions with less than this part of the largest one's squared norm are rounding errors.
_RANK = 1e-10
# What a feature's typical size is at least, as a part of the largest: those that are zero on the
# auxiliary samples would count for infinitely much.
_FLOOR = 1e-2
_TINY = 1e-30
# What is beyond: features, and gradients in units of the features' size, of a diverged model.
_HUGE, _LARGE = 1e30, 1e6
# Values of simulated weight gradients that are held at once.
_CHUNK = 1 << 22
# Of a layer's inputs, at most this many are read.
_WIDTH = 1024

FEATURES = 43
"""How many numbers `row_features` gives for each class, F."""


@dataclass(frozen=True)
class ClassStatistics:
    """What is known of the classes from auxiliary samples, as far as `row_features` needs it.

    Attributes
    ----------
    posterior
        float64 [C, C]: mean posterior over the samples of a class, ``P[class, i]``.
    features
        float64 [C, D]: mean features over the samples of a class.
    scale
        float64 [D], positive: root mean square of each feature.
    """

    posterior: Floats
    features: Floats
    scale: Floats

    @property
    def unit(self) -> float:
        """Size of the largest feature."""
        return float(self.scale.max())

    def in_unit(self, unit: float) -> "ClassStatistics":
        """Return the statistics beside weight gradients of the function `in_unit`."""
        read = _columns(len(self.scale))
        return ClassStatistics(
            self.posterior, self.features[:, read] / unit, self.scale[read] / unit
        )


@dataclass(frozen=True)
class Auxiliary:
    """The model's outputs on the server's samples: finite, whatever became of the model.

    Attributes
    ----------
    posterior
        float64 [n, C].
    features
        float64 [n, D].
    labels
        int64 [n]; classes may lack samples.
    unit
        Positive: size of the largest feature. Weight gradients are read in this unit.
    """

    posterior: Floats
    features: Floats
    labels: Indices
    unit: float

    @staticmethod
    def of(adversary: Adversary) -> "Auxiliary":
        """Run the global model.

        Raises
        ------
        ValueError
            The outputs have no labels.
        """
        outputs = adversary.on_auxiliary()
        if outputs.labels is None:
            raise ValueError("regressions need the labels of the auxiliary samples")
        posterior = np.nan_to_num(outputs.posterior, nan=1 / adversary.classes)
        features = np.clip(np.nan_to_num(outputs.features), -_HUGE, _HUGE)
        unit = max(float(np.sqrt((features**2).mean(axis=0)).max()), _TINY)
        return Auxiliary(posterior, features, outputs.labels, unit)

    def draw(
        self, prior: Prior, shape: tuple[int, int, int], rng: np.random.Generator, alpha: float
    ) -> tuple[Indices, Indices]:
        """Draw simulated updates, of the classes that have samples.

        Returns
        -------
        labels
            int64 [S, E, B], as `draw_label_batches`.
        chosen
            int64 [S, E, B]: a sample for each label, with replacement.
        """
        present, size = np.unique(self.labels, return_counts=True)
        drawn = draw_label_batches(prior, shape, len(present), rng, alpha)
        order = np.argsort(self.labels, kind="stable")
        place = (rng.random(shape) * size[drawn]).astype(np.int64)
        return present[drawn], order[(np.cumsum(size) - size)[drawn] + place]

    def resampled(self, rng: np.random.Generator) -> Indices:
        """Return how often each sample is in a resample of each class's samples, int64 [n]."""
        weights = np.zeros(len(self.labels), np.int64)
        for c in np.unique(self.labels):
            own = np.flatnonzero(self.labels == c)
            np.add.at(weights, rng.choice(own, len(own)), 1)
        return weights

    def parts(self, chosen: Indices) -> list[Indices]:
        """Split the samples of simulated updates [S, E, B] so that gradients fit into memory."""
        rows = max(chosen.shape[2], self.posterior.shape[1])
        parts = -(-len(chosen) * rows * self.features.shape[1] // _CHUNK)
        return np.array_split(chosen, min(len(chosen), parts))

    def simulate(self, adversary: Adversary, chosen: Indices) -> Iterator[tuple[Floats, Singles]]:
        """Yield the mean gradients of simulated clients, in parts of bounded size.

        Yields
        ------
        bias
            float64 [n, C].
        weight
            float32 [n, C, at most D], as `in_unit` gives it.
        """
        classes, width = self.posterior.shape[1], self.features.shape[1]
        steps, size = chosen.shape[1:]
        if steps > 1 or has_norms(adversary) or is_defended(adversary):
            for part in self.parts(chosen):
                observed = adversary.simulate(part)
                bias = np.asarray(observed.bias_gradient, np.float64) / steps
                yield bias, in_unit(observed.weight_gradient, self.unit * steps)
            return
        # In single precision as a client computes it: of the residual of a sample that the model
        # is sure of, rounding leaves little.
        hot = np.eye(classes, dtype=np.float32)[self.labels]
        residual = self.posterior.astype(np.float32) - hot
        features = (self.features[:, _columns(width)] / self.unit).astype(np.float32)
        for part in self.parts(chosen):
            own = residual[part[:, 0]] / np.float32(size)
            weight: Singles = np.matmul(own.swapaxes(1, 2), features[part[:, 0]])
            yield own.sum(axis=1, dtype=np.float64), weight


def has_norms(adversary: Adversary) -> bool:
    """Return whether a sample's gradient depends on its batch, through BatchNorm."""
    return bool(np.isfinite(adversary.momentum()).any())


def in_unit(weight: Array, unit: float) -> Singles:
    """Return a weight gradient [N, C, D] divided by a unit, finite, of the columns that are read.

    These are all, or every second, every third, ... of a wide layer.
    """
    values = np.asarray(weight)[:, :, _columns(weight.shape[2])].astype(np.float64)
    values = np.clip(np.nan_to_num(values), -_HUGE, _HUGE) / unit
    return np.clip(values, -_LARGE, _LARGE).astype(np.float32)


def _columns(width: int) -> slice:
    return slice(None, None, max(1, -(-width // _WIDTH)))


def class_statistics(auxiliary: Auxiliary, weights: Indices | None = None) -> ClassStatistics:
    """Return the statistics of labelled samples.

    Parameters
    ----------
    auxiliary
        The samples.
    weights
        int64 [n]: how often each sample counts; once where None. A class without any counted
        sample has the mean of the others.
    """
    classes = auxiliary.posterior.shape[1]
    member = np.eye(classes)[auxiliary.labels]
    if weights is not None:
        member *= weights[:, None]
    size = member.sum(axis=0)
    present = size > 0
    member /= np.maximum(size, 1)

    def mean(values: Floats) -> Floats:
        means: Floats = member.T @ values
        means[~present] = means[present].mean(axis=0)
        return means

    scale = np.sqrt(mean(auxiliary.features**2).mean(axis=0))
    return ClassStatistics(
        posterior=mean(auxiliary.posterior),
        features=mean(auxiliary.features),
        scale=np.maximum(scale, _FLOOR * scale.max() + _TINY),
    )


def row_features(bias: Floats, weight: Singles, statistics: ClassStatistics) -> Singles:
    """Describe every class of every update by numbers that mean the same for each class.

    A sample's gradient is ``(p - onehot(y)) h^T``: in a trained model that of most samples is
    thousands of times smaller than that of the few that are misclassified, which decide the bias
    gradient and the row sums. What is small is not lost, though, since gradients are exact to
    about seven digits. Two views make it visible. *Normalised columns*: a column of the weight
    gradient is ``sum_k r_k h_kd``, and where a feature d is zero for the misclassified samples (as
    ReLU makes it), the column, scaled to an absolute sum of 1, shows the label of another sample
    as its one negative entry. *Whitened rows*: multiplying by an inverse root of ``Wg Wg^T``
    makes directions of all sizes alike.

    Parameters
    ----------
    bias
        float64 [S, C], finite: mean bias gradient of the local steps.
    weight
        float32 [S, C, D], finite: mean weight gradient.
    statistics
        Of the global model.

    Returns
    -------
    Singles
        float32 [S, C, F], not standardised; F is `FEATURES`.
    """
    classes, width = weight.shape[1:]
    own = np.diagonal(statistics.posterior)
    other = (statistics.posterior.sum(axis=0) - own) / max(classes - 1, 1)
    # Mean residual of a sample at its label, and a class's part of it in a batch.
    residual = 1 - own
    unit = max(float(residual.mean()), 1e-6) / classes
    found: list[NDArray[np.floating]] = []

    def scaled(values: NDArray[np.floating]) -> None:
        found.append(values / unit)
        found.append(np.arcsinh(values * (30 / unit)))

    scaled(bias)
    sums: Floats = weight.sum(axis=2, dtype=np.float64)
    scaled(sums / statistics.scale.sum())
    ordered: Singles = np.sort(weight / statistics.scale.astype(np.float32), axis=2)
    for quantile in _QUANTILES:
        scaled(ordered[:, :, round(quantile * (width - 1))])
    found += _normalised_columns(weight)
    found += _whitened_rows(weight, statistics.features)
    found += _linear_estimates(bias, statistics.posterior, own, other)
    for known in (residual / (unit * classes), other / unit, np.log(residual + 1e-4)):
        found.append(np.broadcast_to(known, bias.shape))
    return np.stack([values.astype(np.float32) for values in found], axis=2)


def _normalised_columns(weight: Singles) -> list[NDArray[np.floating]]:
    column = weight / (np.abs(weight).sum(axis=1, keepdims=True) + np.float32(_TINY))
    negative = np.minimum(column, 0)
    lowest = negative == negative.min(axis=1, keepdims=True)
    return [
        column.mean(axis=2),
        negative.mean(axis=2),
        column.min(axis=2),
        (column * column).mean(axis=2),
        (column < 0).mean(axis=2),
        (column < _PURE).mean(axis=2),
        (lowest & (column < 0)).mean(axis=2),
    ]


def _whitened_rows(weight: Singles, features: Floats) -> list[NDArray[np.floating]]:
    double = weight.astype(np.float64)
    values, vectors = np.linalg.eigh(double @ double.swapaxes(1, 2))
    kept = values > np.maximum(_RANK * values[:, -1:], _TINY)
    values = np.where(kept, values, 1.0)
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), _TINY)
    mean = features.mean(axis=0)
    mean = mean / max(float(np.linalg.norm(mean)), _TINY)
    found: list[NDArray[np.floating]] = []
    for power in (-0.5, -0.25):
        factors = np.where(kept, values**power, 0.0)
        matrix = (vectors * factors[:, None, :]) @ vectors.swapaxes(1, 2)
        rows = (matrix @ double).astype(np.float32)
        size = np.sqrt((rows * rows).mean(axis=(1, 2), keepdims=True))
        rows /= size + np.float32(_TINY)
        found += [
            rows @ mean.astype(np.float32),
            np.einsum("scd,cd->sc", rows, directions.astype(np.float32)),
            (rows * rows).mean(axis=2),
            rows.min(axis=2),
        ]
    return found


def _linear_estimates(
    bias: Floats, posterior: Floats, own: Floats, other: Floats
) -> list[NDArray[np.floating]]:
    classes = len(posterior)
    mean = posterior.mean(axis=0) - bias
    split = (other - bias) / np.maximum(1 - own + other, 1e-3)
    # (P^T - I) shares = bias gradient, and the shares sum to 1.
    system = np.vstack([posterior.T - np.eye(classes), np.ones(classes)])
    inverse = np.linalg.solve(system.T @ system + 1e-4 * np.eye(classes), system.T)
    fitted = np.concatenate([bias, np.ones((len(bias), 1))], axis=1) @ inverse.T
    return [values * classes for values in (mean, np.clip(split, -1, 2), np.clip(fitted, -1, 2))]
