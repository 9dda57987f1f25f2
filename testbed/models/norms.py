"""BatchNorm layers: how many values they normalise by, and where their statistics lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from testbed.models.flat import FlatModel

Norm = torch.nn.modules.batchnorm._BatchNorm


def statistics_length(module: torch.nn.Module) -> int:
    """Return how many running means and variances a module's BatchNorm layers keep."""
    return sum(
        buffer.numel()
        for norm in module.modules()
        if isinstance(norm, Norm)
        for name, buffer in norm.named_buffers()
        if name in ("running_mean", "running_var")
    )


@dataclass(frozen=True)
class Track:
    """Where a norm's running statistics lie in the buffers; its values per channel of an image."""

    norm: Norm
    mean: slice
    variance: slice
    positions: int


class Norms:
    """The BatchNorm layers of a model, as a trial run in inference mode finds them.

    Attributes
    ----------
    tracks
        Those that run once in a forward pass and keep running statistics.
    single_values
        Whether one of them normalises a single value per channel of an image, as after a linear
        layer: of a batch of one image it then has no variance, and PyTorch refuses.
    undoable
        Whether a track has a momentum, with which a server can undo its running averages.
    """

    def __init__(self, model: FlatModel, shape: tuple[int, int, int]) -> None:
        named = {
            norm: name for name, norm in model.module.named_modules() if isinstance(norm, Norm)
        }
        positions: dict[torch.nn.Module, list[int]] = {norm: [] for norm in named}

        def note(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            positions[norm].append(inputs[0][0, 0].numel())

        model.module.eval()
        hooks = [norm.register_forward_pre_hook(note) for norm in named]
        try:
            model.outputs([torch.zeros((1, *shape), device=model.state.device)])
        finally:
            for hook in hooks:
                hook.remove()
        places, start = {}, 0
        for name, buffer in model.module.named_buffers():
            if buffer.is_floating_point():
                places[name] = slice(start, start + buffer.numel())
                start += buffer.numel()
        self.tracks: Sequence[Track] = [
            Track(norm, places[f"{name}.running_mean"], places[f"{name}.running_var"], once[0])
            for norm, name in named.items()
            if len(once := positions[norm]) == 1
            if f"{name}.running_var" in places
        ]
        self.single_values = any(1 in found for found in positions.values())
        self.undoable = any(track.norm.momentum for track in self.tracks)
