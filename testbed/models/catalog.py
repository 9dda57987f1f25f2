"""What is known of the built-in models without building them. Imports no torch.

Source of the architectures: Wainakh et al., "User-Level Label Leakage from Gradients in
Federated Learning", PoPETs 2022, section 5. Two points differ from the reference code: the FCNN
has no softmax (the loss applies one) and the LeNet convolves 3x3 whatever the number of channels.
The variants with another normalisation are not the paper's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from testbed.errors import UserError, suggest

Shape = tuple[int, int, int]
"""Channels, height and width of one input image."""

ACTIVATIONS = ("sigmoid", "relu", "tanh", "selu", "leaky_relu")
"""Activations that every built-in model accepts; one choice replaces all of a model's."""

INITS = ("uniform", "torch")
"""Initialisations: "uniform" draws every weight and bias, BatchNorm's too, from
uniform(-0.5, 0.5), as the paper does; "torch" keeps the module's own initialisation."""

CNN_CHANNELS = 12
CNN_STRIDES = (2, 2, 1)
FCNN_HIDDEN = 588
LENET_CHANNELS = (6, 16)
LENET_HIDDEN = (120, 84)
RESNET_CHANNELS = (16, 32, 64)
RESNET_BLOCKS = 3
RESNET_HIDDEN = 512
GROUPS = 4
"""Of every GroupNorm: 3 channels each in the ConvNet, 4 to 16 in the ResNet."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a built-in model.

    Attributes
    ----------
    name
        What `model.name` says in the experiment file.
    description
        The architecture, in one line.
    default_activation
        The paper's choice, one of `ACTIVATIONS`.
    min_size
        Smallest height and width of an input, in pixels.
    features
        Maps an input shape to D, the input width of the last layer. Valid for the shapes that
        `check_input` accepts.
    parameters
        Maps an input shape and the number of classes to the number of trainable parameters.
        Valid for the shapes that `check_input` accepts.
    buffers
        Number of floating-point values in buffers: BatchNorm's running statistics.
    """

    name: str
    description: str
    default_activation: str
    min_size: int
    features: Callable[[Shape], int]
    parameters: Callable[[Shape, int], int]
    buffers: int = 0


def is_import_path(name: str) -> bool:
    """Return whether a model's name is an import path, "package.module:callable"."""
    return ":" in name


def model_info(name: str) -> ModelInfo:
    """Return the facts of a built-in model.

    Raises
    ------
    UserError
        If there is no such model.
    """
    if name not in MODELS:
        raise UserError(
            f"model {name!r} is not built in: {suggest(name, MODELS)};"
            " a model of your own is named by its import path, 'package.module:callable'"
        )
    return MODELS[name]


def check_input(info: ModelInfo, shape: Shape, classes: int) -> None:
    """Check that a built-in model can take images of a shape and tell so many classes apart.

    Raises
    ------
    UserError
        If the images are too small or have no channel, or there are fewer than two classes.
    """
    channels, height, width = shape
    if channels < 1 or min(height, width) < info.min_size:
        fitting = [m.name for m in MODELS.values() if m.min_size <= min(height, width)]
        use = f"use one of {', '.join(fitting)}, or larger images" if fitting else "mend the shape"
        raise UserError(
            f"model {info.name!r} cannot take images of {channels}x{height}x{width}: expected at"
            f" least 1 channel and {info.min_size}x{info.min_size} pixels; {use}"
        )
    if classes < 2:
        raise UserError(
            f"model {info.name!r} got {classes} classes, expected at least 2; check the labels of"
            " the data set"
        )


def lenet_flattened(shape: Shape) -> int:
    """Return the width of the LeNet's flattened feature maps: 400 for 28x28, 576 for 32x32."""
    _, height, width = shape
    return LENET_CHANNELS[1] * _lenet_size(height) * _lenet_size(width)


def _lenet_size(size: int) -> int:
    for _ in LENET_CHANNELS:
        size = (size - 2) // 2
    return size


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return outputs * (inputs * kernel**2 + 1)


