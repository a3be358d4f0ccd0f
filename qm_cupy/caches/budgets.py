"""Budgets of caches: how many entries each head keeps.

N is the number of entries of a head, and K the number that it keeps. The leading axes
of a cache are (), (B,), (B, H) or (L, B, H).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stages.budget import check_budget_type, exact_fraction, is_ratio

Counts = NDArray[np.int64]


def head_budgets(
    budget: Any,
    leading: tuple[int, ...],
    num_entries: Counts,
    pooled: tuple[int, ...] = (),
) -> Counts:
    """Return K of each head (...), or raise.

    `budget` is an integer, a fraction within (0, 1] of `num_entries` (...), or an array
    of integers that broadcasts to the leading axes. Along the axes `pooled`, only the
    sum of the results matters.
    """
    if is_ratio(budget):
        numerator, denominator = exact_fraction(budget)
        counts = np.maximum(num_entries * numerator // denominator, 1)
        return np.minimum(counts, num_entries)
    check_budget_type(budget)
    array = np.asarray(budget)
    if array.dtype.kind not in "iu" or isinstance(budget, bool):
        raise TypeError(
            f"`budget` must be integers or a fraction of the entries, got {array.dtype}"
        )
    try:
        counts = np.broadcast_to(array, leading).astype(np.int64)
    except ValueError:
        raise ValueError(
            f"`budget` must broadcast to the axes {leading} before the entries, got "
            f"shape {array.shape}"
        ) from None
    limits = num_entries
    if pooled:  # only the mean is limited
        limits = num_entries.mean(axis=pooled, keepdims=True).astype(np.int64)
        limits = np.broadcast_to(limits, leading)
    wrong = np.argwhere(np.atleast_1d((counts < 1) | (counts > limits)))
    if len(wrong):
        at = tuple(wrong[0])
        limit, got = np.atleast_1d(limits)[at], np.atleast_1d(counts)[at]
        if got < 1:
            raise ValueError(
                "`budget` must be at least 1 entry, or a fraction within (0, 1] of the "
                f"entries, got {got}"
            )
        raise ValueError(
            f"`budget` must lie in 1..{limit} (the entries of a head), got {got}: a "
            "cache that is short enough needs no merge"
        )
    return counts
