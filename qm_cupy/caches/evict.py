"""Eviction: keep the entries of a cache with the largest scores, and drop the others.

N is the number of entries of a head, and K the number that it keeps.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_finite_values, check_floating, check_shape
from ..arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.dtypes import (
    accumulation_dtype,
    bfloat16_as_int16,
    zero_where_absent,
)
from ..arrays.libraries import is_cuda
from ..arrays.protect import split_positions
from ..arrays.shapes import layout_of
from ..cuda.device import to_device, to_host
from ..cuda.launch import contiguous
from .budgets import head_budgets
from .cache_checks import (
    check_bias,
    check_cache,
    check_cache_values,
    check_count,
    check_flag,
)
from .cache_entries import free_entries, num_present, present_entries
from .kv_cache import KVCache

Counts = NDArray[np.int64]


@on_callers_stream
def evict(
    keys: Array,
    values: Array,
    budget: Any,
    *,
    scores: FloatArray,
    bias: FloatArray | None = None,
    protect: Any = None,
    sinks: int = 0,
    recent: int = 0,
    per_head: bool = False,
    mask: BoolArray | None = None,
) -> KVCache[Array]:
    """Keep the K entries of a key-value cache with the largest scores.

    Parameters
    ----------
    keys : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        Keys; float16, bfloat16, float32 or float64.
    values : ndarray of shape (..., N, d_v)
        Values, of the leading axes and the dtype of `keys`.
    budget : number or ndarray of int
        Entries that remain of each head: an integer K, a fraction within (0, 1] of the
        entries that are not padding, or integers that broadcast to the leading axes of
        `keys`. Results are padded to the largest K.
    scores : ndarray of shape (..., N)
        Scores of the entries, such as the result of `score_keys`; any float dtype. Of
        equal scores, that of the earlier entry counts as larger.
    bias : ndarray of shape (..., N), optional
        Bias of the entries, which they keep; 0 by default. An entry with bias -inf is
        padding.
    protect : ndarray of shape (N,) or (B, N), or sequence of int, optional
        Entries that remain: booleans, or positions in the cache. K counts them.
    sinks, recent : int, default 0
        Numbers of the first and of the last entries that remain. K counts them.
    per_head : bool, default False
        If True, the budget is the mean of the heads of a layer, whose scores are
        compared with each other. Each head keeps at least one entry.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = entry. Padding is not read, and never remains.

    Returns
    -------
    KVCache
        The entries that remain, unchanged and in order. `labels` are -1 for the others.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If a shape or a value does not fit, or the budget is too small for the entries
        that must remain.

    See Also
    --------
    merge_kv_cache : Merge entries instead, which changes attention less.

    Notes
    -----
    On a GPU, the CPU waits for the numbers of entries that must remain, and with
    `per_head` for the number of entries of each head.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[1.0], [2.0], [3.0], [4.0]])
    >>> evict(keys, keys, 2, scores=np.array([0.1, 0.5, 0.2, 0.3])).keys
    array([[2.],
           [4.]])
    """
    flags, protected = split_positions(protect)
    converted = convert_inputs(
        {
            "keys": keys,
            "values": values,
            "scores": scores,
            "bias": bias,
            "protect": flags,
            "mask": mask,
        },
        counts={"budget": budget, "protect": protected},
    )
    convert_back, keys, values, scores, bias, flags, mask, budget, protected = converted
    mask = check_cache(keys, values, mask)
    check_bias(bias, keys, mask)
    present = present_entries(keys, bias, mask)
    check_cache_values(keys, values, present)
    check_floating("scores", scores)
    axes = layout_of(keys.ndim, "Nd")[:-1]
    check_shape("scores", scores, axes, tuple(keys.shape[:-1]))
    check_finite_values("scores", scores, present)
    leading = keys.shape[:-2]
    total = num_present(present, keys)
    pooled = (-1,) if check_flag("per_head", per_head) and len(leading) > 1 else ()
    counts = head_budgets(budget, leading, total, pooled)
    heads = leading[-1] if pooled else 1
    free, present = free_entries(
        keys,
        present,
        (flags, protected, mask),
        check_count("sinks", sinks),
        check_count("recent", recent),
        # All entries may be among those that must remain.
        np.minimum(counts + 1, total),
        heads,
    )
    kept, counts = select_entries(scores, free, present, counts, heads)
    return KVCache(*map(convert_back, keep_entries(keys, values, bias, kept, counts)))


def select_entries(
    scores: Any, free: Any, present: Any, counts: Counts, heads: int
) -> tuple[Any, Counts]:
    """Return which entries remain (..., N), and their number (...).

    `counts` (...) is K. With `heads` > 1, the heads of a layer compete for the sum of
    their K, and the CPU waits for the numbers that each of them wins.
    """
    num_entries = scores.shape[-1]
    kept = present & ~free
    wide = scores.astype(accumulation_dtype(scores.dtype)).reshape(-1, num_entries)
    flat_kept = kept.reshape(-1, num_entries)
    flat_free = free.reshape(-1, num_entries)
    # Those that must remain first, then by score, and padding last.
    top = wide.dtype.type(np.inf)
    wide = np.where(flat_free, wide, np.where(flat_kept, top, -top))
    if heads > 1:  # every head keeps an entry, because attention to none is undefined
        numbers = np.cumsum(flat_free | ~flat_free, axis=-1) - 1
        best = numbers == wide.argmax(axis=-1)[:, None]
        wide = np.where(best & flat_free, top, wide)
    pools = wide.reshape(-1, heads * num_entries)
    room = counts.reshape(-1, heads).sum(axis=-1)  # (pools,)
    order = np.argsort(-pools, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    limit = to_device(room) if is_cuda(scores) else room
    selected = (rank < limit[:, None]).reshape(present.shape) & present
    if heads > 1:
        counts = np.asarray(to_host(selected.sum(axis=-1)), np.int64)
    return selected, counts


def keep_entries(
    keys: Any, values: Any, bias: Any, kept: Any, counts: Counts
) -> KVCache[Any]:
    """Return the cache of the entries that remain, as NumPy or CuPy arrays."""
    # The sort is stable: those that remain come first, in order.
    index = np.argsort(~kept, axis=-1, kind="stable")
    index = index[..., : int(counts.max(initial=0))]  # (..., K)
    exists = np.take_along_axis(kept, index, -1)

    def gather(x: Any) -> Any:
        bits = np.take_along_axis(bfloat16_as_int16(x), index[..., None], -2)
        return contiguous(zero_where_absent(bits, exists[..., None])).view(x.dtype)

    dtype = accumulation_dtype(keys.dtype)
    if bias is None:
        own = np.zeros(exists.shape, dtype, like=keys)
    else:
        own = np.take_along_axis(bias.astype(dtype), index, -1)
    own = np.where(exists, own, dtype.type(-np.inf))
    labels = np.where(kept, np.cumsum(kept, axis=-1) - 1, -1)
    integers = labels, exists, np.where(exists, index, -1)
    others = own, *(x.astype(np.int32) for x in integers)
    return KVCache(gather(keys), gather(values), *map(contiguous, others))
