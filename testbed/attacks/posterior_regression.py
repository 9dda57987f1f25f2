"""Estimates of the expected label counts given the gradient, from auxiliary samples.

The server runs the global model once on its auxiliary samples. A batch's last-layer gradient is the
mean of its samples' gradients ``(p - onehot(y)) h^T``, so the server knows the distribution of
gradients under any distribution of labels: its first two moments in closed form, all of it by
simulation, without a single backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.base import (
    Adversary,
    Attack,
    Calibration,
    CalibrationArrays,
    Knowledge,
    LabelCounts,
    Observations,
    Observed,
)
from testbed.attacks.defended import is_defended
from testbed.attacks.label_priors import Prior, count_labels, share_variance
from testbed.attacks.registry import register
from testbed.attacks.regression_features import (
    FEATURES,
    Auxiliary,
    ClassStatistics,
    class_statistics,
    has_norms,
    in_unit,
    row_features,
)
from testbed.attacks.regression_network import Network, fit_network
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.float64]

# Auxiliary samples are resampled this often, each time for a part of the simulated updates.
_RESAMPLES = 10
# Row sums and coefficients are cut here: those of a diverged model say nothing.
_LARGE = 1e12


@dataclass(frozen=True)
class _Simulation:
    """What both attacks assume of the clients' labels."""

    prior: Prior = "mixed"
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5

    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    simulates: ClassVar[bool] = True


@register
@dataclass(frozen=True)
class LinearPosteriorRegression(_Simulation, Attack):
    """Best linear estimate of the label shares: least squares over all batches that may occur.

    Bias gradient and row sums x of a batch of B samples with shares s have the mean ``M s`` and the
    covariance ``sum_c s_c Sigma_c / B``, where M holds a class's mean gradients and Sigma_c their
    covariance. With exchangeable classes ``Cov(s) = v (I - 11^T/C)``, so that the linear estimate
    with the least mean squared error is in closed form:
    ``1/C + v M^T (M Cov(s) M^T + mean_c Sigma_c / B)^-1 (x - M 1/C)``. The covariance is shrunk
    towards its diagonal (Ledoit and Wolf 2004). For several local steps, the last layer's change on
    the way has no closed form, nor has what clients with defences send, and the moments are fitted
    to simulated updates.

    Attributes
    ----------
    prior, alpha
        How labels are distributed; see `testbed.attacks.label_priors`.
    simulations
        Simulated updates, for several local steps or clients with defences.
    """

    simulations: Annotated[int, Field(ge=10, le=100_000)] = 1000

    name: ClassVar[str] = "lmmse"
    title: ClassVar[str] = "LMMSE"
    source: ClassVar[str] = "this project; textbook linear Bayes estimate"
    observes: ClassVar = frozenset({Observed.ROW_SUMS, Observed.BIAS_GRADIENT})
    calibration_arrays: ClassVar = {
        "bias": (("class", "class"), "f8"),
        "row_sums": (("class", "class"), "f8"),
        "intercept": (("class",), "f8"),
    }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        auxiliary = Auxiliary.of(adversary)
        classes, steps = adversary.classes, adversary.local_steps
        if steps == 1 and not is_defended(adversary):
            center, means, within = _closed_form(auxiliary, adversary.batch_size)
        else:
            center, means, within = self._simulated(adversary, auxiliary)
        variance = share_variance(self.prior, adversary.batch_size, classes, steps, self.alpha)
        joint = variance * (means - means.mean(axis=0))
        slope = _solve(means.T @ joint + within, joint.T)
        # Row sums were in the features' unit.
        scale = np.repeat([1.0, auxiliary.unit], classes)
        slope /= scale[:, None]
        return {
            "bias": slope[None, :classes],
            "row_sums": slope[None, classes:],
            "intercept": (1 / classes - (center * scale) @ slope)[None],
        }

    def _simulated(self, adversary: Adversary, auxiliary: Auxiliary) -> tuple[Floats, ...]:
        """Return what `_closed_form` returns, fitted to simulated updates."""
        rng = np.random.Generator(np.random.PCG64(adversary.seed))
        shape = self.simulations, adversary.local_steps, adversary.batch_size
        labels, chosen = auxiliary.draw(self.prior, shape, rng, self.alpha)
        observed = [
            replace(adversary.simulate(part), weight_gradient=None)
            for part in auxiliary.parts(chosen)
        ]
        rows = np.concatenate([part.row_sums for part in observed]).astype(np.float64)
        bias = np.concatenate([part.bias_gradient for part in observed]).astype(np.float64)
        x = np.concatenate([bias, rows / auxiliary.unit], axis=1) / adversary.local_steps
        shares = count_labels(labels, adversary.classes) / labels[0].size
        shares -= shares.mean(axis=0)
        center = x.mean(axis=0)
        means = np.linalg.lstsq(shares, x - center, rcond=1e-9)[0]
        residual = x - center - shares @ means
        return center, means, _shrunk(residual, np.full(len(x), 1 / len(x)))

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        steps = observations.local_steps
        bias = np.clip(_finite(observations.bias_gradient) / steps, -1, 1)
        rows = np.clip(_finite(observations.row_sums), -_LARGE, _LARGE) / steps
        shares = (
            np.einsum("nk,nkc->nc", bias, _each(calibration["bias"], len(bias)))
            + np.einsum("nk,nkc->nc", rows, _each(calibration["row_sums"], len(bias)))
            + _each(calibration["intercept"], len(bias))
        )
        return _answer(shares, observations)


