"""The one rounding that all attacks share: from scores to label counts."""

from array_api_compat import array_namespace, device

from testbed.attacks.base import Array

# Outside these bounds a row's sum, or the quotient by it, may overflow.
_SMALL, _LARGE = 1e-150, 1e150


def largest_remainder(scores: Array, totals: Array) -> Array:
    """Turn scores into integer counts by the method of largest remainders (Hamilton's method).

    Negative scores and NaN count as 0. Each row is scaled to its total and rounded down; what is
    missing goes, one each, to the largest remainders, ties to the smallest class index. A row
    without any positive score is spread as evenly as possible, smallest index first; infinite
    scores share the whole total.

    Parameters
    ----------
    scores
        floating point [N, C], of any library that follows the array API standard.
    totals
        integer [N], not negative: how many labels each row is to have.

    Returns
    -------
    Array
        int64 [N, C]; row i sums to ``totals[i]``. Where a row's scores are non-negative integers
        that sum to its total already, they are returned as they are.
    """
    xp = array_namespace(scores)
    scores = xp.astype(scores, xp.float64)
    total = xp.astype(xp.asarray(totals, device=device(scores)), xp.int64)[:, None]
    shares = _positive(scores)
    # One factor per row, so that equal scores get bitwise equal shares and ties stay ties.
    factor = xp.astype(total, xp.float64) / xp.sum(shares, axis=1, keepdims=True)
    shares = shares * factor
    counts = xp.floor(shares)
    order = xp.argsort(counts - shares, axis=1, stable=True)
    rank = xp.argsort(order, axis=1, stable=True)
    counts = xp.astype(counts, xp.int64)
    missing = total - xp.sum(counts, axis=1, keepdims=True)
    return counts + xp.astype(rank < missing, xp.int64)


def _positive(scores: Array) -> Array:
    """Return finite scores, none negative, at least one positive per row, with a finite sum."""
    xp = array_namespace(scores)
    zero, one = xp.zeros_like(scores), xp.ones_like(scores)
    scores = xp.where(scores > 0, scores, zero)
    peak = xp.max(scores, axis=1, keepdims=True)
    scores = xp.where(xp.isinf(peak), xp.where(xp.isinf(scores), one, zero), scores)
    scores = xp.where(peak > 0, scores, one)
    extreme = xp.isfinite(peak) & (peak > 0) & ((peak < _SMALL) | (peak > _LARGE))
    return scores / xp.where(extreme, peak, xp.ones_like(peak))
