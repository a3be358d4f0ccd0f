"""Sums of attention over queries, or the largest attention, for each key.

The scores are s_ij = c q_i · k_j + b_j of T queries and N keys, and Z_i belongs to
query i. For each key head, over the rows i of its G query heads:

    a_j = Σ_i exp(p (s_ij - Z_i))

p = 1 for the sum of the attention, and p = 2 for the sum of its squares. With p = 0, it
is the largest attention instead, max_i exp(s_ij - Z_i).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..arrays.shapes import expand_mask, layer_axes, row_blocks
from ..cuda.constants import WARP
from ..cuda.device import empty
from ..cuda.launch import contiguous, launch
from .attend import key_rows, visible_keys

_ENTRIES = 1 << 18  # scores in memory at once


def attention_columns(
    query: Any,
    keys: Any,
    log_sum_exp: Any,
    *,
    bias: Any = None,
    causal: bool = False,
    mask: Any = None,
    scale: float,
    power: int = 1,
) -> Any:
    """Return a (..., N), float32 or float64, of converted arrays.

    Z is `log_sum_exp` (..., T), with the heads of the queries; a query with Z = -inf
    adds nothing. The other arguments are those of `attend`.
    """
    args = query, keys, log_sum_exp, bias, causal, mask, scale, power
    if is_cuda(query):
        return _attention_columns_cuda(*args)
    return _attention_columns_reference(*args)


def _attention_columns_reference(
    query: NDArray[Any],
    keys: NDArray[Any],
    log_sum_exp: NDArray[Any],
    bias: NDArray[Any] | None,
    causal: bool,
    mask: NDArray[np.bool_] | None,
    scale: float,
    power: int,
) -> NDArray[Any]:
    dtype = accumulation_dtype(query.dtype)
    columns = np.zeros(keys.shape[:-1], dtype)
    rows = key_rows(query, keys)
    z = log_sum_exp.reshape(rows.shape[:-1])
    head_mask = expand_mask(mask, keys.shape[:-1])
    for index in np.ndindex(keys.shape[:-2]):
        valid = None if head_mask is None else head_mask[index]
        unpadded = slice(None) if valid is None else valid
        k = keys[index][unpadded].astype(dtype, order="C", copy=False)
        b = None if bias is None else bias[index][unpadded].astype(dtype)
        visible = visible_keys(query.shape[-2], keys.shape[-2], valid, causal)
        counts = np.isfinite(z[index])
        seen = np.tile(visible, len(counts) // len(visible))[counts]
        q = rows[index][counts].astype(dtype) * dtype.type(scale)
        args = q, k, b, z[index][counts].astype(dtype), seen, power
        columns[index][unpadded] = _head_columns(*args)
    return columns


def _head_columns(
    query: NDArray[Any],
    keys: NDArray[Any],
    bias: Any,
    z: NDArray[Any],
    visible: NDArray[np.int64],
    power: int,
) -> NDArray[Any]:
    """Return a (n,) for the rows (R, d) of one key head."""
    total = np.zeros(len(keys), query.dtype)
    for block in row_blocks(len(query), len(keys), _ENTRIES):
        # Causal queries do not see the last keys: leave out those that none sees.
        seen = int(visible[block].max(initial=0))
        k = keys[:seen]
        # float32 overflows for huge inputs; then use float64.
        with np.errstate(over="ignore", invalid="ignore"):
            scores = query[block] @ k.T
            if not np.isfinite(scores).all():
                scores = query[block].astype(np.float64) @ k.T.astype(np.float64)
            if bias is not None:
                scores += bias[:seen]
            scores -= z[block, None]
            scores *= power or 1
            # Z of other keys than these may be lower than a score.
            np.minimum(scores, 80, out=scores)
        weights = np.exp(scores)
        if visible[block].min(initial=seen) < seen:
            weights[np.arange(seen) >= visible[block, None]] = 0
        if power:
            total[:seen] += weights.sum(axis=0).astype(query.dtype)
        else:
            largest = weights.max(axis=0, initial=0).astype(query.dtype)
            np.maximum(total[:seen], largest, out=total[:seen])
    return total


def _attention_columns_cuda(
    query: Any,
    keys: Any,
    log_sum_exp: Any,
    bias: Any,
    causal: bool,
    mask: Any,
    scale: float,
    power: int,
) -> Any:
    acc_dtype = accumulation_dtype(query.dtype)
    *leading, num_keys, dim = keys.shape
    out = empty((*leading, num_keys), acc_dtype)
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    group = math.prod(query.shape[:-2]) // max(outer, 1)
    arrays = [contiguous(query), contiguous(keys), contiguous(log_sum_exp, acc_dtype)]
    arrays += contiguous(bias, acc_dtype), contiguous(mask)
    sizes = outer, group, batch, heads, query.shape[-2], num_keys, dim
    args = (*arrays, *sizes, int(causal), scale, power, out)
    # A block for 32 keys of a head; the basic kernel has a thread for each key.
    kernel, blocks = 2 * ("attention_columns",), outer * -(-num_keys // WARP)
    launch(*kernel, query.dtype, args, outputs=out.size, blocks=blocks)
    return out