@register
@dataclass(frozen=True)
class PosteriorRegression(_Simulation, Attack):
    """Learns label shares from simulated gradients: the expected counts, by a small network.

    Thousands of labelled batches of auxiliary samples are turned into gradients in closed form. A
    network that is shared by all classes (`Network`) reads for each class what its row of the
    gradient looks like (`row_features`), small gradients beside large ones, and is trained for the
    attack success rate itself. The few auxiliary samples are used as the bootstrap does: the
    batches are drawn from all of them, what is known of the classes is computed from resamples,
    so that the network meets errors of the size that it will meet.

    With BatchNorm a sample's gradient depends on its batch, and each simulated update costs a
    forward pass; see ``forward_batches``.

    Attributes
    ----------
    prior, alpha
        How labels are distributed; see `testbed.attacks.label_priors`.
    simulations
        Simulated updates for ten classes. For C classes there are sqrt(10 / C) times as many, since
        the network learns from each class of each of them.
    forward_batches
        At most so many simulated updates where each costs a forward pass.
    noise
        Standard deviation of the Gaussian noise that clients add to their updates as a defence, as
        far as the server knows: the network then learns from gradients as noisy. What is small in
        a gradient is what noise hides first.
    hidden, steps
        Width of the network, and steps of its training.
    """

    simulations: Annotated[int, Field(ge=10, le=1_000_000)] = 3000
    forward_batches: Annotated[int, Field(ge=10, le=100_000)] = 300
    noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    hidden: Annotated[int, Field(ge=1, le=1024)] = 32
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1200

    name: ClassVar[str] = "posterior_regression"
    title: ClassVar[str] = "Posterior regression"
    source: ClassVar[str] = "this project"
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT, Observed.WEIGHT_GRADIENT})

    @override
    def arrays(self) -> CalibrationArrays:
        """Declare the class statistics and the network."""
        width = self.hidden
        return {
            "posterior": (("class", "class"), "f8"),
            "features": (("class", "feature"), "f8"),
            "scale": (("feature",), "f8"),
            "center": ((FEATURES,), "f8"),
            "spread": ((FEATURES,), "f8"),
            "read": ((FEATURES, width), "f8"),
            "read_bias": ((width,), "f8"),
            "own": ((width, width), "f8"),
            "pooled": ((width, width), "f8"),
            "hidden_bias": ((width,), "f8"),
            "out": ((width,), "f8"),
        }

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        auxiliary = Auxiliary.of(adversary)
        rng = np.random.Generator(np.random.PCG64(adversary.seed))
        updates = max(round(self.simulations * (10 / adversary.classes) ** 0.5), _RESAMPLES)
        if has_norms(adversary):
            updates = min(updates, self.forward_batches)
        inputs, shares = [], []
        for part in np.array_split(np.arange(updates), _RESAMPLES):
            shape = len(part), adversary.local_steps, adversary.batch_size
            labels, chosen = auxiliary.draw(self.prior, shape, rng, self.alpha)
            known = class_statistics(auxiliary, auxiliary.resampled(rng)).in_unit(auxiliary.unit)
            for bias, weight in auxiliary.simulate(adversary, chosen):
                if self.noise:
                    size = self.noise / adversary.local_steps
                    bias = np.clip(bias + size * rng.standard_normal(bias.shape), -1, 1)
                    noise = rng.standard_normal(weight.shape, np.float32)
                    weight += np.float32(size / auxiliary.unit) * noise
                inputs.append(row_features(bias, weight, known))
            shares.append(count_labels(labels, adversary.classes) / labels[0].size)
        network = fit_network(
            np.concatenate(inputs),
            np.concatenate(shares).astype(np.float32),
            hidden=self.hidden,
            steps=self.steps,
            rng=rng,
        )
        arrays = {**vars(class_statistics(auxiliary)), **vars(network)}
        return {name: values.astype(np.float64)[None] for name, values in arrays.items()}

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        steps = observations.local_steps
        bias = np.clip(_finite(observations.bias_gradient) / steps, -1, 1)
        weight = np.asarray(observations.weight_gradient)
        shares = np.empty(bias.shape)
        entries = len(calibration["scale"])
        for entry in range(entries):
            # One calibration for all updates, or one for each.
            rows = slice(None) if entries == 1 else slice(entry, entry + 1)
            given = {name: values[entry] for name, values in calibration.items()}
            known = ClassStatistics(**_of(ClassStatistics, given))
            network = Network(**{k: v.astype(np.float32) for k, v in _of(Network, given).items()})
            observed = in_unit(weight[rows], known.unit * steps)
            inputs = row_features(bias[rows], observed, known.in_unit(known.unit))
            shares[rows] = network.shares(inputs)
        return _answer(shares, observations)


