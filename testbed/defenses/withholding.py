"""Defences that do not share the last layer's gradient, or not all of it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from testbed.defenses.base import Defense, Stage, Tensors, Vector
from testbed.defenses.registry import register

Percentile = Annotated[float, pydantic.Field(ge=0, le=100)]


@register
@dataclass(frozen=True, kw_only=True)
class WithholdLastLayer(Defense):
    """Shares the layers below the last one only.

    Attributes
    ----------
    head
        ``personal``: each client trains a last layer of its own, which it keeps from round to
        round. ``frozen``: the last layer stays what it was at first, at every client.
    """

    head: Literal["personal", "frozen"] = "personal"
    scope: Literal["update"] = "update"
    at: Literal["update"] = "update"

    name: ClassVar[str] = "withhold_last_layer"
    title: ClassVar[str] = "Last layer withheld"
    source: ClassVar[str] = "Arivazhagan et al., FedPer, 2019 (arXiv 1912.00818)"
    stage: ClassVar[Stage] = Stage.WITHHOLD
    adaptation: ClassVar[str] = (
        "Infers the last layer's bias gradient from the layers below (attack gradient_bridge)."
    )

    def kept(self, tensors: Tensors) -> NDArray[np.int64]:
        """Return the positions that are sent, int64 [k], ascending: all but the last layer's."""
        sent = np.ones(tensors.size, dtype=np.bool_)
        sent[tensors.weight] = False
        if tensors.bias is not None:
            sent[tensors.bias] = False
        return np.flatnonzero(sent)


@register
@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Zeroes the last layer's weight gradient for features that the images move little.

    Feature f of the last layer's input r has the score ``sum_i ||dr_if / dx_i|| / (r_if + 0.1)``
    over the batch (`testbed.soteria.feature_scores`). Columns of a score below the percentile are
    zeroed. As in the port that label attacks are tested against (iLRG, TFLlib), the bias gradient
    stays as it is, so that attacks on it see no defence; made against image reconstruction.

    Attributes
    ----------
    percentile
        In [0, 100]; 0 for no defence, 100 to keep the features of the largest score.
    """

    percentile: Percentile
    at: Literal["step"] = "step"

    name: ClassVar[str] = "soteria"
    title: ClassVar[str] = "Soteria"
    source: ClassVar[str] = "Sun et al., CVPR 2021, as ported by Ma et al. (iLRG, 2023)"
    stage: ClassVar[Stage] = Stage.WITHHOLD
    adaptation: ClassVar[str] = "Reads the bias gradient, which is left as it is."

    def mask(self, scores: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return which features are kept, bool [D], by their scores [D]."""
        kept: NDArray[np.bool_] = ~(np.abs(scores) < np.percentile(scores, self.percentile))
        return kept

    def apply_columns(self, vector: Vector, tensors: Tensors, keep: NDArray[np.bool_]) -> None:
        """Zero the columns of features that are not kept, in place, in a gradient float32 [P]."""
        vector[tensors.weight].reshape(tensors.classes, -1)[:, ~keep] = 0
