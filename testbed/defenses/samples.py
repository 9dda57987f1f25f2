"""Defences that bound what each sample adds to a gradient."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from typing_extensions import override

from testbed.attacks.base import Observations
from testbed.defenses.base import Defense, Known, NonNegative, Positive, Stage, Tensors, Vector
from testbed.defenses.registry import register
from testbed.defenses.rows import denoised
from testbed.defenses.scale import scale_estimate, scaled

Delta = Annotated[float, pydantic.Field(gt=0, lt=1)]


@register
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Clips each sample's gradient, adds noise to their sum, and divides by the batch size.

    ``(sum_i g_i min(1, bound / ||g_i||) + N(0, (noise_multiplier bound)^2)) / B``. With the scope
    ``tensor``, each of T tensors is clipped to ``bound / sqrt(T)``, so that the whole stays within
    the bound and the noise is the same. The budget of a sample, epsilon at ``delta``, is
    `testbed.privacy.epsilon`; the counts of a batch's labels are no secret of one sample.
    It takes for granted that a sample is in one row of a batch: mixup puts it in two, so that it
    moves the sum by twice the bound.

    Gradients of single samples need the model: `testbed.per_sample` clips and averages them, and
    `disturb` adds the noise.

    Attributes
    ----------
    bound
        On the norm of each sample's gradient, > 0.
    noise_multiplier
        Standard deviation of the noise on the sum, in units of the bound; >= 0.
    delta
        Of the budget, in (0, 1).
    accountant
        Of the budget, ``rdp`` or ``prv``.
    """

    bound: Positive
    noise_multiplier: NonNegative
    delta: Delta = 1e-5
    accountant: Literal["rdp", "prv"] = "rdp"
    at: Literal["step"] = "step"

    name: ClassVar[str] = "dp_sgd"
    title: ClassVar[str] = "DP-SGD"
    source: ClassVar[str] = "Abadi et al., CCS 2016"
    stage: ClassVar[Stage] = Stage.SAMPLES
    adaptation: ClassVar[str] = (
        "Projects the last layer onto gradients that sum to 0 over the classes, scales it up as far"
        " as leaves no class a negative count, and adds up a client's updates over rounds."
    )

    @property
    @override
    def accumulates(self) -> bool:
        return self.noise_multiplier > 0

    def bounds(self, tensors: Tensors) -> tuple[NDArray[np.int64], float]:
        """Return where the parts begin that are clipped, int64 [parts + 1], and their bound."""
        places = tensors.bounds(self.scope)
        return places, self.bound / math.sqrt(len(places) - 1)

    def noise_std(self, batch_size: int) -> float:
        """Return the standard deviation of the noise on the mean over a batch."""
        return self.noise_multiplier * self.bound / batch_size

    def disturb(self, mean: Vector, batch_size: int, rng: np.random.Generator) -> None:
        """Add the noise to the mean of a batch's clipped gradients, float32 [P], in place."""
        std = self.noise_std(batch_size)
        if std:
            mean += np.float32(std) * rng.standard_normal(mean.shape, dtype=np.float32)

    @override
    def undo(self, observations: Observations, known: Known) -> Observations:
        if self.noise_multiplier:
            std = self.noise_std(known.batch_size) * math.sqrt(observations.local_steps)
            observations = denoised(observations, known, std)
        factors = scale_estimate(observations, known.posterior)
        return scaled(observations, factors, known.tensors)

    @override
    def imitate(self, simulated: Observations, rng: np.random.Generator) -> Observations:
        """Return simulated observations with the noise alone.

        Mean gradients do not tell how far each sample's would have been clipped. Row sums without
        their weight gradients stay as they are.
        """
        steps = simulated.local_steps
        sizes = np.asarray(simulated.labels, dtype=np.float64) / steps
        # The steps' gradients are summed, each with noise of its own.
        std = math.sqrt(steps) * self.noise_multiplier * self.bound / sizes

        def noise(values: Any) -> NDArray[np.floating[Any]]:
            array = np.asarray(values)
            drawn = rng.standard_normal(array.shape, dtype=np.float32)
            drawn *= std.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))
            return drawn.astype(array.dtype, copy=False)

        bias, weight, rows = simulated.bias_gradient, simulated.weight_gradient, simulated.row_sums
        if bias is not None:
            bias = np.asarray(bias) + noise(bias)
        if weight is not None:
            added = noise(weight)
            weight, rows = np.asarray(weight) + added, np.asarray(rows) + added.sum(axis=2)
        return replace(simulated, bias_gradient=bias, weight_gradient=weight, row_sums=rows)
