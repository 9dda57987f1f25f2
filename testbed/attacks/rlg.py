"""RLG: which labels occur, by the space of the residuals (Dang et al., NeurIPS 2021)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from testbed.attacks.base import (
    Answer,
    Assumption,
    Attack,
    Calibration,
    Knowledge,
    LabelPresence,
    Observations,
    Observed,
)
from testbed.attacks.registry import register

Floats = NDArray[np.floating[Any]]

# The unit roundoff of float32. Measured on gradients of untrained and trained networks on MNIST
# and CIFAR-100: singular values that are rounding errors alone are at most 2.6e-8 of the largest.
_ROUNDOFF = 2.0**-24

# Of the distance of a unit vector to a cone. Measured: 0 for absent classes, 0.86 to 1 for present.
_SEPARATED = 1e-3

# Projections that are tried for a certificate before a solver is asked, and the margin that the
# entries of a candidate are pushed to.
_PROJECTIONS, _MARGIN = 20, 0.02


@register
@dataclass(frozen=True)
class RLG(Attack):
    """Finds the classes that a hyperplane separates from all others, as only a label's class is.

    The residual ``p - onehot(y)`` of a sample is negative for its label alone. The column space of
    the weight gradient is spanned by the residuals of the samples, so that class c is present if
    the space has a vector whose only negative entry is that of c. The fewer samples there are, the
    smaller the space, and the more rarely another class has one too.

    Attributes
    ----------
    solver
        How a class is decided that has no quick certificate. With the class's coordinates q_c in
        the space, such a vector exists unless q_c lies in the cone of the others (Farkas's lemma):
        ``nnls`` solves for the distance to the cone, ``linprog`` (HiGHS) for the hyperplane, as
        the paper does.
    tolerance
        Singular values below this share of the largest count as zero. Noise on the gradient lifts
        the rank, and by that hides the labels, unless it is set accordingly.
    """

    solver: Literal["nnls", "linprog"] = "nnls"
    tolerance: Annotated[float, Field(gt=0, lt=1)] = _ROUNDOFF

    name: ClassVar[str] = "rlg"
    title: ClassVar[str] = "RLG"
    knowledge: ClassVar[Knowledge] = Knowledge.GRADIENTS
    source: ClassVar[str] = "Dang et al., NeurIPS 2021"
    observes: ClassVar = frozenset({Observed.WEIGHT_GRADIENT})
    assumes: ClassVar = frozenset({Assumption.FEWER_LABELS_THAN_RANK})
    answers: ClassVar[Answer] = Answer.PRESENCE
    calibrated_by: ClassVar = ()

    @override
    def infer(self, observations: Observations, calibration: Calibration) -> LabelPresence:
        gradients = np.asarray(observations.weight_gradient)
        rows = [self._present(gradient.astype(np.float64)) for gradient in gradients]
        return LabelPresence(np.stack(rows))

    def _present(self, gradient: Floats) -> NDArray[np.bool_]:
        """Return which classes [C] are present, from a weight gradient [C, D]."""
        classes = len(gradient)
        if not (np.isfinite(gradient).all() and gradient.any()):
            return np.zeros(classes, np.bool_)
        # The direction of a row of rounding errors says nothing; a row of zeros is in every cone.
        size = np.linalg.norm(gradient, axis=1)
        live: NDArray[np.bool_] = size > self.tolerance * size.max()
        left, singular, _ = np.linalg.svd(
            np.where(live[:, None], gradient, 0.0), full_matrices=False
        )
        rank = int((singular > self.tolerance * singular[0]).sum())
        if rank >= live.sum() - 1:
            # Residuals sum to 0 over the L live classes. All vectors that do form a space of the
            # dimension L - 1, which is then the whole space and has, for every c, the vector that
            # is -1 at c and 1/(L - 1) elsewhere.
            return live
        basis = np.where(live[:, None], left[:, :rank], 0.0)
        norms = np.linalg.norm(basis, axis=1)
        projection = basis @ basis.T
        present = _certified(projection, ~live)
        # Exactly one of a space and its orthogonal complement has a vector whose only negative
        # entry is at c: the product of two would be positive.
        absent = _certified(np.eye(classes) - projection, present)
        points = (basis / np.where(norms > 0, norms, 1.0)[:, None]).T
        for c in np.flatnonzero(~present & ~absent):
            others = points.copy()
            others[:, c] = 0.0
            present[c] = self._separable(points[:, c], others)
        return present

    def _separable(self, point: Floats, others: Floats) -> bool:
        """Return whether a point [r] is outside of the cone of other points [r, C]."""
        from scipy.optimize import linprog, nnls

        if self.solver == "nnls":
            # It gives up where its active sets come round in a circle; the other solver does not.
            with suppress(RuntimeError):
                _, distance = nnls(others, point, maxiter=10 * others.shape[1])
                return bool(distance > _SEPARATED)
        found = linprog(
            point, A_ub=-others.T, b_ub=np.zeros(others.shape[1]), bounds=(-1, 1), method="highs"
        )
        return bool(found.success and found.fun < -_SEPARATED)


def _certified(projection: Floats, decided: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for which classes a space has a vector whose only negative entry is theirs.

    Quick and sufficient, not necessary: by projecting in turns on the space and on the vectors of
    that kind, all classes at once.

    Parameters
    ----------
    projection
        float64 [C, C]: on the space, orthogonal.
    decided
        bool [C]: classes to leave out.
    """
    certified = np.zeros(len(projection), np.bool_)
    open_ = np.flatnonzero(~decided)
    vectors = -projection[:, open_]
    for _ in range(_PROJECTIONS):
        own = vectors[open_, np.arange(len(open_))]
        # Entries of the size of rounding errors have no sign.
        enough = own < -_ROUNDOFF
        vectors[open_, np.arange(len(open_))] = 0.0
        found = enough & (vectors >= 0).all(axis=0)
        certified[open_[found]] = True
        left = enough & ~found
        open_, vectors = open_[left], vectors[:, left] / -own[left]
        if not len(open_):
            break
        vectors = np.maximum(vectors, _MARGIN)
        vectors[open_, np.arange(len(open_))] = -1.0
        vectors = projection @ vectors
    return certified
