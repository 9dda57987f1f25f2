"""What a client does to BatchNorm's statistics before it shares them."""

import numpy as np
import torch
from numpy.typing import NDArray

# A variance is lowered to no less than this share of itself: it has to stay one.
_LEAST = 0.01


class NoisyStatistics:
    """Adds noise to running means and variances, each on its own scale.

    Parameters
    ----------
    module
        The model. Float buffers that are no running mean or variance are left alone.
    sigma
        A mean gets Gaussian noise of this many standard deviations of its channel, the root of the
        running variance; a variance v becomes ``v * max(1 + sigma z, 0.01)``, z standard normal.
    """

    def __init__(self, module: torch.nn.Module, sigma: float) -> None:
        self._sigma = sigma
        places: dict[str, NDArray[np.int64]] = {}
        start = 0
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                places[name] = np.arange(start, start + buffer.numel())
                start += buffer.numel()
        owners = [name.removesuffix("running_var") for name in places if _is_variance(name)]
        pairs = [owner for owner in owners if f"{owner}running_mean" in places]
        none = [np.zeros(0, np.int64)]
        self._means = np.concatenate(none + [places[f"{owner}running_mean"] for owner in pairs])
        self._variances = np.concatenate(none + [places[f"{owner}running_var"] for owner in pairs])

    def disturb(self, buffers: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Add the noise in place.

        Parameters
        ----------
        buffers
            float32 [S]: all float buffers of the model, one after the other.
        rng
            Its state decides the noise.
        """
        variances = buffers[self._variances].astype(np.float64)
        shift, factor = self._sigma * rng.standard_normal((2, len(variances)))
        buffers[self._means] += (shift * np.sqrt(variances)).astype(np.float32)
        buffers[self._variances] = variances * np.maximum(1 + factor, _LEAST)


def _is_variance(name: str) -> bool:
    return name.rpartition(".")[2] == "running_var"
