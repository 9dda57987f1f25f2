"""What the model's outputs on auxiliary samples say of each class; classes may lack samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from testbed.attacks.base import Outputs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassMeans:
    """Means over the auxiliary samples of each class.

    A class without samples (``adversary.auxiliary_missing``) has the mean of the other classes'
    means: the best guess of who knows nothing of it.

    Attributes
    ----------
    present
        bool [C]: which classes have samples.
    posterior
        float64 [C, C]: mean posterior over the samples of a class, ``P[class, i]``.
    features
        float64 [C, D]: mean features.
    mass
        float64 [C]: mean feature sum, H.
    weighted
        float64 [C, C]: mean of posterior times feature sum.
    """

    present: NDArray[np.bool_]
    posterior: Floats
    features: Floats
    mass: Floats
    weighted: Floats

    @property
    def mean_posterior(self) -> Floats:
        """Posterior [C], the mean over classes: that of class-balanced samples, pbar."""
        mean: Floats = self.posterior[self.present].mean(axis=0)
        return mean


def class_means(outputs: Outputs) -> ClassMeans:
    """Return the means of each class.

    Parameters
    ----------
    outputs
        On labelled samples.

    Raises
    ------
    ValueError
        The outputs have no labels.
    """
    if outputs.labels is None:
        raise ValueError("class means need the labels of the samples")
    classes = outputs.posterior.shape[1]
    member = np.eye(classes)[outputs.labels]
    size = member.sum(axis=0)
    present = size > 0

    def mean(values: Floats) -> Floats:
        values = np.where(np.isfinite(values), values, np.nan)  # of a model that diverged
        means: Floats = member.T @ values / np.maximum(size, 1)[:, None]
        means[~present] = means[present].mean(axis=0)
        return means

    mass = outputs.features.sum(axis=1)
    return ClassMeans(
        present=present,
        posterior=mean(outputs.posterior),
        features=mean(outputs.features),
        mass=mean(mass[:, None])[:, 0],
        weighted=mean(outputs.posterior * mass[:, None]),
    )
