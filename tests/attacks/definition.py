"""LLG's decoding as the paper writes it, one label at a time: the definition to test against."""

from fractions import Fraction

import numpy as np


def decode_by_loop(row_sums, impact, offset, labels):
    """Return the counts of one update; arithmetic is exact, ties go to the smallest index.

    ``impact`` is a number, or one per class.
    """
    raw = [Fraction(float(value)) for value in row_sums]
    m = [Fraction(float(value)) for value in np.broadcast_to(impact, len(raw))]
    g = [value - Fraction(float(s)) for value, s in zip(raw, offset, strict=True)]
    counts = np.zeros(len(raw), np.int64)
    left = int(labels)
    for c in sorted((c for c, value in enumerate(raw) if value < 0), key=lambda c: (raw[c], c)):
        if left == 0:
            break
        counts[c] += 1
        g[c] -= m[c]
        left -= 1
    if not any(m):  # where the published loop would repeat one class: spread by the order of g
        order = sorted(range(len(g)), key=lambda c: (g[c], c))
        for turn in range(left):
            counts[order[turn % len(g)]] += 1
        return counts
    while left > 0:
        c = min(range(len(g)), key=lambda c: (g[c], c))
        counts[c] += 1
        g[c] -= m[c]
        left -= 1
    return counts


def decode_released_by_loop(row_sums, impact, labels):
    """Return the counts of one update as breaching has them: step two lowers the last class."""
    m = Fraction(float(impact))
    g = [Fraction(float(value)) for value in row_sums]
    counts = np.zeros(len(g), np.int64)
    left = int(labels)
    for c in sorted((c for c, value in enumerate(g) if value < 0), key=lambda c: (g[c], c))[:left]:
        counts[c] += 1
        g[c] -= m
        left -= 1
    while left > 0:
        c = min(range(len(g)), key=lambda c: (g[c], c))
        counts[c] += 1
        g[-1] -= m
        left -= 1
    return counts


def has_near_tie(row_sums, impact, offset, labels, gap=1e-9):
    """Return whether rounding could decide between two classes, or the sign of one."""
    value = np.asarray(row_sums, float) - offset
    step = abs(float(impact))
    if step == 0 or not np.isfinite(step):
        levels = np.sort(value)
        scale = max(np.abs(value).max(), 1e-300)
        return bool((np.diff(levels) < gap * scale).any())
    height = (value - value.min()) / step
    height = height[height <= labels + 1]
    fraction = np.sort(height % 1.0)
    around = np.append(np.diff(fraction), fraction[0] + 1 - fraction[-1])
    return len(height) > 1 and bool(around.min() < gap)