def _of(kind: type, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
    return {field.name: np.asarray(arrays[field.name]) for field in fields(kind)}


def _each(values: Floats, updates: int) -> Floats:
    found = np.clip(_finite(values), -_LARGE, _LARGE)
    return np.broadcast_to(found, (updates, *found.shape[1:]))


def _finite(values: object) -> Floats:
    return np.nan_to_num(np.asarray(values, np.float64), nan=0.0)


def _answer(shares: Floats, observations: Observations) -> LabelCounts:
    scores = shares * np.asarray(observations.labels)[:, None]
    return LabelCounts(largest_remainder(scores, observations.labels), scores)


def _closed_form(auxiliary: Auxiliary, size: int) -> tuple[Floats, ...]:
    """Return the moments of x = (bias gradient, row sums) of a batch.

    Returns
    -------
    center
        float64 [2C]: mean of x, where all classes are alike.
    means
        [C, 2C]: what each class's share adds to the mean.
    within
        [2C, 2C]: covariance of x given the shares, its mean over the shares.
    """
    classes = auxiliary.posterior.shape[1]
    member = np.eye(classes)[auxiliary.labels]
    residual = auxiliary.posterior - member
    mass = auxiliary.features.sum(axis=1) / auxiliary.unit
    x = np.concatenate([residual, residual * mass[:, None]], axis=1)
    count = member.sum(axis=0)
    present = count > 0
    means = member.T @ x / np.maximum(count, 1)[:, None]
    center = means[present].mean(axis=0)
    means[~present] = center
    within = x - means[auxiliary.labels]
    # Each class counts alike, and loses a degree of freedom to its mean.
    weights = (1 / np.maximum(count - 1, 1))[auxiliary.labels] / present.sum()
    return center, means, _shrunk(within, weights) / size


def _solve(covariance: Floats, joint: Floats) -> Floats:
    """Return the slope of the best linear estimate; what does not vary says nothing."""
    # Bias gradients and row sums are made of equal size first, so that one rank fits both.
    size = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    factor = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    normal = factor[:, None] * covariance * factor
    inverse = np.linalg.pinv(normal, rcond=1e-9, hermitian=True)
    slope: Floats = factor[:, None] * (inverse @ (factor[:, None] * joint))
    return slope


def _shrunk(within: Floats, weights: Floats) -> Floats:
    """Return a covariance [K, K], shrunk towards its diagonal.

    By as much as the sample covariance is uncertain (Ledoit and Wolf, "A well-conditioned
    estimator for large-dimensional covariance matrices", 2004).

    Parameters
    ----------
    within
        [n, K], centred.
    weights
        [n]: of each row; they sum to about 1.
    """
    sample = (within * weights[:, None]).T @ within
    target = np.diag(np.diagonal(sample))
    norm = (within**2).sum(axis=1)
    cross = np.einsum("ik,kl,il->i", within, sample, within, optimize=True)
    uncertain = float((weights**2 * (norm**2 - 2 * cross + (sample**2).sum())).sum())
    away = float(((sample - target) ** 2).sum())
    part = min(1.0, uncertain / away) if away > 0 else 1.0
    shrunk: Floats = part * target + (1 - part) * sample
    return shrunk