def _linear(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


def _cnn_features(shape: Shape) -> int:
    _, height, width = shape
    for stride in CNN_STRIDES:
        height, width = -(-height // stride), -(-width // stride)
    return CNN_CHANNELS * height * width


def _cnn_parameters(shape: Shape, classes: int) -> int:
    convolutions = _conv(shape[0], CNN_CHANNELS, 5) + 2 * _conv(CNN_CHANNELS, CNN_CHANNELS, 5)
    return convolutions + _linear(_cnn_features(shape), classes)


def _normed_cnn_parameters(shape: Shape, classes: int) -> int:
    return _cnn_parameters(shape, classes) + len(CNN_STRIDES) * 2 * CNN_CHANNELS


def _fcnn_parameters(shape: Shape, classes: int) -> int:
    channels, height, width = shape
    hidden = _linear(channels * height * width, FCNN_HIDDEN) + _linear(FCNN_HIDDEN, FCNN_HIDDEN)
    return hidden + _linear(FCNN_HIDDEN, classes)


def _lenet_parameters(shape: Shape, classes: int) -> int:
    convolutions = _conv(shape[0], LENET_CHANNELS[0], 3) + _conv(*LENET_CHANNELS, 3)
    hidden = _linear(lenet_flattened(shape), LENET_HIDDEN[0]) + _linear(*LENET_HIDDEN)
    return convolutions + hidden + _linear(LENET_HIDDEN[1], classes)


def _resnet20_parameters(shape: Shape, classes: int) -> int:
    def conv_norm(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 2 * outputs

    width = RESNET_CHANNELS[0]
    total = conv_norm(shape[0], width)
    for outputs in RESNET_CHANNELS:
        total += conv_norm(width, outputs) + (2 * RESNET_BLOCKS - 1) * conv_norm(outputs, outputs)
        width = outputs
    return total + _linear(width, RESNET_HIDDEN) + _linear(RESNET_HIDDEN, classes)


# From 5x5 on, the last feature maps, a quarter of the size, hold several values: BatchNorm cannot
# normalise a batch of one image over a single value.
_BATCH_NORM_SIZE = 5

MODELS: Mapping[str, ModelInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            ModelInfo(
                name="cnn",
                description="3 convolutions 5x5 of 12 channels, strides 2, 2, 1; linear",
                default_activation="sigmoid",
                min_size=1,
                features=_cnn_features,
                parameters=_cnn_parameters,
            ),
            ModelInfo(
                name="cnn_bn",
                description="cnn with BatchNorm after each convolution",
                default_activation="relu",
                min_size=_BATCH_NORM_SIZE,
                features=_cnn_features,
                parameters=_normed_cnn_parameters,
                # Mean and variance of each channel.
                buffers=len(CNN_STRIDES) * 2 * CNN_CHANNELS,
            ),
            ModelInfo(
                name="cnn_gn",
                description="cnn with GroupNorm of 4 groups after each convolution",
                default_activation="relu",
                min_size=1,
                features=_cnn_features,
                parameters=_normed_cnn_parameters,
            ),
            ModelInfo(
                name="fcnn",
                description="fully connected, 2 hidden layers of 588",
                default_activation="relu",
                min_size=1,
                features=lambda _: FCNN_HIDDEN,
                parameters=_fcnn_parameters,
            ),
            ModelInfo(
                name="lenet",
                description="2 convolutions 3x3 of 6 and 16 channels with max pooling;"
                " linear 120, 84",
                default_activation="relu",
                min_size=10,
                features=lambda _: LENET_HIDDEN[1],
                parameters=_lenet_parameters,
            ),
            ModelInfo(
                name="resnet20",
                description="ResNet-20 of 16, 32, 64 channels, BatchNorm, parameter-free"
                " shortcuts; linear 512 without activation",
                default_activation="relu",
                min_size=_BATCH_NORM_SIZE,
                features=lambda _: RESNET_HIDDEN,
                parameters=_resnet20_parameters,
                # Mean and variance: the first layer, then six of each width.
                buffers=2 * (16 + 6 * (16 + 32 + 64)),
            ),
            ModelInfo(
                name="resnet20_gn",
                description="resnet20 with GroupNorm of 4 groups in place of BatchNorm",
                default_activation="relu",
                min_size=1,
                features=lambda _: RESNET_HIDDEN,
                parameters=_resnet20_parameters,
            ),
        )
    }
)
"""The built-in models by name."""
