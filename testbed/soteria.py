"""How much the images of a batch move each feature: the scores of Soteria."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from testbed.models.flat import FlatModel

# Added to a feature before a score is divided by it, as in the authors' code.
_OFFSET = 0.1
# Entries of the images' derivatives at once: 16 MiB in float32, and the activations' on top.
_AT_ONCE = 1 << 22


def feature_scores(model: FlatModel, inputs: torch.Tensor, at_once: int = _AT_ONCE) -> torch.Tensor:
    """Return a score for each feature of the last layer's input, float32 [D].

    ``sum_i ||dr_if / dx_i||_2 / (r_if + 0.1)`` over the samples i of a batch, r the features
    (Sun et al., "Soteria", CVPR 2021, and their code). One forward pass in the mode that the
    module is in, one backward pass per feature, several of them at a time. Parameters, buffers
    and torch's global random state are left as they were: a training step that follows draws the
    same dropout.

    Parameters
    ----------
    model
        The model, as the batch is trained on.
    inputs
        float32 [B, channels, height, width], on the model's device.
    at_once
        Upper bound on the entries of derivatives that are held at a time, at least one feature's;
        no part of the result.
    """
    with _left_as_it_was(model, inputs.device):
        return _scores(model, inputs.detach().clone().requires_grad_(), at_once)


def _scores(model: FlatModel, images: torch.Tensor, at_once: int) -> torch.Tensor:
    features = _features(model, images)
    rows, width = features.shape
    norms = torch.empty((width, rows), device=images.device)
    chunk = max(1, at_once // images.numel())
    unit = torch.eye(width, device=images.device)
    for start in range(0, width, chunk):
        # Feature f of every sample: a sample's image moves its own features only, unless
        # BatchNorm mixes them, and then the authors' code sums as well.
        wanted = unit[start : start + chunk, None].expand(-1, rows, -1)
        (moved,) = torch.autograd.grad(
            features, images, wanted, retain_graph=True, is_grads_batched=True
        )
        norms[start : start + chunk] = torch.linalg.vector_norm(moved.flatten(2), dim=2)
    return (norms / (features.detach().T + _OFFSET)).sum(dim=1)


def _features(model: FlatModel, images: torch.Tensor) -> torch.Tensor:
    caught: list[torch.Tensor] = []

    def catch(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(inputs[0] if inputs else named["input"])

    layer = model.module.get_submodule(model.last_layer.name)
    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.module(images)
    finally:
        hook.remove()
    return caught[-1].reshape(-1, model.layout.features)


@contextmanager
def _left_as_it_was(model: FlatModel, device: torch.device) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.module.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)
