"""Defences that change every entry of a gradient or an update: clipping and noise."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from typing_extensions import override

from testbed.attacks.base import Observations
from testbed.defenses.base import Known, Positive, Scope, Stage, Tensors, Vector, VectorDefense
from testbed.defenses.observed import (
    euclidean_norm,
    imitated,
    multiplied,
    tensor_factors,
    unclipped,
)
from testbed.defenses.registry import register
from testbed.defenses.rows import denoised
from testbed.defenses.scale import centred


@dataclass(frozen=True, kw_only=True)
class _OnVectors(VectorDefense):
    """What is done to an update is done to simulated ones."""

    @override
    def imitate(self, simulated: Observations, rng: np.random.Generator) -> Observations:
        def change(vector: Vector, tensors: Tensors) -> Vector:
            self.apply(vector, tensors, rng)
            return vector

        return imitated(simulated, change, self.at)


@register
@dataclass(frozen=True, kw_only=True)
class Clip(_OnVectors):
    """Scale down to a largest norm: ``u / max(1, ||u|| / bound)``.

    Of the whole update, or tensor by tensor, as the LLG reference code does. What is not finite
    does not become so.

    Attributes
    ----------
    bound
        The largest Euclidean norm.
    """

    bound: Positive

    name: ClassVar[str] = "clip"
    title: ClassVar[str] = "Clipping"
    source: ClassVar[str] = "Pascanu et al., ICML 2013; Wainakh et al., PoPETs 2022(2)"
    stage: ClassVar[Stage] = Stage.CLIP
    adaptation: ClassVar[str] = (
        "Scales what has the norm of the bound back up, as far as leaves no class a negative count."
    )

    @override
    def apply(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> None:
        _clip(vector, tensors, self.bound, self.scope)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Scale back up; see `testbed.defenses.observed.unclipped` for what that takes for granted.

        A defence behind this one that makes the norm smaller (sparsification) hides what was
        clipped.
        """
        return unclipped(observations, known, bound=self.bound, scope=self.scope)


@register
@dataclass(frozen=True, kw_only=True)
class Noise(_OnVectors):
    """Add independent noise to every entry; the scope makes no difference.

    Without a bound on what it hides, there is no differential privacy in it.

    Attributes
    ----------
    sigma
        Standard deviation, in the unit of the gradient.
    distribution
        ``gaussian``, or ``laplace`` with the scale ``sigma / sqrt 2``.
    """

    sigma: Positive
    distribution: Literal["gaussian", "laplace"] = "gaussian"

    name: ClassVar[str] = "noise"
    title: ClassVar[str] = "Noise"
    source: ClassVar[str] = "Zhu et al., NeurIPS 2019"
    stage: ClassVar[Stage] = Stage.NOISE
    adaptation: ClassVar[str] = (
        "Projects the last layer onto gradients that sum to 0 over the classes, reads the bias "
        "gradient from the row sums too, in which noise averages out, and adds up a client's "
        "updates over rounds."
    )

    @property
    @override
    def accumulates(self) -> bool:
        return True

    @override
    def apply(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> None:
        if self.distribution == "gaussian":
            _add_gaussian(vector, self.sigma, rng)
            return
        # The difference of two exponential variables has a Laplace distribution of their scale.
        noise = rng.standard_exponential(vector.size, np.float32)
        noise -= rng.standard_exponential(vector.size, np.float32)
        noise *= np.float32(self.sigma / math.sqrt(2))
        vector += noise

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Average the noise out as far as may be; see `testbed.defenses.rows.denoised`."""
        draws = observations.local_steps if self.at == "step" else 1
        return denoised(observations, known, self.sigma * math.sqrt(draws))


@register
@dataclass(frozen=True, kw_only=True)
class PaperDP(_OnVectors):
    """The LLG paper's "DP": clip the batch gradient tensor by tensor, then add Gaussian noise.

    Gives no (epsilon, delta) guarantee: the gradient of the batch is clipped and not that of each
    sample, every tensor by itself, and the noise is the same for every bound. It is here to repeat
    the paper's experiment; `dp_sgd` is the real thing.

    Attributes
    ----------
    bound
        The largest Euclidean norm, of each tensor (or of the update, as `scope` says); the paper
        has 1, 5 and 10.
    sigma
        Standard deviation of the noise; the paper has .1.
    """

    bound: Positive
    sigma: Positive = 0.1
    scope: Scope = "tensor"

    name: ClassVar[str] = "dp_paper"
    title: ClassVar[str] = "DP (LLG paper)"
    source: ClassVar[str] = "Wainakh et al., PoPETs 2022(2)"
    stage: ClassVar[Stage] = Stage.NOISE
    adaptation: ClassVar[str] = (
        "Projects the last layer onto gradients that sum to 0 over the classes, scales what has "
        "the norm of the bound back up, and adds up a client's updates over rounds."
    )

    @property
    @override
    def accumulates(self) -> bool:
        return True

    @override
    def apply(self, vector: Vector, tensors: Tensors, rng: np.random.Generator) -> None:
        _clip(vector, tensors, self.bound, self.scope)
        _add_gaussian(vector, self.sigma, rng)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        """Project, scale back up, and average the noise out as far as may be."""
        draws = observations.local_steps if self.at == "step" else 1
        deviation = self.sigma * math.sqrt(draws)
        plain = centred(observations, known.tensors)
        if self.scope == "update":
            return unclipped(plain, known, bound=self.bound, scope=self.scope)
        of_bias, of_weight = tensor_factors(plain, known, bound=self.bound, deviation=deviation)
        whole = multiplied(plain, known.tensors, of_bias, of_weight)
        return denoised(whole, known, deviation * of_bias, deviation * of_weight)


def _clip(vector: Vector, tensors: Tensors, bound: float, scope: Scope) -> None:
    for start, stop in pairwise(tensors.bounds(scope)):
        part = vector[start:stop]
        excess = euclidean_norm(part) / bound
        if excess > 1:
            with np.errstate(over="ignore", invalid="ignore"):
                part /= np.float32(excess)


def _add_gaussian(vector: Vector, sigma: float, rng: np.random.Generator) -> None:
    noise = rng.standard_normal(vector.size, np.float32)
    noise *= np.float32(sigma)
    vector += noise
