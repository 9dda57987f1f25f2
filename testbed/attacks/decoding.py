"""LLG's decoding of gradients to label counts, for many updates at once."""

from array_api_compat import array_namespace

from testbed.attacks.base import Array


def decode(row_sums: Array, impact: Array, offset: Array, labels: Array) -> Array:
    """Turn row sums into label counts by LLG's two steps (Wainakh et al. 2022, algorithm 1).

    Step one takes every class with a negative row sum once, the most negative first, up to the
    number of labels; the sign is that of the raw row sum, before the offset is removed. Step two
    takes the class with the smallest remaining value, subtracts the impact from it, and repeats
    until the labels are used up. Ties go to the smallest class index.

    Where the impact is not negative, the published loop never leaves the class it starts with.
    A positive impact (negative features) keeps that meaning. An impact of zero (LLG without any
    negative row sum) says nothing about magnitudes, and the labels are spread in the order of the
    values, each class once before any class twice. Impacts and offsets that are not finite count
    as zero.

    Parameters
    ----------
    row_sums
        float64 [N, C].
    impact
        float64 [N], [1] or [N, 1]: what one more sample of a class adds to its row sum, m. Or
        [N, C] or [1, C], where classes differ in it: then it has to be negative.
    offset
        float64 [N, C] or [1, C]: what a class's row sum is without samples of it, s.
    labels
        int64 [N]: how many labels to infer.

    Returns
    -------
    Array
        int64 [N, C]; every row sums to its ``labels``.
    """
    xp = array_namespace(row_sums)
    total = labels[:, None]
    # A diverged model gives calibrations that say nothing.
    impact = xp.where(xp.isfinite(impact), impact, xp.zeros_like(impact))
    offset = xp.where(xp.isfinite(offset), offset, xp.zeros_like(offset))
    impact = impact if impact.ndim == 2 else impact[:, None]
    step = xp.broadcast_to(-impact, (row_sums.shape[0], impact.shape[1]))

    taken = (row_sums < 0) & (ranks(row_sums) < total)
    value = row_sums - offset + xp.where(taken, step, xp.zeros_like(step))
    counts = xp.astype(taken, xp.int64)
    left = total - xp.sum(counts, axis=1, keepdims=True)
    if step.shape[1] > 1:
        return counts + _fill_by_class(value, step, left)

    filled = _fill(value, step, left, total)
    if bool(xp.all(step > 0)):
        return counts + filled
    order = ranks(value)
    classes = value.shape[1]
    spread = left // classes + xp.astype(order < left % classes, xp.int64)
    smallest = xp.where(order == 0, left, xp.zeros_like(left))
    return counts + xp.where(step > 0, filled, xp.where(step < 0, smallest, spread))


def decode_released(row_sums: Array, impact: Array, labels: Array) -> Array:
    """Decode as breaching's code does, where step two adds to the wrong class.

    Its second step subtracts the impact from the last class (an index left over from the loop
    before), not from the class that it takes. So it takes the last class until that is no longer
    the smallest, and then one class for all the labels that remain. (Beyond breaching, step one is
    capped at the number of labels.)

    Parameters
    ----------
    row_sums, labels
        As for `decode`; there is no offset.
    impact
        float64 [N], finite and not positive.

    Returns
    -------
    Array
        int64 [N, C]; every row sums to its ``labels``.
    """
    xp = array_namespace(row_sums)
    classes = row_sums.shape[1]
    total, step = labels[:, None], -impact[:, None]
    taken = (row_sums < 0) & (ranks(row_sums) < total)
    value = row_sums + xp.where(taken, step, xp.zeros_like(step))
    counts = xp.astype(taken, xp.int64)
    left = total - xp.sum(counts, axis=1, keepdims=True)

    index = xp.arange(classes, device=_device(value))[None, :]
    last = index == classes - 1
    others = xp.where(last, xp.full_like(value, xp.inf), value)
    gap = xp.min(others, axis=1, keepdims=True) - value[:, -1:]
    # How often the last class is taken before it has caught up with the smallest other one.
    moves = (gap > 0) & (step > 0)
    turns = xp.ceil(gap / xp.where(moves, step, xp.ones_like(step)))
    bound = xp.astype(left, value.dtype)
    turns = xp.where(moves & (turns < bound), turns, bound)
    turns = xp.where(gap > 0, xp.astype(turns, xp.int64), xp.zeros_like(left))
    smallest = index == xp.argmin(others, axis=1, keepdims=True)
    none = xp.zeros_like(left)
    return counts + xp.where(last, turns, none) + xp.where(smallest & ~last, left - turns, none)


