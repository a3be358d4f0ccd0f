"""Checks of counts: K, the number of groups or tokens of each sequence.

Counts are checked on a GPU too, because `convert_inputs` copies them to the CPU.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checks import check_integer, check_shape
from .libraries import is_cuda

_INT32 = 2**31 - 1  # the largest count: kernels store counts as int32


def check_num_groups(
    num_groups: Any,
    batch: tuple[int, ...],
    limits: Any = None,
    name: str = "num_groups",
) -> NDArray[np.int64]:
    """Return K of every sequence (shape `batch`), each from 1 to its limit.

    `limits` is the number of tokens: one for all sequences, or one per sequence.
    Without limits, or with limits on a GPU, K may be any positive int32.
    """
    # Limits that come from a mask on a GPU are not read: the CPU would have to wait.
    unlimited = limits is None or is_cuda(limits)
    if is_per_sequence(num_groups):
        if num_groups.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must be integers, got {num_groups.dtype}")
        check_shape(name, num_groups, "B", batch)
        counts = num_groups.astype(np.int64)
    else:
        count = check_integer(name, num_groups)
        # The clipped number is out of range too, and fits the dtype.
        counts = np.full(batch, max(-1, min(count, 2**62)), dtype=np.int64)
        limit = _INT32 if unlimited else limits
        if not isinstance(limit, int):
            limit = int(np.min(limit, initial=_INT32))
        # The usual case, one K for all sequences, needs no comparison of arrays.
        if 1 <= count <= limit:
            return counts
    maxima = np.asarray(_INT32 if unlimited else limits)  # () or (B,)
    wrong = (counts < 1) | (counts > maxima)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])  # index of the first wrong sequence
        limit = np.broadcast_to(maxima, counts.shape)
        where = f" for sequence {int(at[0])}" if at and maxima.ndim else ""
        top = "..2**31 - 1" if unlimited else f"..{limit[at]} (its tokens)"
        got = counts[at] if is_per_sequence(num_groups) else count
        raise ValueError(f"`{name}` must lie in 1{top}{where}, got {got}")
    return counts


class GroupCounts(NamedTuple):
    """K of every sequence, and the largest K.

    If one K is given for all sequences, `max_groups` is this K for an empty batch too.
    """

    counts: NDArray[np.int64]  # (B,)
    max_groups: int


def check_group_counts(
    num_groups: Any,
    batch: tuple[int, ...],
    limit: Any = None,
    name: str = "num_groups",
) -> GroupCounts:
    """Return K of every sequence as `check_num_groups` does, and the largest K."""
    counts = check_num_groups(num_groups, batch, limit, name)
    several = is_per_sequence(num_groups)
    return GroupCounts(counts, int(counts.max(initial=0) if several else num_groups))


def is_per_sequence(count: Any) -> bool:
    """Return whether a count is an array with one value per sequence."""
    return isinstance(count, np.ndarray) and count.ndim > 0


def check_counts(tokens: NDArray[Any], num_groups: Any) -> NDArray[np.int64]:
    """Return how many tokens of each sequence (..., K, D) are not padding.

    The number is `num_groups`, or the length of the axis K if `num_groups` is None.
    """
    limit = tokens.shape[-2]
    return check_num_groups(
        limit if num_groups is None else num_groups, tokens.shape[:-2], limit
    )
