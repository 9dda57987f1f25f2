"""A data set's samples as tensors on a device."""

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.data import Dataset


class Samples:
    """Images and labels of a data set, kept on a device.

    Attributes
    ----------
    labels
        int64 [n], on the host.
    shape
        Channels, height, width.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.device = device
        self.labels = dataset.labels
        self.shape = dataset.shape
        self._scale = dataset.scale
        self._images = torch.from_numpy(dataset.images).to(device)
        self._targets = torch.from_numpy(dataset.labels).to(device)

    def inputs(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return images as float32 [n, channels, height, width] in [0, 1]."""
        chosen = torch.from_numpy(indices).to(self.device)
        return self._images[chosen].to(torch.float32) * self._scale

    def targets(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return labels as int64 [n]."""
        return self._targets[torch.from_numpy(indices).to(self.device)]
