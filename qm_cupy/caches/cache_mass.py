"""The mass of the entries of a cache: how much attention each of them receives.

a_j is the mean attention of the last queries to entry j, and r_j is the mean attention
of all queries. With the means ā and r̄ over the entries that may merge, the mass is

    m_j = (a_j / ā + r_j / r̄ + _FLOOR times the number of terms) |v_j| / |v̄|

for the value v_j, whose norm has the mean |v̄|. So m_j is about how much the entry adds
to the output of attention. Without both terms, e^b of the bias b_j takes their place.

Z_i is the logarithm of Σ_j exp(s_ij) over the scores s_ij of query i.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype, zero_where_absent
from ..arrays.libraries import is_cuda
from ..arrays.shapes import expand_mask
from ..stages.saliency.attention_received import compute_attention_received
from .attend import compute_attend
from .attention_columns import attention_columns

NUM_QUERIES = 32  # last queries that count
_FLOOR = 0.02  # so that an entry without attention has a mass
_LEAST = 1e-3  # so that an entry without a value has one


class LastQueries(NamedTuple):
    """The last queries of each sequence, and Z of their scores."""

    query: Any  # (..., T, d)
    log_sum_exp: Any  # Z (..., T); -inf for queries that do not count
    scale: float
    causal: bool  # whether they are those of the last entries


def last_queries(
    query: Any, keys: Any, bias: Any, mask: Any, scale: float, causal: bool
) -> LastQueries:
    """Return the last queries that are not padding, and Z over the entries they see."""
    query, counted = select_queries(query, keys, mask, NUM_QUERIES, causal)
    options = {"bias": bias, "mask": mask, "scale": scale, "causal": causal}
    z = log_sum_exp_of(query, keys, counted, **options)
    return LastQueries(query, z, scale, causal)


def select_queries(
    query: Any, keys: Any, mask: Any, wanted: int | None, causal: bool
) -> tuple[Any, Any]:
    """Return the queries (..., T, d), and which rows (B, T) count, or None for all.

    The last `wanted` queries that are not padding count. None means all of them. If
    they are not `causal`, the mask is not theirs, and none of them is padding.
    """
    num_queries, num_entries = query.shape[-2], keys.shape[-2]
    if mask is None or not causal:  # the last rows are those that count
        return query[..., -(wanted or num_queries) :, :], None
    # The last rows may be padding, so take all rows. Padding may be NaN.
    counted = mask[..., num_entries - num_queries :]
    if wanted is not None:
        after = np.cumsum(counted[..., ::-1], axis=-1)[..., ::-1]  # tokens from here on
        counted = counted & (after <= wanted)
    rows = expand_mask(counted, query.shape[:-1])[..., None]
    return zero_where_absent(query, rows), counted


def log_sum_exp_of(query: Any, keys: Any, counted: Any, **options: Any) -> Any:
    """Return Z (..., T); -inf for rows that do not count.

    The options are `bias`, `causal`, `mask` and `scale` of `attend`.
    """
    # Only Z is needed, so attend to one column.
    _, z = compute_attend(query, keys, keys[..., :1], **options)
    if counted is None:
        return z
    return np.where(expand_mask(counted, z.shape), z, z.dtype.type(-np.inf))


def received_of_last(last: LastQueries, keys: Any, bias: Any, mask: Any) -> Any:
    """Return the sum (..., N) of the attention of the last queries to each key.

    Attention is relative to Z, which belongs to the original entries. `keys` may be
    merged keys; then `last` must not be causal.
    """
    return attention_columns(
        last.query,
        keys,
        last.log_sum_exp,
        bias=bias,
        causal=last.causal,
        mask=mask,
        scale=last.scale,
    )


def queries_after(last: LastQueries, free: Any) -> LastQueries:
    """Return the last queries that may attend to all free entries (..., N).

    The others see only a part of some groups. Return the argument if none is left out.
    """
    if not last.causal:  # they see all
        return last
    num_queries, num_entries = last.query.shape[-2], free.shape[-1]
    tail = free[..., num_entries - num_queries :]  # (..., H, T)
    if not is_cuda(free) and not tail.any():
        return last
    # Free entries from here on, without this one.
    later = np.cumsum(tail[..., ::-1], axis=-1)[..., ::-1] - tail
    z = last.log_sum_exp  # (..., G H, T)
    groups = z.reshape(*free.shape[:-1], -1, num_queries)  # (..., H, G, T)
    sees_all = later[..., None, :] == 0
    z = np.where(sees_all, groups, z.dtype.type(-np.inf)).reshape(z.shape)
    return last._replace(log_sum_exp=z)


def cache_mass(
    from_last: Any,
    attention: Any,
    free: NDArray[np.bool_],
    keys: Any,
    values: Any,
    bias: Any,
) -> Any:
    """Return the mass (..., N) > 0; `free` (..., N) are the entries that may merge.

    The two sources are (..., N), or None: the attention of the last queries, and the
    mean attention received, of H or a multiple of H heads.
    """
    dtype = accumulation_dtype(keys.dtype)
    terms = []
    if from_last is not None:
        terms.append(_relative(from_last.astype(dtype), free))
    if attention is not None:
        terms.append(_relative(mean_of_heads(attention.astype(dtype), keys), free))
    if not terms and bias is not None:
        terms.append(_relative(_exponentials(bias.astype(dtype)), free))
    norms = _relative(_norms(values.astype(dtype)), free) + dtype.type(_LEAST)
    if not terms:
        return norms
    return (sum(terms) + dtype.type(_FLOOR * len(terms))) * norms


def _exponentials(bias: Any) -> Any:
    """Return e^b (..., N), relative to the largest of a head."""
    top = bias.max(axis=-1, keepdims=True)
    return np.exp(bias - np.where(np.isfinite(top), top, bias.dtype.type(0)))


def _norms(values: Any) -> Any:
    """Return the norms (..., N) of values, relative to the largest entry of a head."""
    peak = np.abs(values).max(axis=(-2, -1), keepdims=True)
    scaled = values / np.where(peak > 0, peak, values.dtype.type(1))
    return np.sqrt((scaled * scaled).sum(axis=-1))


def received_of_all(query: Any, keys: Any, bias: Any, mask: Any, scale: float) -> Any:
    """Return the mean attention that each entry receives, or None if T < N."""
    if query.shape[-2] != keys.shape[-2] or bias is not None:
        return None
    return compute_attention_received(
        query=query, key=keys, causal=True, scale=scale, mask=mask
    )


def mean_of_heads(attention: Any, keys: Any) -> Any:
    """Return the mean over the query heads that read each key head (..., N)."""
    if attention.shape == keys.shape[:-1]:
        return attention
    *outer, heads, num_entries = keys.shape[:-1]
    return attention.reshape(*outer, heads, -1, num_entries).mean(axis=-2)


def _relative(x: Any, free: Any) -> Any:
    """Return x (..., N) divided by its mean over the free entries, 0 elsewhere."""
    x = np.where(free, x, x.dtype.type(0))
    peak = x.max(axis=-1, keepdims=True)
    x = x / np.where(peak > 0, peak, x.dtype.type(1))  # so that no sum overflows
    count = np.maximum(free.sum(axis=-1, keepdims=True), 1).astype(x.dtype)
    mean = x.sum(axis=-1, keepdims=True) / count
    return x / np.where(mean > 0, mean, x.dtype.type(1))
