"""The batches of a client's own samples, for several local steps."""

import numpy as np
from numpy.typing import NDArray


def local_batches(
    indices: NDArray[np.int64],
    batch_size: int,
    rng: np.random.Generator,
    *,
    steps: int | None = None,
    epochs: int | None = None,
) -> list[NDArray[np.int64]]:
    """Return the batches that a client takes its local steps on.

    Parameters
    ----------
    indices
        int64 ``[samples]``, samples > 0: the client's samples.
    batch_size
        B.
    rng
        Its state decides the batches.
    steps
        So many batches of B samples, one after the other from passes in a random order each. A
        batch that begins in one pass and ends in the next holds no sample twice; of a client with
        fewer than B samples, each sample as often as any other, up to one.
    epochs
        So many passes over all samples, in a random order each. The last batch of a pass has what
        is left, as in PyTorch's `DataLoader` with ``shuffle=True``.

    Returns
    -------
    list
        int64 arrays, indices into the data set. Where B divides the number of samples, as many
        steps as some epochs have are the batches of these epochs.

    Raises
    ------
    ValueError
        If there are no samples, a number is below 1, or not exactly one of steps and epochs is
        given.
    """
    passes = _length(steps, epochs)
    if len(indices) == 0:
        raise ValueError("a client without samples has no batches")
    if batch_size < 1:
        raise ValueError(f"batches need 1 sample or more; got a batch size of {batch_size}")
    if steps is not None:
        return [indices[places] for places in _steps(len(indices), batch_size, steps, rng)]
    batches = []
    for _ in range(passes):
        order = indices[rng.permutation(len(indices))]
        batches += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return batches


def steps_of(samples: int, batch_size: int, epochs: int) -> int:
    """Return how many batches so many epochs have: of each, the last may be smaller."""
    return epochs * -(-samples // batch_size)


def labels_of(
    samples: int, batch_size: int, *, steps: int | None = None, epochs: int | None = None
) -> int:
    """Return how many labels a client's batches have in all, a sample's once for each batch.

    Parameters
    ----------
    samples
        The number of the client's samples.
    batch_size, steps, epochs
        As of `local_batches`, which raises the same errors.
    """
    length = _length(steps, epochs)
    return length * (batch_size if steps is not None else samples)


def _length(steps: int | None, epochs: int | None) -> int:
    given = [length for length in (steps, epochs) if length is not None]
    if len(given) != 1 or given[0] < 1:
        raise ValueError(
            f"either steps or epochs, 1 or more, are needed; got {steps} steps, {epochs} epochs"
        )
    return given[0]


def _steps(
    samples: int, batch_size: int, steps: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return places among a client's samples, batch by batch."""
    batches = []
    left = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) >= batch_size:
            batches.append(left[:batch_size])
            left = left[batch_size:]
            continue
        whole, begun = divmod(batch_size - len(left), samples)
        parts = [left, *(rng.permutation(samples) for _ in range(whole))]
        carried, left = left, left[:0]
        if begun:
            head, left = _begin(samples, begun, carried, rng)
            parts.append(head)
        batches.append(np.concatenate(parts))
    return batches


def _begin(
    samples: int, begun: int, carried: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a pass as its first places, taken last from those that the batch has, and the rest."""
    order = rng.permutation(samples)
    if len(carried) == 0:
        return order[:begun], order[begun:]
    taken = np.zeros(samples, bool)
    taken[carried] = True
    order = order[np.argsort(taken[order], kind="stable")]
    # Without a new order, samples that were held back would be the last ones of the pass.
    return order[:begun], rng.permutation(order[begun:])
