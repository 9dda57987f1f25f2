"""What travels: flat float32 buffers, where the last layer lies in them, and the message around."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HEADER = np.dtype(
    [
        ("scenario", "<i4"),
        ("round", "<i4"),
        ("client", "<i4"),
        ("identity", "<i4"),
        ("rank", "<i4"),
        ("steps", "<i4"),
        ("labels", "<i8"),
        ("clipped", "<i8"),
        ("weight", "<f8"),
        ("loss", "<f8"),
        ("accuracy", "<f8"),
        ("seconds", "<f8"),
        ("payload_bytes", "<i8"),
    ]
)
_ALIGNMENT = 64

Allocate = Callable[[int], NDArray[np.uint8]]


@dataclass(frozen=True)
class UpdateLayout:
    """Where things lie in a flat update: the gradient of every parameter, then the float buffers.

    Attributes
    ----------
    parameters, buffers
        Lengths of the two parts, in float32 elements.
    classes, features
        Shape of the last layer's weight, C x D.
    weight, bias
        Offsets of the last layer's weight and bias; ``bias`` is None for a layer without.
    """

    parameters: int
    buffers: int
    classes: int
    features: int
    weight: int
    bias: int | None

    @property
    def size(self) -> int:
        """Length of the whole update, in float32 elements."""
        return self.parameters + self.buffers

    def weight_gradient(self, flat: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last layer's weight part [C, D] of a flat update, a view."""
        stop = self.weight + self.classes * self.features
        return flat[self.weight : stop].reshape(self.classes, self.features)

    def bias_gradient(self, flat: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return the last layer's bias part [C] of a flat update, a view."""
        return None if self.bias is None else flat[self.bias : self.bias + self.classes]


def zeros(size: int) -> NDArray[np.uint8]:
    """Allocate ordinary memory."""
    return np.zeros(size, np.uint8)


class Message:
    """A client's update with its header and truth, in one contiguous buffer.

    Parameters
    ----------
    layout
        Of the update.
    allocate
        Makes the buffer.
    capacity
        The most bytes that an update takes as it is shared; by default that of the plain one.

    Attributes
    ----------
    buffer
        uint8: the whole message.
    header
        One record: scenario, round, client, identity (in the population), rank, steps (local ones),
        labels (behind the update), clipped (entries, in a
        secure sum), weight (in the mean), loss, accuracy (of a personal model, else
        NaN), seconds, payload_bytes (of the update as it is shared).
    counts
        int32 [C]: the true label counts.
    posterior
        float32 [C]: mean softmax output over the batches, each at the model of its local step.
    body
        uint8 [capacity]: the update as it is shared, in its first ``payload_bytes``.
    payload
        float32 [layout.size]: a plain update, a view of ``body``.

    Counts and posterior are the truth. They go to the metrics and never to an attack.
    """

    def __init__(
        self, layout: UpdateLayout, allocate: Allocate = zeros, capacity: int | None = None
    ) -> None:
        classes = layout.classes
        capacity = 4 * layout.size if capacity is None else capacity
        sizes = [_HEADER.itemsize, 4 * classes, 4 * classes, capacity]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        self.buffer = allocate(starts[-1])
        parts = [
            self.buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)
        ]
        self.header = parts[0].view(_HEADER)[0]
        self.counts: NDArray[np.int32] = parts[1].view(np.int32)
        self.posterior: NDArray[np.float32] = parts[2].view(np.float32)
        self.body: NDArray[np.uint8] = parts[3]
        self._start, self._size = starts[3], layout.size

    @property
    def payload(self) -> NDArray[np.float32]:
        """The plain update; for messages with room for it."""
        return self.body[: 4 * self._size].view(np.float32)

    @property
    def used(self) -> int:
        """How many bytes of the buffer are sent: up to the end of the update."""
        return self._start + int(self.header["payload_bytes"])
