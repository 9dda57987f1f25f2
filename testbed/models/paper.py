"""The paper's models as torch modules. Every one returns logits, [n, classes].

Source: Wainakh et al., PoPETs 2022, section 5; the facts are in `testbed.models.catalog`. The
last layer is called `classifier` in every model. Models ending in ``_bn`` and ``_gn`` are the
paper's with another normalisation: BatchNorm's statistics travel with an update, GroupNorm has
none.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional

from testbed.models import catalog
from testbed.models.catalog import Shape

Activation = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]
"""Makes the normalisation of a number of channels."""

ACTIVATION_MODULES: Mapping[str, Activation] = MappingProxyType(
    {
        "sigmoid": nn.Sigmoid,
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "selu": nn.SELU,
        "leaky_relu": nn.LeakyReLU,
    }
)
"""What makes each of `catalog.ACTIVATIONS`, with torch's default slopes."""


def group_norm(channels: int) -> nn.Module:
    """Build a GroupNorm (Wu and He, ECCV 2018) of `catalog.GROUPS` groups."""
    return nn.GroupNorm(catalog.GROUPS, channels)


def cnn(shape: Shape, classes: int, activation: Activation, norm: Norm | None = None) -> nn.Module:
    """Build the paper's ConvNet: three 5x5 convolutions of 12 channels, then one linear layer.

    A normalisation, which the paper's has not, stands after each convolution.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[0]
    for i, stride in enumerate(catalog.CNN_STRIDES, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, catalog.CNN_CHANNELS, 5, stride, padding=2)
        if norm is not None:
            layers[f"norm{i}"] = norm(catalog.CNN_CHANNELS)
        layers[f"activation{i}"] = activation()
        channels = catalog.CNN_CHANNELS
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(catalog.MODELS["cnn"].features(shape), classes)
    return nn.Sequential(layers)


def fcnn(shape: Shape, classes: int, activation: Activation) -> nn.Module:
    """Build the fully connected network, without the softmax that the reference code appends."""
    channels, height, width = shape
    hidden = catalog.FCNN_HIDDEN
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=nn.Linear(channels * height * width, hidden),
            activation1=activation(),
            hidden2=nn.Linear(hidden, hidden),
            activation2=activation(),
            classifier=nn.Linear(hidden, classes),
        )
    )


def lenet(shape: Shape, classes: int, activation: Activation) -> nn.Module:
    """Build the LeNet of PyTorch's tutorial, with 3x3 convolutions."""
    first, second = catalog.LENET_CHANNELS
    wide, narrow = catalog.LENET_HIDDEN
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], first, 3),
            activation1=activation(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 3),
            activation2=activation(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden1=nn.Linear(catalog.lenet_flattened(shape), wide),
            activation3=activation(),
            hidden2=nn.Linear(wide, narrow),
            activation4=activation(),
            classifier=nn.Linear(narrow, classes),
        )
    )


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut without parameters.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: where the
    size changes, the shortcut takes every second pixel and pads the channels with zeros
    (option A).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activation: Activation,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.activation2 = activation()
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, inputs, H, W] to [n, outputs, ceil(H / stride), ceil(W / stride)]."""
        residual: torch.Tensor = self.activation1(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        out: torch.Tensor = self.activation2(residual + shortcut)
        return out


class GlobalAveragePool(nn.Module):
    """The mean of each feature map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, channels, H, W] to [n, channels]."""
        # Not AdaptiveAvgPool2d: its backward pass on CUDA adds in no fixed order.
        return x.mean(dim=(2, 3))


def resnet20(
    shape: Shape, classes: int, activation: Activation, norm: Norm = nn.BatchNorm2d
) -> nn.Module:
    """Build the CIFAR ResNet-20 with two linear layers, 64-512-classes, at its end.

    There is no activation between the two: the features of the last layer can be negative, so
    that property 1 of LLG is not guaranteed.
    """
    width = catalog.RESNET_CHANNELS[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        norm=norm(width),
        activation=activation(),
    )
    for i, outputs in enumerate(catalog.RESNET_CHANNELS, start=1):
        blocks: list[nn.Module] = []
        for _ in range(catalog.RESNET_BLOCKS):
            stride = 1 if outputs == width else 2
            blocks.append(ResidualBlock(width, outputs, stride, activation, norm))
            width = outputs
        layers[f"stage{i}"] = nn.Sequential(*blocks)
    layers["pool"] = GlobalAveragePool()
    layers["hidden"] = nn.Linear(width, catalog.RESNET_HIDDEN)
    layers["classifier"] = nn.Linear(catalog.RESNET_HIDDEN, classes)
    return nn.Sequential(layers)


MODULES: Mapping[str, Callable[[Shape, int, Activation], nn.Module]] = MappingProxyType(
    {
        "cnn": cnn,
        "cnn_bn": partial(cnn, norm=nn.BatchNorm2d),
        "cnn_gn": partial(cnn, norm=group_norm),
        "fcnn": fcnn,
        "lenet": lenet,
        "resnet20": resnet20,
        "resnet20_gn": partial(resnet20, norm=group_norm),
    }
)
"""What builds each of `catalog.MODELS`."""
