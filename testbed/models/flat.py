"""A module whose parameters, gradients and buffers live in flat tensors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.defenses.base import Tensors
from testbed.errors import UserError
from testbed.models.last_layer import LastLayer
from testbed.update import UpdateLayout


def flat_state(module: torch.nn.Module) -> torch.Tensor:
    """Return a module's values as `FlatModel.state` has them, float32 [parameters + buffers]."""
    buffers = (buffer for buffer in module.buffers() if buffer.is_floating_point())
    return torch.cat([tensor.detach().reshape(-1) for tensor in (*module.parameters(), *buffers)])


class FlatModel:
    """A module bound to flat float32 tensors, so that a model or an update is one copy.

    The module's parameters and float buffers become views of `state`, so that loading a model
    writes one tensor; gradients are written into one.

    Attributes
    ----------
    module
        The module, on ``device``.
    layout
        Where parameters, buffers and the last layer lie.
    tensors
        Where each parameter tensor lies.
    frozen
        Where the parameters lie that are not trained.
    state
        float32 [parameters + buffers]: parameters, then float buffers (BatchNorm's statistics).
    """

    def __init__(
        self, module: torch.nn.Module, last_layer: LastLayer, device: torch.device
    ) -> None:
        self.module = module.to(device)
        self.last_layer = last_layer
        parameters = dict(module.named_parameters())
        floats = {
            name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()
        }
        for name, tensor in (parameters | floats).items():
            if tensor.dtype != torch.float32:
                raise UserError(
                    f"model: {name} is {tensor.dtype}, expected torch.float32 parameters and "
                    "buffers: convert the model with .float()"
                )
        sizes = {name: tensor.numel() for name, tensor in (parameters | floats).items()}
        offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        length = sum(tensor.numel() for tensor in parameters.values())
        self.layout = UpdateLayout(
            parameters=length,
            buffers=sum(sizes.values()) - length,
            classes=last_layer.classes,
            features=last_layer.features,
            weight=offsets[last_layer.weight],
            bias=None if last_layer.bias is None else offsets[last_layer.bias],
        )
        self.tensors = Tensors(
            names=tuple(parameters),
            offsets=np.cumsum([0, *(tensor.numel() for tensor in parameters.values())]),
            weight=slice(
                self.layout.weight,
                self.layout.weight + last_layer.classes * last_layer.features,
            ),
            bias=None
            if self.layout.bias is None
            else slice(self.layout.bias, self.layout.bias + last_layer.classes),
            classes=last_layer.classes,
        )
        self.state = torch.empty(self.layout.size, device=device)
        with torch.no_grad():
            for name, tensor in (parameters | floats).items():
                place = slice(offsets[name], offsets[name] + sizes[name])
                view = self.state[place].view(tensor.shape)
                view.copy_(tensor)
                tensor.data = view
        # Counters (BatchNorm's number of batches) would remember which clients a rank served.
        self._counters = [
            (buffer, buffer.clone())
            for buffer in module.buffers()
            if not buffer.is_floating_point()
        ]
        self.frozen = [
            slice(offsets[name], offsets[name] + sizes[name])
            for name, parameter in parameters.items()
            if not parameter.requires_grad
        ]
        self._trained = [p for p in parameters.values() if p.requires_grad]
        # A frozen parameter has its place in an update, and no gradient.
        self._zeros = {
            place: torch.zeros(parameter.numel(), device=device)
            for place, parameter in enumerate(parameters.values())
            if not parameter.requires_grad
        }

    def load(self, state: torch.Tensor) -> None:
        """Set parameters and buffers from a flat tensor [parameters + buffers]."""
        self.state.copy_(state)
        self._reset_counters()

    @property
    def buffers(self) -> torch.Tensor:
        """The float buffers, [buffers], a view of `state`."""
        return self.state[self.layout.parameters :]

    def load_buffers(self, buffers: torch.Tensor) -> None:
        """Set the buffers alone, from a flat tensor [buffers]; parameters stay as they are."""
        self.buffers.copy_(buffers)
        self._reset_counters()

    def gradient(
        self, loss: torch.Tensor, out: torch.Tensor, *, retain_graph: bool = False
    ) -> None:
        """Compute the gradient of a loss.

        Parameters
        ----------
        loss
            A scalar that the module's parameters led to.
        out
            float32 [parameters], on the model's device: receives the gradient, zero where a
            parameter has no part in the loss.
        retain_graph
            Whether another gradient through the same graph will be asked for.
        """
        torch.cat(self._parts(loss, retain_graph=retain_graph), out=out)

    def gradient_with_graph(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a loss as `gradient` does, float32 [parameters], differentiable.

        For attacks that match gradients: a derivative of the gradient may be taken.
        """
        return torch.cat(self._parts(loss, create_graph=True))

    def _parts(
        self, loss: torch.Tensor, *, retain_graph: bool = False, create_graph: bool = False
    ) -> list[torch.Tensor]:
        computed = iter(
            torch.autograd.grad(
                loss,
                self._trained,
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        total = len(self._trained) + len(self._zeros)
        return [
            self._zeros[place] if place in self._zeros else next(computed).reshape(-1)
            for place in range(total)
        ]

    @torch.no_grad()
    def outputs(
        self, batches: Iterable[torch.Tensor]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return posteriors [n, C] and the last layer's inputs [n, D] over batches of inputs."""
        posteriors: list[NDArray[np.float64]] = []
        features: list[NDArray[np.float64]] = []
        caught: list[torch.Tensor] = []

        def catch(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught.append(inputs[0] if inputs else named["input"])

        layer = self.module.get_submodule(self.last_layer.name)
        hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                caught.clear()
                logits = self.module(batch)
                posteriors.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
                # The last run of the layer made the logits. A view may follow it, so that its
                # input may have more axes.
                value = caught[-1].reshape(-1, self.layout.features)
                features.append(value.double().cpu().numpy())
        finally:
            hook.remove()
        return np.concatenate(posteriors), np.concatenate(features)

    def _reset_counters(self) -> None:
        for buffer, initial in self._counters:
            buffer.copy_(initial)