def _fill(value: Array, step: Array, left: Array, total: Array) -> Array:
    """Count the ``left`` smallest members of { value_c + j step : j >= 0 } per class.

    This is a water filling. In units of the step, a member is an integer level plus the class's
    own fraction: all members below some level are in, and of those on it the smallest fractions.
    """
    xp = array_namespace(value)
    height = (value - xp.min(value, axis=1, keepdims=True)) / xp.where(
        step > 0, step, xp.ones_like(step)
    )
    # The smallest class alone could take every label: nothing above `total` can be reached.
    bound = xp.astype(total, value.dtype) + 1
    height = xp.where((step > 0) & (height < bound), height, bound)
    floor = xp.astype(xp.floor(height), xp.int64)
    fraction = height - xp.floor(height)

    base = xp.sort(floor, axis=1)
    below = xp.cumulative_sum(base, axis=1)
    width = xp.arange(1, base.shape[1] + 1, dtype=xp.int64, device=_device(value))[None, :]
    # Members below the k-th smallest class's own level; grows with k.
    needed = width * base - below
    reached = xp.sum(xp.astype(needed <= left, xp.int64), axis=1, keepdims=True)
    level = (left + xp.take_along_axis(below, reached - 1, axis=1)) // reached

    counts = xp.clip(level - floor, min=0)
    rest = left - xp.sum(counts, axis=1, keepdims=True)
    on_level = xp.where(floor <= level, fraction, xp.full_like(fraction, xp.inf))
    return counts + xp.astype(ranks(on_level) < rest, xp.int64)


def _fill_by_class(value: Array, step: Array, left: Array) -> Array:
    """Count the ``left`` smallest members of { value_c + j step_c : j >= 0 } per class.

    Were members divisible, the water would stand at one level in all classes that it reaches.
    Whole members below that level are in; fewer than two per class are missing then, and these
    are found by their order.
    """
    xp = array_namespace(value)
    start = value - step
    start = start - xp.min(start, axis=1, keepdims=True)
    order = xp.argsort(start, axis=1, stable=True)
    base = xp.take_along_axis(start, order, axis=1)
    rate = 1 / xp.take_along_axis(step, order, axis=1)
    rates = xp.cumulative_sum(rate, axis=1)
    below = xp.cumulative_sum(base * rate, axis=1)
    wanted = xp.astype(left, value.dtype)
    reached = xp.sum(xp.astype(base * rates - below <= wanted, xp.int64), axis=1, keepdims=True)
    place = xp.clip(reached - 1, min=0)
    level = (wanted + xp.take_along_axis(below, place, axis=1)) / xp.take_along_axis(
        rates, place, axis=1
    )
    # One less than fits, so that rounding cannot take a member too many.
    counts = xp.astype(xp.clip(xp.floor((level - start) / step) - 1, min=0.0), xp.int64)
    left = left - xp.sum(counts, axis=1, keepdims=True)
    while bool(xp.any(left > 0)):
        following = value + xp.astype(counts, value.dtype) * step
        # Members below every class's next but one can be taken at once.
        ceiling = xp.min(following + step, axis=1, keepdims=True)
        rank = ranks(following)
        chosen = (rank < left) & ((following < ceiling) | (rank == 0))
        counts = counts + xp.astype(chosen, xp.int64)
        left = left - xp.sum(xp.astype(chosen, xp.int64), axis=1, keepdims=True)
    return counts


def ranks(values: Array) -> Array:
    """Return each entry's rank within its row, ascending; ties by index."""
    xp = array_namespace(values)
    order = xp.argsort(values, axis=1, stable=True)
    return xp.argsort(order, axis=1, stable=True)


def _device(array: Array) -> object:
    from array_api_compat import device

    return device(array)
