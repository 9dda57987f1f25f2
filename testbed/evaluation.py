"""How well a model classifies held-out samples."""

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.models.flat import FlatModel
from testbed.models.norms import Norm
from testbed.samples import Samples

_BATCH = 512


def accuracy(
    model: FlatModel,
    samples: Samples,
    indices: NDArray[np.int64],
    *,
    normalised_by_batch: bool = False,
) -> float:
    """Return the share of samples that a model classifies rightly, in inference mode.

    Parameters
    ----------
    model
        With the values to be judged loaded; they stay as they are.
    samples, indices
        int64 [n]: which samples; n > 0.
    normalised_by_batch
        Whether BatchNorm normalises by the batch that is being classified, 512 samples in a fixed
        order of chance, where running statistics mean nothing since clients keep theirs.
    """
    model.module.eval()
    if normalised_by_batch:
        indices = indices[np.random.default_rng(0).permutation(len(indices))]
        for norm in model.module.modules():
            if isinstance(norm, Norm):
                norm.train()
    before = model.buffers.clone()
    right = 0
    with torch.no_grad():
        # Equal parts: a batch of one has no variance.
        for batch in np.array_split(indices, -(-len(indices) // _BATCH)):
            guess = model.module(samples.inputs(batch)).argmax(dim=1)
            right += int((guess == samples.targets(batch)).sum())
    model.load_buffers(before)
    return right / len(indices)
