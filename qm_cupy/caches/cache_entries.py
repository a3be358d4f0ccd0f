"""Which entries of a cache exist, and which of them may merge.

Booleans (..., N) have the leading axes of the keys: (), (B,), (B, H) or (L, B, H). A
mask (B, N) is that of every layer and head.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_batch_shape
from ..arrays.libraries import is_cuda
from ..arrays.protect import protected_tokens
from ..arrays.shapes import expand_mask, saliency_shape
from ..cuda.device import to_device, to_host
from ..cuda.launch import contiguous

Counts = NDArray[np.int64]
_FEW = 33  # entries: so few may be the heads of keys in another layout


def present_entries(keys: Any, bias: Any, mask: Any) -> Any:
    """Return which entries are not padding (..., N), or None for all of them."""
    present = None
    if mask is not None:
        present = expand_mask(mask, keys.shape[:-1])
    if bias is not None:
        absent = bias.astype(np.float32) == -np.inf
        present = ~absent if present is None else present & ~absent
    return present


def num_present(present: Any, keys: Any) -> Counts:
    """Return the number of entries that are not padding, of each head (...)."""
    leading, num_entries = keys.shape[:-2], keys.shape[-2]
    if present is None:
        return np.full(leading, num_entries, np.int64)
    count = to_host(present.sum(axis=-1))
    return np.asarray(count, np.int64)


def entry_positions(positions: Any, keys: Any) -> Any:
    """Return the positions of the entries, integers (N,) or (..., N), or raise."""
    num_entries = keys.shape[-2]
    if positions is None:
        host = np.arange(num_entries, dtype=np.int64)
        return to_device(host) if is_cuda(keys) else host
    if positions.dtype.kind not in "iu":
        raise TypeError(f"`positions` must be integers, got {positions.dtype}")
    if positions.shape == keys.shape[:-1]:
        return positions
    wanted = saliency_shape(keys.shape[:-1])
    check_batch_shape("positions", positions, wanted)
    if positions.ndim < 2:
        return positions
    return expand_mask(positions, keys.shape[:-1])


def free_entries(
    keys: Any,
    present: Any,
    protect: tuple[Any, Any, Any],
    sinks: int,
    recent: int | None,
    counts: Counts | None,
    heads: int = 1,
    *,
    causal: bool = True,
) -> tuple[Any, Any]:
    """Return which entries may merge, and which are not padding, both (..., N).

    `protect` has booleans, positions and the mask. `counts` (...) is K of each head,
    or None. `heads` heads that follow one another have a common budget. `causal` is
    that of `default_recent`. Raise if the entries that may not merge exceed a budget.
    """
    shape = keys.shape[:-1]
    flags, positions, mask = protect
    one_head = keys[(0,) * max(0, keys.ndim - 4)]  # without L
    one_head = one_head[:, 0] if one_head.ndim > 3 else one_head  # (B, N, d)
    kept = protected_tokens(flags, positions, one_head, mask)  # (B, N), or None
    if present is None:
        present = np.zeros(shape, np.bool_, like=keys)
        present.fill(True)
    rank = np.cumsum(present, axis=-1)  # of an entry: 1, 2, ...
    after = rank[..., -1:] - rank  # entries after it
    free = present & (rank > sinks)
    limit: Any = recent
    if recent is None:
        limit = default_recent(counts, shape[:-1], causal)[..., None]
        limit = to_device(limit) if is_cuda(keys) else limit
    free &= after >= limit
    if kept is not None:
        free &= ~expand_mask(kept, shape)
    if counts is not None:
        _check_room(free, present, counts, heads)
    return free, contiguous(present)


def default_recent(
    counts: Counts | None, leading: tuple[int, ...], causal: bool = True
) -> Counts:
    """Return how many last entries do not merge, for K entries of each head.

    They are fewer if queries are not `causal`: those of a second reading look for any
    entry, and not above all for the last ones.
    """
    least, part = (32, 3) if causal else (8, 8)
    if counts is None:
        return np.full(leading, least, np.int64)
    return np.maximum(np.minimum(least, counts // 2), counts // part)


def num_mergeable(
    count: int, sinks: int = 4, recent: int | None = None, *, causal: bool = True
) -> int:
    """Return how many of K entries are left for those that may merge."""
    if recent is None:
        recent = int(default_recent(np.array(count), (), causal))
    return count - sinks - recent


def _check_room(free: Any, present: Any, counts: Counts, heads: int) -> None:
    """Raise if a budget leaves no entry for those that may merge."""
    num_free = np.asarray(to_host(free.sum(axis=-1)), np.int64)
    num_kept = np.asarray(to_host(present.sum(axis=-1)), np.int64) - num_free
    least = num_kept + (num_free > 0)
    if heads > 1:  # compare the sums
        least = least.sum(axis=-1)
        num_kept, counts = num_kept.sum(axis=-1), counts.sum(axis=-1)
    if math.prod(least.shape) and (counts < least).any():
        at = tuple(np.argwhere(np.atleast_1d(counts < least))[0])
        kept, got = np.atleast_1d(num_kept)[at], np.atleast_1d(counts)[at]
        hint = ""
        if present.shape[-1] < _FEW:
            hint = (
                f". The heads have N = {present.shape[-1]} entries: is the layout "
                "(..., H, N, d)?"
            )
        raise ValueError(
            f"`budget` must be at least {kept + 1}, because {kept} entries do not "
            f"merge (`sinks`, `recent`, `protect`), got {got}: lower `recent`, "
            f"or raise the budget{hint}"
        )
