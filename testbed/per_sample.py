"""Gradients of single samples, clipped and averaged: what DP-SGD needs of the model."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from testbed.errors import UserError
from testbed.models.flat import FlatModel

# Entries of samples' gradients at once: 64 MiB in float32. With more, they leave the caches.
_AT_ONCE = 1 << 24


def supports(module: nn.Module) -> str:
    """Return why a sample has no gradient of its own in a module as its modes are now, or "".

    With BatchNorm that normalises by the batch, a sample's loss depends on the others, and
    statistics that a forward pass updates are no function of one sample.
    """
    for name, layer in module.named_modules():
        named = f"layer {name!r} is {type(layer).__name__}, which"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.running_mean is None:
                return f"{named} always normalises by the batch; use GroupNorm in its place"
            if layer.training:
                return (
                    f"{named} normalises by the batch; use GroupNorm in its place (models cnn_gn,"
                    " resnet20_gn), or set federation.batch_norm: frozen"
                )
        own = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if own and layer.training and layer.track_running_stats:
            return f"{named} keeps running statistics; set its track_running_stats to False"
    return ""


class PerSampleGradients:
    """Averages the clipped gradients of the samples of a batch.

    Parameters
    ----------
    model
        Its values are read anew at each call. Samples run one by one as far as the module can
        tell, by `torch.func.vmap`; dropout draws for each.
    at_once
        Upper bound on the gradients' entries that are held at a time, at least one sample's. It
        changes the result by rounding only, and by what dropout draws.
    """

    def __init__(self, model: FlatModel, at_once: int = _AT_ONCE) -> None:
        self._model = model
        self._chunk = max(1, at_once // max(1, model.layout.parameters))
        named = dict(model.module.named_parameters())
        self._trained: Mapping[str, torch.Tensor] = {
            name: parameter for name, parameter in named.items() if parameter.requires_grad
        }
        ends = np.cumsum([0, *(parameter.numel() for parameter in named.values())])
        self._starts = dict(zip(named, ends.tolist(), strict=False))
        self._each = vmap(
            grad_and_value(self._loss, has_aux=True), (None, 0, 0), randomness="different"
        )

    def mean_clipped(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        bounds: NDArray[np.int64],
        bound: float,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mean of the samples' gradients of the cross entropy, each clipped.

        Parameters
        ----------
        inputs
            float32 [B, channels, height, width].
        targets
            float32 [B, C]: label distributions.
        bounds
            int64 [parts + 1]: where the parts of a gradient begin that are clipped one by one, and
            the end: boundaries of tensors.
        bound
            On the Euclidean norm of each part: it is multiplied by ``min(1, bound / norm)``.
        out
            float32 [P], on the model's device: receives the mean, without noise; zero where a
            parameter is frozen.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            The mean loss, a scalar, and the logits [B, C], both detached.

        Raises
        ------
        UserError
            The module has layers that mix samples (`supports`), or does what vmap cannot.
        """
        reason = supports(self._model.module)
        if reason:
            raise UserError(f"defence 'dp_sgd' needs gradients of single samples: {reason}")
        out.zero_()
        losses, logits = [], []
        for start in range(0, len(inputs), self._chunk):
            some = slice(start, start + self._chunk)
            gradients, loss, answers = self._run(inputs[some], targets[some])
            self._add(gradients, bounds, bound, out)
            losses.append(loss)
            logits.append(answers)
        out /= len(inputs)
        return torch.cat(losses).mean(), torch.cat(logits)

    def _loss(
        self, trained: Mapping[str, torch.Tensor], image: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = functional_call(self._model.module, dict(trained), (image[None],))
        return nn.functional.cross_entropy(logits, target[None]), logits[0].detach()

    def _run(
        self, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        values = {name: parameter.detach() for name, parameter in self._trained.items()}
        try:
            gradients, (loss, logits) = self._each(values, inputs, targets)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            line = str(error).strip().partition("\n")[0][:300]
            raise UserError(
                "defence 'dp_sgd' needs gradients of single samples, which torch.func.vmap cannot"
                f" take of this model: {line}; change the layer, or leave the defence out"
            ) from error
        return gradients, loss, logits

    def _add(
        self,
        gradients: Mapping[str, torch.Tensor],
        bounds: NDArray[np.int64],
        bound: float,
        out: torch.Tensor,
    ) -> None:
        flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
        part_of = {
            name: int(np.searchsorted(bounds, self._starts[name], side="right")) - 1
            for name in flat
        }
        parts = torch.zeros((len(bounds) - 1, len(next(iter(flat.values())))), device=out.device)
        for name, rows in flat.items():
            # Of the norms, not of the squares, which would overflow sooner.
            part = parts[part_of[name]]
            part.copy_(torch.hypot(part, torch.linalg.vector_norm(rows, dim=1)))
        factors = bound / parts.clamp(min=bound)
        for name, rows in flat.items():
            start = self._starts[name]
            place = out[start : start + rows.shape[1]]
            place.addmv_(rows.T, factors[part_of[name]])
