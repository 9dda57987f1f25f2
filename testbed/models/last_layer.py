"""The layer whose gradient the attacks read, found by running the model once."""

import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from testbed.errors import UserError, suggest
from testbed.models.catalog import Shape

_BATCH = 2


@dataclass(frozen=True)
class LastLayer:
    """The linear layer that makes the logits, `z = W h + b`.

    Attributes
    ----------
    name
        The layer's name among `named_modules`.
    weight
        W's name among `named_parameters`; W is [classes, features]. Where W is tied to another
        layer, this is the name that `named_parameters` gives it, maybe the other layer's.
    bias
        b's name among `named_parameters`, or None for a layer without bias; b is [classes].
    classes
        C, the number of logits.
    features
        D, the width of h.
    """

    name: str
    weight: str
    bias: str | None
    classes: int
    features: int


@dataclass(frozen=True)
class _Call:
    """One run of a linear layer. Holds its output, whose memory must not be used again."""

    layer: nn.Linear
    output: torch.Tensor
    version: int


def find_last_layer(
    module: nn.Module, shape: Shape, classes: int, name: str | None = None
) -> LastLayer:
    """Find the linear layer whose output is the model's output.

    The model runs once, in evaluation mode and without gradients, on two black images. The order
    of definition is of no matter, and what does not change the logits (a view, a dropout in
    evaluation mode) may follow the layer. Modes, buffers and torch's global random state are
    left as they were.

    A weight that is tied to another layer, or a layer that runs several times in one forward
    pass, is accepted. Its gradient is then a sum of which `(p - onehot)^T h / B` is one term
    only: attacks that rest on the closed form see the rest as an error.

    Parameters
    ----------
    module
        The model: [n, *shape] float32 to logits [n, classes].
    shape
        Channels, height and width of an input.
    classes
        Number of classes.
    name
        The layer's name, if it is not to be searched for; needed where something follows it.

    Raises
    ------
    UserError
        If the model cannot run on images of that shape, its output is not [n, classes], the
        output is not that of a linear layer, the named layer does not suit, or the weight found
        is not a trainable parameter of its own.
    """
    calls, output = _trace(module, shape)
    if not isinstance(output, torch.Tensor):
        raise UserError(
            f"the model returned {type(output).__name__}, expected a tensor of logits"
            f" [n, {classes}]; return the logits alone"
        )
    if output.shape != (_BATCH, classes):
        raise UserError(
            f"the model maps {_BATCH} images of {_times(shape)} to an output of"
            f" {list(output.shape)}, expected [{_BATCH}, {classes}]; give it one output per class"
        )
    if not calls:
        raise UserError(
            "the model ran no torch.nn.Linear layer, expected one that makes the logits; end the"
            " model with one"
        )
    names = {id(m): n for n, m in module.named_modules()}
    if name is not None:
        layer = _named(module, name, classes, calls)
        return _describe(module, name, layer)
    for call in reversed(calls):
        if _is_output(call, output):
            return _describe(module, names[id(call.layer)], call.layer)
    raise UserError(
        "the model's output is not the output of a torch.nn.Linear layer:"
        f" {names[id(calls[-1].layer)]!r} ran last, and something follows it; return its logits"
        " (a softmax belongs in the loss), or name the layer in `model.last_layer`"
    )


def _trace(module: nn.Module, shape: Shape) -> tuple[list[_Call], object]:
    """Run the model on black images; return the runs of linear layers, in order, and the output."""
    calls: list[_Call] = []

    def record(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(layer, nn.Linear) and isinstance(output, torch.Tensor):
            calls.append(_Call(layer, output, output._version))

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    images = torch.zeros(_BATCH, *shape, device=device)
    with ExitStack() as stack:
        stack.enter_context(_left_as_it_was(module))
        # Not inference_mode: its tensors have no version, which tells of changes in place.
        stack.enter_context(torch.no_grad())
        for child in module.modules():
            if isinstance(child, nn.Linear):
                stack.callback(child.register_forward_hook(record).remove)
        module.eval()
        try:
            output = module(images)
        except Exception as error:
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
            raise UserError(
                f"the model cannot run on {_BATCH} images of {_times(shape)}: {reason}; choose a"
                " data set that it takes, or mend the model"
            ) from error
    return calls, output


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    buffers = [
        (child, key, buffer, buffer.clone())
        for child in module.modules()
        for key, buffer in child.named_buffers(recurse=False)
    ]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for child, mode in modes:
                child.training = mode
            with torch.no_grad():
                for child, key, buffer, values in buffers:
                    setattr(child, key, buffer.copy_(values))


def _is_output(call: _Call, output: torch.Tensor) -> bool:
    """Return whether the output is the layer's own memory, unchanged and in the same order."""
    same_memory = call.output.data_ptr() == output.data_ptr()
    same_order = call.output.numel() == output.numel() and (
        call.output.is_contiguous() and output.is_contiguous()
    )
    return same_memory and same_order and output._version == call.version


def _named(module: nn.Module, name: str, classes: int, calls: list[_Call]) -> nn.Linear:
    modules = dict(module.named_modules(remove_duplicate=False))
    if name not in modules:
        linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        raise UserError(f"model.last_layer {name!r} is not in the model: {suggest(name, linear)}")
    layer = modules[name]
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"model.last_layer {name!r} is {type(layer).__name__}, expected torch.nn.Linear; name"
            " the linear layer that makes the logits"
        )
    if all(call.layer is not layer for call in calls):
        raise UserError(
            f"model.last_layer {name!r} does not run in the forward pass, expected the layer that"
            " makes the logits; name one that runs"
        )
    if layer.out_features != classes:
        raise UserError(
            f"model.last_layer {name!r} has {layer.out_features} outputs, expected {classes}, one"
            " per class; name the linear layer that makes the logits"
        )
    return layer


def _describe(module: nn.Module, name: str, layer: nn.Linear) -> LastLayer:
    # By identity: named_parameters lists a tied tensor once, under its first owner's name.
    names = {id(p): n for n, p in module.named_parameters()}
    parts: dict[str, torch.Tensor | None] = {"weight": layer.weight, "bias": layer.bias}
    for part, tensor in parts.items():
        if tensor is None:
            continue
        if id(tensor) not in names:
            raise UserError(
                f"the {part} of the last layer {name!r} is computed from other parameters,"
                " expected a parameter of its own, whose gradient is shared; remove its"
                " parametrization (weight or spectral norm)"
            )
        if not tensor.requires_grad:
            raise UserError(
                f"the {part} of the last layer {name!r} is frozen, expected requires_grad=True:"
                " an update without its gradient leaks nothing to these attacks; train it"
            )
    return LastLayer(
        name=name,
        weight=names[id(layer.weight)],
        bias=names.get(id(layer.bias)),
        classes=layer.out_features,
        features=layer.in_features,
    )


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))
