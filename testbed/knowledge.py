"""The adversary's auxiliary samples: the victims' kind, or of a shifted distribution."""

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.attacks.adversary import AuxiliarySamples
from testbed.data import Parts
from testbed.errors import UserError
from testbed.experiment import Scenario
from testbed.samples import Samples
from testbed.seeds import Purpose, stream


def auxiliary_samples(
    scenario: Scenario, samples: Samples, parts: Parts, classes: int, other: Samples | None
) -> AuxiliarySamples:
    """Return what the adversary owns, by the experiment's sections ``data`` and ``adversary``.

    Parameters
    ----------
    scenario
        Its section ``adversary`` says what is wrong with the samples.
    samples, parts
        The victims' data set, and its auxiliary part.
    classes
        C.
    other
        The data set that takes the place of the victims', or None.

    Raises
    ------
    UserError
        No class would be left, or the other data set has other classes or too few samples.
    """
    section, seed = scenario.adversary, scenario.seed
    # Each with a stream of its own: one thing that is wrong does not change another.
    streams = [stream(seed, Purpose.AUXILIARY, draw) for draw in range(3)]
    if section.auxiliary_missing >= classes:
        raise UserError(
            f"adversary.auxiliary_missing: {section.auxiliary_missing} of {classes} classes; "
            "expected at least one class with samples"
        )
    missing = streams[0].permutation(classes)[: section.auxiliary_missing]
    if other is None:
        inputs, labels = samples.inputs(parts.auxiliary), samples.labels[parts.auxiliary]
    else:
        chosen = _choose(other.labels, classes, scenario.data.auxiliary_per_class, streams[1])
        inputs, labels = other.inputs(chosen), other.labels[chosen]
        inputs = _fit(inputs, samples.shape)
    if section.auxiliary_noise:
        noise = streams[2].standard_normal(tuple(inputs.shape), np.float32)
        noise *= np.float32(section.auxiliary_noise)
        inputs = (inputs + torch.from_numpy(noise).to(inputs.device)).clamp(0, 1)
    kept = ~np.isin(labels, missing)
    return AuxiliarySamples(inputs[torch.from_numpy(kept).to(inputs.device)], labels[kept])


def _choose(
    labels: NDArray[np.int64], classes: int, per_class: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return indices of samples of every class, sorted by class."""
    counts = np.bincount(labels, minlength=classes)
    if len(counts) != classes or counts.min() < per_class:
        raise UserError(
            f"adversary.auxiliary_data: {per_class} samples of each of {classes} classes are "
            f"needed, the data set has {len(counts)} classes and {counts.min()} samples of the "
            "smallest"
        )
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    chosen: NDArray[np.int64] = order[(starts[:, None] + np.arange(per_class)).ravel()]
    return chosen


def _fit(inputs: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return images in another size and number of channels."""
    channels, height, width = shape
    if inputs.shape[1] != channels:
        inputs = inputs.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    if inputs.shape[2:] == (height, width):
        return inputs.contiguous()
    return torch.nn.functional.interpolate(
        inputs.contiguous(), (height, width), mode="bilinear", antialias=True
    ).clamp(0, 1)
