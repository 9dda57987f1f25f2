"""Updates as mixtures of class-pure updates (Ramakrishna and Dan, AISec 2022; Decaf, 2024)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
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
    LabelCounts,
    Observations,
    Observed,
    Outputs,
)
from testbed.attacks.estimation import leading_directions, non_negative_solution
from testbed.attacks.registry import register
from testbed.attacks.rounding import largest_remainder

Floats = NDArray[np.float64]

# Of "the shares sum to 1" against the fit. Measured on MNIST: any weight from 1 to 100 gives the
# same success to within 0.02.
_SUM_WEIGHT = 10.0


@register
@dataclass(frozen=True)
class ClassBasis(Attack):
    """Fits the update as a mixture of updates that the server trains on one class each.

    The gradient of a batch is the mean of its samples' gradients, so that an update is nearly a
    convex combination of class-pure updates, with the label shares as weights; for several local
    steps, the clients' own schedule is run on each class. The last layer's part is fitted with
    non-negative least squares. Classes without auxiliary samples, or whose update vanishes, get
    no share.

    A whole basis would be C x C x D numbers a round. The weight gradients are stored on the
    leading principal directions of the feature axis instead, on which the basis varies most;
    measured on MNIST, 16 directions do as well as all 588.

    Attributes
    ----------
    use
        What is fitted: the bias alone, or bias and weights, which Ramakrishna and Dan found best.
    directions
        How many directions of the feature axis are kept.
    overall
        Whether updates of several steps are fitted with an update on all classes alike too, whose
        share is split evenly, as Decaf does. Training on one class drifts where training on all
        does not. One step is linear in the shares, and needs none.
    """

    use: Literal["bias", "weights"] = "weights"
    directions: Annotated[int, Field(ge=1, le=4096)] = 16
    overall: bool = True

    name: ClassVar[str] = "class_basis"
    title: ClassVar[str] = "Class basis"
    knowledge: ClassVar[Knowledge] = Knowledge.AUXILIARY
    simulates: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Ramakrishna and Dan, AISec 2022; Decaf, 2024 (arXiv 2405.15316); weights compressed here"
    )
    observes: ClassVar = frozenset({Observed.BIAS_GRADIENT, Observed.WEIGHT_GRADIENT})

    @override
    def arrays(self) -> CalibrationArrays:
        """Declare the basis: on each direction, and for the bias behind them."""
        kept = self.directions if self.use == "weights" else 0
        arrays: dict[str, tuple[tuple[str | int, ...], str]] = {
            "basis": (("class", "class", kept + 1), "f8")
        }
        if self.overall:
            arrays["overall"] = (("class", kept + 1), "f8")
        if kept:
            arrays["projection"] = (("feature", kept), "f8")
        return arrays

    @override
    def calibrate(self, adversary: Adversary) -> Calibration:
        outputs = adversary.on_auxiliary(pure=True)
        if adversary.local_steps == 1:
            weight, bias = _one_step(outputs)
            mixed_weight, mixed_bias = np.zeros_like(weight[0]), np.zeros_like(bias[0])
        else:
            weight, bias, mixed_weight, mixed_bias = _trained(adversary, outputs, self.overall)
        projection = None
        if self.use == "weights":
            projection = leading_directions(weight.reshape(-1, weight.shape[2]), self.directions)
        calibration = {"basis": _project(weight, bias, projection)[None]}
        if self.overall:
            mixed = _project(mixed_weight[None], mixed_bias[None], projection)
            calibration["overall"] = mixed
        if projection is not None:
            calibration["projection"] = projection[None]
        return calibration

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelCounts:
        weight = _finite(observations.weight_gradient)
        bias = _finite(observations.bias_gradient)
        rows, classes = bias.shape
        shares = np.zeros((rows, classes))
        basis = calibration["basis"]
        for entry in range(len(basis)):
            # One basis for all updates, or one for each.
            chosen = slice(None) if len(basis) == 1 else slice(entry, entry + 1)
            projection = None
            if self.use == "weights":
                projection = calibration["projection"][entry]
            updates = _project(weight[chosen], bias[chosen], projection)
            columns = _finite(basis[entry]).reshape(classes, -1)
            if self.overall:
                mixed = _finite(calibration["overall"][entry])
                columns = np.vstack([columns, mixed.reshape(1, -1)])
            fitted = mixture(columns, updates.reshape(len(updates), -1))
            shares[chosen] = fitted[:, :classes]
            if self.overall:
                # Classes without an update of their own are none of those trained on.
                present = columns[:classes].any(axis=1)
                spread = fitted[:, classes:] / max(int(present.sum()), 1)
                shares[chosen] += np.where(present, spread, 0.0)
        scores = shares * np.asarray(observations.labels)[:, None]
        return LabelCounts(largest_remainder(scores, observations.labels), scores)


def mixture(columns: Floats, updates: Floats) -> Floats:
    """Return the non-negative weights, summing to about 1, that fit each update best.

    Parameters
    ----------
    columns
        float64 [K, M], finite: what is mixed. Those that are zero get no weight.
    updates
        float64 [N, M], finite.

    Returns
    -------
    Floats
        [N, K].
    """
    weights = np.zeros((len(updates), len(columns)))
    usable = np.flatnonzero(columns.any(axis=1))
    if not len(usable):
        return weights
    # What is large is made 1 first: squares of what diverged overflow.
    peak = np.abs(columns[usable]).max()
    matrix = columns[usable].T / peak
    scale = np.sqrt((matrix**2).sum(axis=0).mean())
    # Of an update, all that matters is its part in the span of the columns.
    q, r = np.linalg.qr(matrix / scale)
    with np.errstate(over="ignore"):
        targets = _finite(updates / peak / scale) @ q
    system = np.vstack([r, np.full(len(usable), _SUM_WEIGHT)])
    for row, target in enumerate(targets):
        weights[row, usable] = non_negative_solution(system, np.append(target, _SUM_WEIGHT))
    return weights


def _one_step(outputs: Outputs) -> tuple[Floats, Floats]:
    """Return the mean gradients of each class's samples, [C, C, D] and [C, C].

    In closed form, and so the mean over all batches that could be drawn.
    """
    classes = outputs.posterior.shape[1]
    weight = np.zeros((classes, classes, outputs.features.shape[1]))
    bias = np.zeros((classes, classes))
    for c, members in _members(outputs):
        residual = outputs.posterior[members] - np.eye(classes)[c]
        weight[c] = residual.T @ outputs.features[members] / len(members)
        bias[c] = residual.mean(axis=0)
    return weight, bias


def _trained(
    adversary: Adversary, outputs: Outputs, overall: bool
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return updates of clients with one class each, and of one with all classes alike."""
    rng = np.random.Generator(np.random.PCG64(adversary.seed))
    schedule = adversary.local_steps, adversary.batch_size
    shuffled = [(c, rng.permutation(members)) for c, members in _members(outputs)]
    classes, features = adversary.classes, outputs.features.shape[1]
    weight, bias = np.zeros((classes, classes, features)), np.zeros((classes, classes))

    def train(samples: NDArray[np.int64], steps: int, size: int) -> tuple[Floats, Floats]:
        update = adversary.local_update(np.resize(samples, (steps, size)))
        part = adversary.bias_gradient(update)
        return (
            adversary.weight_gradient(update).astype(np.float64),
            np.zeros(classes) if part is None else part.astype(np.float64),
        )

    for c, members in shuffled:
        weight[c], bias[c] = train(members, *schedule)
    if not overall:
        return weight, bias, np.zeros((classes, features)), np.zeros(classes)
    # In turns, so that every batch has all classes, in equal numbers as nearly as may be.
    longest = max(len(members) for _, members in shuffled)
    turns = np.array([np.resize(members, longest) for _, members in shuffled]).T.ravel()
    size = len(shuffled) * -(-adversary.batch_size // len(shuffled))
    return weight, bias, *train(turns, adversary.local_steps, size)


def _members(outputs: Outputs) -> list[tuple[int, NDArray[np.int64]]]:
    """Return the classes that have samples, and the positions of these."""
    if outputs.labels is None:
        raise ValueError("a class basis needs the labels of the samples")
    return [(int(c), np.flatnonzero(outputs.labels == c)) for c in np.unique(outputs.labels)]


def _finite(array: Array | None) -> Floats:
    """Return an array with zeros for what a diverged model left."""
    return np.nan_to_num(np.asarray(array, np.float64), posinf=0.0, neginf=0.0)


def _project(weight: Floats, bias: Floats, projection: Floats | None) -> Floats:
    """Return weight gradients [n, C, D] on the directions, and the bias [n, C] behind them."""
    if projection is None:
        return bias[..., None]
    return np.concatenate([weight @ projection, bias[..., None]], axis=-1)
