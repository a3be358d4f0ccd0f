"""Scores of the entries of a cache, by which eviction selects what it keeps.

T queries q_i are those of the last T of N entries, or any others. A_ij is the attention
of query i to key j. A key head is read by G query heads.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..arrays.checks import check_choice
from ..arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.dtypes import accumulation_dtype, narrow, zero_where_absent
from ..arrays.libraries import is_cuda
from ..arrays.shapes import expand_mask
from ..cuda.device import to_device
from .attend import key_rows
from .attention_columns import attention_columns
from .cache_checks import (
    check_bias,
    check_cache,
    check_cache_values,
    check_queries,
    check_query_heads,
)
from .cache_mass import log_sum_exp_of, select_queries

How = Literal["received", "snapkv", "expected", "rms", "last", "max"]
HOWS: tuple[How, ...] = get_args(How)
# How many of the last queries each score uses; None: all.
_NUM_QUERIES = {"snapkv": 64, "rms": 256, "last": 1}
# The power of the attention in the sums over queries; 0: the largest.
_POWERS = {"rms": 2, "max": 0}
_POOL = 5  # neighbours that "snapkv" averages
_EPSILON = 0.02  # of "expected", relative to the mean attention 1/N


@on_callers_stream
def score_keys(
    query: Array,
    keys: Array,
    *,
    values: Array | None = None,
    how: How = "received",
    causal: bool = True,
    bias: FloatArray | None = None,
    mask: BoolArray | None = None,
    scale: float | None = None,
) -> FloatArray:
    r"""Return a score for each entry of a cache: how much attention it gets.

    Parameters
    ----------
    query : ndarray of shape (T, d), (B, T, d), (B, H, T, d) or (L, B, H, T, d)
        Queries of the last T ≤ N entries, rotated like the keys; float16, bfloat16,
        float32 or float64.
    keys : ndarray of shape (..., N, d)
        Keys of the dtype of `query`, of H heads or a number that divides H.
    values : ndarray of shape (..., N, d_v), optional
        Values, which only "expected" needs.
    how : {"received", "snapkv", "expected", "rms", "last", "max"}, default "received"
        "received": the mean attention of the queries that may attend to the entry, as
        in `attention_received`. H2O [1]_ accumulates this attention.
        "snapkv": the mean attention of the last 64 queries, averaged over 5 neighbours;
        the entries of these queries get the largest score, if `causal` [2]_.
        "expected": the attention that queries of the mean μ and the covariance Σ of the
        given ones are expected to pay, times the norm of the value [3]_:
        :math:`(\operatorname{softmax}_j(c\,\mu \cdot k_j + c^2 k_j^T \Sigma k_j / 2)
        + 0.02 / N)\,|v_j|`.
        "rms": the root mean square of the attention of the last 256 queries [4]_.
        "last": the attention of the last query [5]_.
        "max": the largest attention of a query. This is the score of KVzip, if the
        queries are those of a second reading of the text, with ``causal=False`` [6]_.
    causal : bool, default True
        Whether `query` are those of the last entries, so that attention is causal. With
        False, each query attends to all entries, and T may be any number.
    bias : ndarray of shape (..., N), optional
        Bias of the entries, which is added to their scores of attention.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = entry. Padding gets the score 0, and is not read.
    scale : float, optional
        The factor c > 0 of queries and keys, 1/√d by default.

    Returns
    -------
    ndarray of shape (..., N)
        Scores ≥ 0 with the heads of `keys`: means over the query heads that read a key
        head, or the largest of them for "max". float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If a dtype is wrong, or `values` are missing or not needed.
    ValueError
        If a shape does not fit, an entry is not finite, or `how` is unknown.

    See Also
    --------
    evict : Keep the entries with the largest scores.

    References
    ----------
    .. [1] Z. Zhang et al., "H2O: Heavy-hitter oracle for efficient generative inference
       of large language models", NeurIPS 2023, arXiv:2306.14048.
    .. [2] Y. Li et al., "SnapKV: LLM knows what you are looking for before generation",
       NeurIPS 2024, arXiv:2404.14469.
    .. [3] A. Devoto, M. Jeblick and S. Jégou, "Expected attention: KV cache compression
       by estimating attention from future queries distribution", arXiv:2510.00636.
    .. [4] "Attention matching", arXiv:2602.16284.
    .. [5] M. Oren et al., "Transformers are multi-state RNNs", EMNLP 2024,
       arXiv:2401.06104.
    .. [6] J.-H. Kim et al., "KVzip: Query-agnostic KV cache compression with context
       reconstruction", NeurIPS 2025, arXiv:2505.23416.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[3.0], [0.0], [0.0]])
    >>> score_keys(np.ones((1, 1)), keys, how="last").round(2)
    array([0.91, 0.05, 0.05])
    """
    convert_back, query, keys, values, bias, mask = convert_inputs(
        {"query": query, "keys": keys, "values": values, "bias": bias, "mask": mask}
    )
    check_choice("how", how, HOWS)
    if (values is not None) != (how == "expected"):
        state = "needs `values`" if how == "expected" else "does not use `values`"
        raise TypeError(f'`how="{how}"` {state}: pass them for "expected" only')
    mask = check_cache(keys, keys if values is None else values, mask)
    check_query_heads(query, keys)
    check_bias(bias, keys, mask)
    scale = check_queries(query, keys, mask, scale, causal)
    present = None if mask is None else expand_mask(mask, keys.shape[:-1])
    check_cache_values(keys, keys if values is None else values, present)
    arrays = Scored(query, keys, values, bias, mask, scale, bool(causal))
    return convert_back(compute_score_keys(arrays, how))


class Scored(NamedTuple):
    """Converted and checked arguments of `score_keys`."""

    query: Any
    keys: Any
    values: Any
    bias: Any
    mask: Any  # (B, N)
    scale: float
    causal: bool


def compute_score_keys(arrays: Any, how: str) -> Any:
    """Return the scores (..., N) of converted and checked arrays."""
    if arrays.mask is not None:  # padding may be NaN
        present = expand_mask(arrays.mask, arrays.keys.shape[:-1])[..., None]
        zeroed = (
            None if x is None else zero_where_absent(x, present)
            for x in (arrays.keys, arrays.values)
        )
        arrays = arrays._replace(**dict(zip(("keys", "values"), zeroed, strict=True)))
    if how == "expected":
        return _expected(arrays)
    query, keys, _, bias, mask, scale, causal = arrays
    query, counted = select_queries(query, keys, mask, _NUM_QUERIES.get(how), causal)
    options = {"bias": bias, "causal": causal, "mask": mask, "scale": scale}
    z = log_sum_exp_of(query, keys, counted, **options)
    power = _POWERS.get(how, 1)
    total = attention_columns(query, keys, z, **options, power=power)
    if how == "max":
        return total
    group = total.dtype.type(key_rows(query, keys).shape[-2] // query.shape[-2])  # G
    if how == "received" and causal:
        return total / (_num_attending(query, counted, total) * group)
    rows = _num_rows(query, counted, total)
    mean = total / (rows * group)
    if how == "rms":
        return np.sqrt(mean)
    if how == "snapkv":
        return _pooled(mean, rows if causal else 0, mask)
    return mean


def _num_attending(query: Any, counted: Any, total: Any) -> Any:
    """Return how many queries may attend to each entry (..., N), at least 1."""
    num_queries, num_entries = query.shape[-2], total.shape[-1]
    if counted is None:
        host = np.minimum(np.arange(num_entries, 0, -1), num_queries)
        host = host.astype(total.dtype)
        return to_device(host) if is_cuda(total) else host
    after = np.cumsum(counted[..., ::-1], axis=-1)[..., ::-1]  # (B, T)
    before = np.broadcast_to(
        after[..., :1], (*after.shape[:-1], num_entries - num_queries)
    )
    counts = np.concatenate((before, after), axis=-1)
    return np.maximum(expand_mask(counts, total.shape), 1).astype(total.dtype)


def _num_rows(query: Any, counted: Any, total: Any) -> Any:
    """Return how many queries count, as a number or (..., 1)."""
    if counted is None:
        return total.dtype.type(query.shape[-2])
    rows = np.maximum(counted.sum(axis=-1, keepdims=True), 1)
    return expand_mask(rows, (*total.shape[:-1], 1)).astype(total.dtype)


def _pooled(scores: Any, num_rows: Any, mask: Any) -> Any:
    """Return the means (..., N) of 5 neighbours; the last entries get the largest one.

    The last `num_rows` entries, which are the window, do not count in the means of the
    others, because tokens attend to themselves more than to others. Beyond the ends,
    scores count as 0.
    """
    zero, part = scores.dtype.type(0), scores.dtype.type(1 / _POOL)
    num_entries, half = scores.shape[-1], _POOL // 2
    if mask is None:
        present = np.zeros(scores.shape, np.bool_, like=scores)
        present.fill(True)
    else:  # padding goes to the end, so that tokens are neighbours of tokens
        present = expand_mask(mask, scores.shape)
        order = np.argsort(~present, axis=-1, kind="stable")
        scores = np.take_along_axis(scores, order, -1)
        present = np.take_along_axis(present, order, -1)
    rank = np.cumsum(present, axis=-1)
    window = rank > rank[..., -1:] - num_rows
    shape = *scores.shape[:-1], num_entries + 2 * half
    wide = np.zeros(shape, scores.dtype, like=scores)
    wide[..., half : half + num_entries] = np.where(window, zero, scores) * part
    pooled = wide[..., :num_entries]
    for shift in range(1, _POOL):
        pooled = pooled + wide[..., shift : shift + num_entries]
    pooled = np.where(window | ~present, zero, pooled)
    top = pooled.max(axis=-1, keepdims=True)
    # If every entry is in the window, all scores are equal.
    top = np.where(top > 0, top, scores.dtype.type(1))
    pooled = np.where(window & present, top, pooled)
    if mask is None:
        return pooled
    back = np.argsort(order, axis=-1, kind="stable")
    return np.take_along_axis(pooled, back, -1)


def _expected(arrays: Scored) -> Any:
    """Return (softmax_j(c μ·k + c² kᵀΣk / 2) + ε / N) |v|, averaged over heads."""
    dtype = accumulation_dtype(arrays.keys.dtype)
    # float32 overflows for huge inputs; then use float64, on the CPU.
    with np.errstate(over="ignore", invalid="ignore"):
        expected = _expected_in(dtype, arrays)
        if is_cuda(expected) or np.isfinite(expected).all():
            return expected
        expected = _expected_in(np.dtype(np.float64), arrays)
        return narrow(np.minimum(expected, np.finfo(dtype).max), dtype)


def _expected_in(dtype: np.dtype[Any], arrays: Scored) -> Any:
    """Return the scores of `_expected`, computed in float32 or float64."""
    query, keys, values, bias, mask, scale, causal = arrays
    query, counted = select_queries(query, keys, mask, None, causal)
    rows = query.reshape(*keys.shape[:-2], -1, *query.shape[-2:]).astype(dtype)
    count: Any = dtype.type(query.shape[-2])
    valid = None
    if counted is not None:
        valid = expand_mask(counted, query.shape[:-1])
        valid = valid.reshape(rows.shape[:-1])[..., None]
        count = np.maximum(valid.sum(axis=-2, keepdims=True), 1).astype(dtype)
    mean = rows.sum(axis=-2, keepdims=True) / count  # μ, (..., G, 1, d)
    centred = rows - mean
    if valid is not None:
        centred = np.where(valid, centred, dtype.type(0))
    wide = keys.astype(dtype)[..., None, :, :]  # (..., 1, N, d)
    # kᵀΣk is the mean of the squared products of k with the centred queries.
    covariance = centred.swapaxes(-1, -2) @ centred / count
    quadratic = ((wide @ covariance) * wide).sum(axis=-1)  # (..., G, N)
    c = dtype.type(scale)
    scores = c * (wide @ mean.swapaxes(-1, -2))[..., 0] + c * c / 2 * quadratic
    if bias is not None:
        scores = scores + bias.astype(dtype)[..., None, :]
    num_present: Any = dtype.type(keys.shape[-2])
    if mask is not None:
        present = expand_mask(mask, keys.shape[:-1])
        scores = np.where(present[..., None, :], scores, dtype.type(-np.inf))
        num_present = present.sum(axis=-1, keepdims=True).astype(dtype)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    expected = weights.mean(axis=-2) + dtype.type(_EPSILON) / num_present
    norms = np.sqrt((values.astype(dtype) ** 2).sum(axis=-1))
    return expected * norms
