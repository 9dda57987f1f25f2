"""Label counts from the BatchNorm statistics that come with an update. Attacks of our own.

The mean and the variance of a layer's inputs over a batch are, nearly, mixtures of the moments of
its classes, with the label shares as weights. Training drives the moments of the classes apart,
while it makes gradients fade. The adversary simulates updates with its auxiliary samples, forward
passes only, and fits label shares to the statistics by ridge regression. One half of the simulated
updates holds the first half of the samples, the other the second: how well the one predicts the
other tells what the regression is to be trusted with.

A client returns running averages, ``(1 - m) old + m batch`` after one local step with momentum m;
after several, the same with ``(1 - m)^E`` in place of ``1 - m`` and a weighted mean of the steps'
batches. The old ones are the server's own, so this is one affine map per buffer, and the
simulated clients apply it as the real ones do: a regression on standardised features is the same
before and after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Array,
    Attack,
    Calibration,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.estimation import column, float64, given, required
from testbed.attacks.label_priors import Prior, count_labels, draw_label_batches
from testbed.attacks.registry import register
from testbed.attacks.regression_statistics import fit_ridge, labels_of, project_shares
from testbed.attacks.rounding import largest_remainder

# Updates that are simulated at once: their weight gradients are made too, and not needed.
_CHUNK = 50


@dataclass(frozen=True)
class _Regression(Attack):
    """Label shares by a ridge regression on parts of simulated updates.

    Attributes
    ----------
    batches
        How many updates are simulated. Each costs the forward passes of a client.
    prior
        Of the label distributions among them; see `testbed.attacks.label_priors`.
    alpha
        Concentration of the prior ``dirichlet``.
    noise
        The clients' ``federation.statistics_noise`` as far as the server knows of it: the
        regression is then fitted to statistics as noisy.
    """

    batches: Annotated[int, Field(ge=4, le=100_000)] = 600
    prior: Prior = "mixed"
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    noise: Annotated[float, Field(ge=0, le=100)] = 0.0

    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    source: ClassVar[str] = "this testbed"

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        # Also where simulated clients have none: who holds the last layer alone is told what lacks.
        if len(adversary.statistics_sent()) == 0:
            raise ValueError("the global model has no BatchNorm statistics")
        rng = np.random.Generator(np.random.PCG64(adversary.seed))
        labels = labels_of(adversary.on_auxiliary())
        present = np.unique(labels)
        shape = (self.batches, adversary.local_steps, adversary.batch_size)
        drawn = draw_label_batches(self.prior, shape, len(present), rng, self.alpha)
        # Halves in pairs: of two updates that follow each other, the mixed prior skews one.
        second = np.arange(self.batches) // 2 % 2 == 1
        batches = choose_samples(labels, present[drawn], second, rng)
        parts: dict[str, list[NDArray[np.float64]]] = {}
        for start in range(0, self.batches, _CHUNK):
            seen = adversary.simulate(batches[start : start + _CHUNK])
            if self.noise and seen.statistics is not None:
                noisy = adversary.disturbed(seen.statistics, self.noise, rng)
                seen = replace(seen, statistics=noisy)
            for name, values in self._features(seen).items():
                parts.setdefault(name, []).append(values)
        features = {name: np.concatenate(values) for name, values in parts.items()}
        shares = count_labels(drawn, len(present)) / (shape[1] * shape[2])
        fitted = fit_ridge(np.concatenate(list(features.values()), axis=1), shares, second)
        # Of a class without samples the adversary knows nothing: it gets the uniform share.
        known = len(present) / adversary.classes
        coefficients = np.zeros((len(fitted.coefficients), adversary.classes))
        coefficients[:, present] = known * fitted.coefficients
        intercept = np.full(adversary.classes, 1 / adversary.classes)
        intercept[present] = known * fitted.intercept
        ends = np.cumsum([values.shape[1] for values in features.values()])
        pieces = np.split(coefficients, ends[:-1])
        named = dict(zip(features, pieces, strict=True))
        return {name: values[None] for name, values in named.items()} | {
            "intercept": intercept[None]
        }

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        features = self._features(observations)
        xp = array_namespace(observations.row_sums)
        shares: Array = given(calibration["intercept"], observations.row_sums)
        for name, values in features.items():
            # One calibration for all updates, or one for each.
            coefficients = given(calibration[name], values)
            shares = shares + xp.matmul(values[:, None, :], coefficients)[:, 0, :]
        scores = project_shares(shares) * column(observations.labels, shares)
        return LabelCounts(largest_remainder(scores, observations.labels), scores)

    def _features(self, observations: Observations) -> Mapping[str, Array]:
        """Return what is regressed on, by the name of its coefficients, float64 [N, F] each."""
        statistics = required(observations.statistics, "BatchNorm statistics")
        return {"statistics": float64(statistics)}


@register
@dataclass(frozen=True)
class BatchNormStatistics(_Regression):
    """Ridge regression from BatchNorm statistics, mixtures of class moments, to label shares."""

    name: ClassVar[str] = "batchnorm"
    title: ClassVar[str] = "BatchNorm statistics"
    observes: ClassVar = frozenset({Observed.STATISTICS})
    calibration_arrays: ClassVar = {
        "statistics": (("buffer", "class"), "f8"),
        "intercept": (("class",), "f8"),
    }


@register
@dataclass(frozen=True)
class GradientsAndStatistics(_Regression):
    """One regression on the last layer's gradients, which leak early, and the statistics."""

    name: ClassVar[str] = "batchnorm_joint"
    title: ClassVar[str] = "Gradients and statistics"
    observes: ClassVar = frozenset({Observed.ROW_SUMS, Observed.BIAS_GRADIENT, Observed.STATISTICS})
    calibration_arrays: ClassVar = {
        "statistics": (("buffer", "class"), "f8"),
        "bias": (("class", "class"), "f8"),
        "row_sums": (("class", "class"), "f8"),
        "intercept": (("class",), "f8"),
    }

    @override
    def _features(self, observations: Observations) -> Mapping[str, Array]:
        bias = required(observations.bias_gradient, "bias gradient")
        return {
            **super()._features(observations),
            "bias": float64(bias),
            "row_sums": float64(observations.row_sums),
        }


def choose_samples(
    labels: NDArray[np.int64],
    wanted: NDArray[np.int64],
    second: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Return random samples of the wanted labels, with replacement, for two halves of updates.

    The halves share no sample, but for classes that have a single one.

    Parameters
    ----------
    labels
        int64 [n]: of the samples, sorted.
    wanted
        int64 [S, E, B]: labels that occur among them.
    second
        bool [S]: which updates belong to the second half.
    rng
        Its state decides the samples.

    Returns
    -------
    NDArray[np.int64]
        [S, E, B]: positions among the n samples.
    """
    first = np.searchsorted(labels, wanted, side="left")
    size = np.searchsorted(labels, wanted, side="right") - first
    odd = np.where(size > 1, second[:, None, None], 0)
    within = (rng.random(wanted.shape) * ((size + 1 - odd) // 2)).astype(np.int64)
    chosen: NDArray[np.int64] = first + odd + 2 * within
    return chosen
