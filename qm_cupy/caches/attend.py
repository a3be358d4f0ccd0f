"""Attention with a bias for each key, without a T × N matrix in memory.

There are T queries q_i and N keys k_j of width d, and values v_j of width d_v, for each
head. The scores are s_ij = c q_i · k_j + b_j with the factor c and the bias b_j of a
key. Z_i = log Σ_j exp(s_ij), and the output is o_i = Σ_j exp(s_ij - Z_i) v_j. A head of
the keys serves G heads of the queries, whose rows are computed together: R = G T rows.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_finite_values, check_number
from ..arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.dtypes import accumulation_dtype, narrow
from ..arrays.libraries import is_cuda
from ..arrays.shapes import expand_mask, layer_axes
from ..cuda.constants import ATTEND_KEYS, ATTEND_ROWS, MAX_HEAD_DIM
from ..cuda.device import current_device, empty
from ..cuda.launch import contiguous, launch
from ..settings import implementation
from ..stages.saliency.query_key_entropy import check_causal
from .cache_checks import check_bias, check_cache, check_query_heads

_ENTRIES = 1 << 18  # scores in memory at once
_ABSENT = -1e30  # a lower bias counts as -inf, as MASKED_SCORE in the kernels


@on_callers_stream
def attend(
    query: Array,
    keys: Array,
    values: Array,
    *,
    bias: FloatArray | None = None,
    causal: bool = False,
    mask: BoolArray | None = None,
    scale: float | None = None,
) -> tuple[Array, FloatArray]:
    r"""Return the attention output of queries to keys that have a bias.

    .. math:: Z_i = \log \sum_j e^{c\,q_i \cdot k_j + b_j}, \qquad
        o_i = \sum_j e^{c\,q_i \cdot k_j + b_j - Z_i}\,v_j

    Parameters
    ----------
    query : ndarray of shape (T, d), (B, T, d), (B, H, T, d) or (L, B, H, T, d)
        Queries; float16, bfloat16, float32 or float64.
    keys : ndarray of shape (..., N, d)
        Keys of the dtype of `query`. They may have fewer heads, a number that divides
        H: query head h reads key head h // (H / H_k).
    values : ndarray of shape (..., N, d_v)
        Values, with the leading axes and the dtype of `keys`.
    bias : ndarray of shape (..., N), optional
        Bias b of each key, with the leading axes of `keys`, such as `KVCache.bias`; 0
        by default. A key with bias -inf, or less than -1e30, gets no attention. Any
        float dtype.
    causal : bool, default False
        If True, the queries are those of the last T ≤ N keys: query i attends to keys
        0..N - T + i.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = key. Padding gets no attention, and is not read.
    scale : float, optional
        The factor c > 0 of the scores, 1/√d by default.

    Returns
    -------
    output : ndarray of shape (..., T, d_v)
        In the dtype of `query`; 0 for a query that attends to no key.
    log_sum_exp : ndarray of shape (..., T)
        Z; float32, or float64 for float64 input; -inf for a query without keys.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` is neither boolean nor integer, or the
        dtypes of query, keys and values differ.
    ValueError
        If a shape does not fit, an entry is not finite, or T > N with `causal`.

    See Also
    --------
    join_attention : Join the outputs for several parts of the keys.
    merge_kv_cache : Merge keys and values to fewer, with a bias.

    Notes
    -----
    Scores and sums are float32, or float64 for float64 input. No T × N array is stored.

    Examples
    --------
    >>> import numpy as np
    >>> query, keys = np.array([[1.0]]), np.array([[0.0], [0.0]])
    >>> output, _ = attend(query, keys, keys + [[1.0], [5.0]], bias=np.log([3.0, 1.0]))
    >>> output  # the first key counts as three
    array([[2.]])
    """
    convert_back, query, keys, values, bias, mask = convert_inputs(
        {"query": query, "keys": keys, "values": values, "bias": bias, "mask": mask}
    )
    mask = check_cache(keys, values, mask)
    check_query_heads(query, keys)
    check_causal(causal)
    num_queries, num_keys = query.shape[-2], keys.shape[-2]
    if causal and num_queries > num_keys:
        raise ValueError(
            f"`query` must have T ≤ N = {num_keys} rows with `causal`, got "
            f"{num_queries}: they are those of the last keys"
        )
    check_finite_values("query", query)
    read = None if mask is None else expand_mask(mask, keys.shape[:-1])[..., None]
    check_finite_values("keys", keys, read)
    check_finite_values("values", values, read)
    check_bias(bias, keys, mask)
    if scale is None:  # 1/√d
        scale = query.shape[-1] ** -0.5
    scale = check_number("scale", scale, 0, np.inf, "()")
    output, log_sum_exp = compute_attend(
        query, keys, values, bias=bias, causal=bool(causal), mask=mask, scale=scale
    )
    return convert_back(output), convert_back(log_sum_exp)


def compute_attend(
    query: Any,
    keys: Any,
    values: Any,
    *,
    bias: Any = None,
    causal: bool = False,
    mask: Any = None,
    scale: float,
) -> tuple[Any, Any]:
    """Return output and log-sum-exp of arrays that are converted and checked."""
    args = query, keys, values, bias, causal, mask, scale
    return _attend_cuda(*args) if is_cuda(query) else _attend_reference(*args)


def _attend_reference(
    query: NDArray[Any],
    keys: NDArray[Any],
    values: NDArray[Any],
    bias: NDArray[Any] | None,
    causal: bool,
    mask: NDArray[np.bool_] | None,
    scale: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = key_rows(query, keys)  # (..., H_k, R, d)
    dtype = accumulation_dtype(query.dtype)
    output = np.zeros((*rows.shape[:-1], values.shape[-1]), query.dtype)
    log_sum_exp = np.full(rows.shape[:-1], -np.inf, dtype)
    head_mask = expand_mask(mask, keys.shape[:-1])
    for index in np.ndindex(keys.shape[:-2]):
        valid = None if head_mask is None else head_mask[index]
        head = _Head(
            _without(keys[index], valid, dtype),
            _without(values[index], valid, dtype),
            None if bias is None else _bias_of(bias[index], valid, dtype),
            visible_keys(query.shape[-2], keys.shape[-2], valid, causal),
        )
        q = rows[index].astype(dtype) * dtype.type(scale)
        _attend_head(q, head, output[index], log_sum_exp[index])
    leading = query.shape[:-1]
    return output.reshape(*leading, -1), log_sum_exp.reshape(leading)


def key_rows(query: Any, keys: Any) -> Any:
    """Return queries (..., H, T, d) as the rows of each key head (..., H_k, G T, d)."""
    return query.reshape(*keys.shape[:-2], -1, query.shape[-1])


def visible_keys(
    num_queries: int, num_keys: int, valid: NDArray[np.bool_] | None, causal: bool
) -> NDArray[np.int64]:
    """Return how many of the keys without padding each query sees, (T,)."""
    present = np.ones(num_keys, np.int64) if valid is None else valid.astype(np.int64)
    seen = np.cumsum(present)
    if causal:
        return seen[num_keys - num_queries :]
    return np.full(num_queries, seen[-1])


class _Head(NamedTuple):
    """The keys of one head, without padding, in the dtype of the sums."""

    keys: NDArray[Any]  # (n, d)
    values: NDArray[Any]  # (n, d_v)
    bias: Any  # (n,), or None
    visible: NDArray[np.int64]  # (T,): how many keys each query sees


def _without(x: NDArray[Any], valid: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the entries of a head (N, ...) that are not padding."""
    x = x if valid is None else x[valid]
    return x.astype(dtype, order="C", copy=False)


def _bias_of(bias: NDArray[Any], valid: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the biases of a head; -inf for those that stand for -inf.

    Masks of models have the least float instead. Every score would round to it.
    """
    bias = _without(bias, valid, dtype)
    return np.where(bias < _ABSENT, dtype.type(-np.inf), bias)


def _attend_head(
    query: NDArray[Any], head: _Head, output: NDArray[Any], log_sum_exp: NDArray[Any]
) -> None:
    """Write the output (R, d_v) and Z (R,) of the rows of one key head."""
    visible = np.tile(head.visible, len(query) // len(head.visible))  # (R,)
    step = max(1, _ENTRIES // max(1, len(head.keys)))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        # Causal queries do not see the last keys: leave out those that none sees.
        seen = int(visible[rows].max(initial=0))
        keys, bias = head.keys[:seen], None if head.bias is None else head.bias[:seen]
        # float32 can overflow for huge inputs: an infinite score would give NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            weights, z = softmax_rows(query[rows], keys, bias, visible[rows])
            if not np.isfinite(weights).all():
                wide = query[rows].astype(np.float64), keys.astype(np.float64)
                weights, z = softmax_rows(*wide, bias, visible[rows])
                weights = weights.astype(query.dtype)
            output[rows] = narrow(weights @ head.values[:seen], output.dtype)
        log_sum_exp[rows] = narrow(z, log_sum_exp.dtype)


def softmax_rows(
    query: NDArray[Any], keys: NDArray[Any], bias: Any, visible: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return exp(s - Z) (R, n) and Z (R,); both 0 and -inf for rows without keys."""
    scores = query @ keys.T
    if bias is not None:
        scores += bias
    if len(visible) and visible.min() < len(keys):
        scores[np.arange(len(keys)) >= visible[:, None]] = -np.inf
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    # A row of which every key is masked: -inf - (-inf) would be NaN.
    np.copyto(top, 0, where=np.isneginf(top))
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        z = np.log(total) + top
    scores /= np.where(total > 0, total, 1)
    return scores, z[:, 0]


def _attend_cuda(
    query: Any,
    keys: Any,
    values: Any,
    bias: Any,
    causal: bool,
    mask: Any,
    scale: float,
) -> tuple[Any, Any]:
    *leading, num_queries, dim = query.shape
    num_keys, value_dim = keys.shape[-2], values.shape[-1]
    acc_dtype = accumulation_dtype(query.dtype)
    output = empty((*leading, num_queries, value_dim), query.dtype)
    log_sum_exp = empty((*leading, num_queries), acc_dtype)
    arrays = [contiguous(x) for x in (query, keys, values)]
    arrays += contiguous(bias, acc_dtype), contiguous(mask)
    # The row of the mask (B, N) follows from B and the number of key heads.
    outer, (_, batch, heads) = math.prod(keys.shape[:-2]), layer_axes(keys.shape[:-2])
    group = math.prod(leading) // max(outer, 1)
    sizes = outer, group, batch, heads, num_queries, num_keys, dim, value_dim
    args = (*arrays, *sizes, int(causal), scale)
    # The optimized kernel keeps a row in registers and shared memory.
    wide = max(dim, value_dim) > MAX_HEAD_DIM
    if wide or implementation() == "basic":
        args = (*args, output, log_sum_exp)
        kernel = "attend", "attend", query.dtype
        launch(*kernel, args, outputs=output.size, kernels="basic")
        return output, log_sum_exp
    blocks = outer * -(-group * num_queries // ATTEND_ROWS)
    parts, scratch = num_parts(blocks, num_keys), (None, None)
    if parts > 1:
        shape = parts, log_sum_exp.size
        scratch = empty((*shape, value_dim), acc_dtype), empty((*shape, 2), acc_dtype)
    args = (*args, parts, *scratch, output, log_sum_exp)
    launch("attend", "attend", query.dtype, args, blocks=blocks * parts)
    if parts > 1:
        args = (*scratch, parts, log_sum_exp.size, value_dim, output, log_sum_exp)
        launch("attend", "join_parts", query.dtype, args, outputs=output.size)
    return output, log_sum_exp


def num_parts(blocks: int, num_keys: int) -> int:
    """Return how many blocks divide the keys of a row: all parts of the keys, or 1.

    Few rows, such as those of one new token, would leave most of the GPU idle. The
    kernels add the parts in the same order in both cases, so the bits are the same.
    """
    if blocks >= 2 * current_device().multiprocessors:
        return 1
    return max(1, -(-num_keys // ATTEND_KEYS))
