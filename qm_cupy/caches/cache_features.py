"""By what the entries of a cache are grouped, and how much each head counts.

An entry has the key k_j before its rotation and the value v_j. The queries q have the
elements q_e; c is the factor of scores. If two entries merge, the scores of a query
change by about c q · (k_i - k_j), and its output by a part of v_i - v_j. So the vector
by which an entry is grouped is

    f_j = (√w_e k_je for the elements e of the key, σ v_j)

- w_e is 1 if every head has its own budget. If several have one, it is the mean of q_e²
  over the queries, also over both elements of a pair that rotates together, relative to
  its mean over e; a tenth of it is replaced by 1. So the heights of merges are about
  errors of scores, and can be compared.
- σ is half the spread of √w k divided by that of v, over the entries that may merge.

When several heads have one budget, an error in each of them counts by its weight

    h = (attention of the last queries to the entries that may merge) · c² mean |q|²

If the queries are those of a second reading, the attention to entry j is √(a_j r_j):
a_j is that of the last queries, and r_j the largest of any query of this reading.
"""

from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from .cache_checks import Rotary

MAX_QUERIES = 256  # last queries whose elements count
_EVEN = 0.1  # the part of w that is 1
_VALUES = 0.5  # the spread of values, relative to that of keys
_LEAST_WEIGHT = 1e-4  # of a head, relative to the mean


def grouping_features(
    straight: Any, values: Any, query: Any, free: Any, rotary: Rotary | None
) -> Any:
    """Return the vectors f (..., N, d + d_v) by which entries are grouped.

    `straight` (..., N, d) are keys before their rotation. `query` (..., T, d) are the
    last queries of H or a multiple of H heads, with zeros for padding, or None: then
    all w are 1.
    """
    dtype = accumulation_dtype(straight.dtype)
    keys, values = straight.astype(dtype, copy=False), values.astype(dtype)
    if query is not None:
        query = query.astype(dtype)
        keys = keys * np.sqrt(_element_weights(query, keys, rotary))
    size_of_keys, size_of_values = _spread(keys, free), _spread(values, free)
    known = (size_of_keys > 0) & (size_of_values > 0)
    one = dtype.type(1)
    ratio = np.where(known, size_of_keys, one) / np.where(known, size_of_values, one)
    ratio = np.where(known, ratio * dtype.type(_VALUES), dtype.type(0))
    return np.concatenate((keys, ratio * values), axis=-1)


def head_weights(received: Any, query: Any, free: Any) -> Any:
    """Return the weight h of each head (..., H, 1), relative to the largest of a pool.

    `received` (..., H, N) is the attention that each entry receives. The H heads have
    one budget. The factor c² is the same in all of them.
    """
    dtype = received.dtype
    attention = np.where(free, received, dtype.type(0)).sum(axis=-1, keepdims=True)
    query = query.astype(dtype)
    tiny = np.finfo(dtype).tiny
    # Relative to the peak, so that no square overflows.
    peak = np.abs(query).max(axis=(-3, -2, -1), keepdims=True) + tiny
    heads = (*attention.shape[:-1], -1)  # queries of several heads read one key head
    squares = ((query / peak) ** 2).reshape(heads).mean(axis=-1, keepdims=True)
    weight = attention * squares
    weight = weight / (weight.max(axis=-2, keepdims=True) + tiny)
    return np.maximum(weight, dtype.type(_LEAST_WEIGHT))


def _element_weights(query: Any, keys: Any, rotary: Rotary | None) -> Any:
    """Return w (..., 1, d) of the elements of keys, with the mean 1."""
    dim = keys.shape[-1]
    peak = np.abs(query).max(axis=(-2, -1), keepdims=True)
    one = query.dtype.type(1)
    scaled = query / np.where(peak > 0, peak, one)
    # The rows of all heads that read a key head.
    rows = (scaled * scaled).reshape(*keys.shape[:-2], -1, dim)
    weight = rows.mean(axis=-2, keepdims=True)
    if rotary is not None:
        weight = _mean_of_pairs(weight, rotary)
    mean = weight.mean(axis=-1, keepdims=True)
    weight = np.where(mean > 0, weight, one) / np.where(mean > 0, mean, one)
    return weight * weight.dtype.type(1 - _EVEN) + weight.dtype.type(_EVEN)


def _mean_of_pairs(weight: Any, rotary: Rotary) -> Any:
    """Return weights (..., d) that are equal in both elements of a rotated pair."""
    width = 2 * len(rotary.inv_freq)
    if rotary.interleaved:  # elements 2i and 2i + 1
        pairs = weight[..., :width].reshape(*weight.shape[:-1], -1, 2)
        both = pairs.mean(axis=-1, keepdims=True)
        even = np.concatenate((both, both), axis=-1).reshape(*weight.shape[:-1], width)
    else:  # elements i and i + r / 2
        pairs = weight[..., :width].reshape(*weight.shape[:-1], 2, -1)
        half = pairs.mean(axis=-2)
        even = np.concatenate((half, half), axis=-1)
    return np.concatenate((even, weight[..., width:]), axis=-1)


def _spread(x: Any, free: Any) -> Any:
    """Return the root mean squared deviation (..., 1, 1) of the free x (..., N, d)."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    x = np.where(free[..., None], x, zero)
    peak = np.abs(x).max(axis=(-2, -1), keepdims=True)
    scaled = x / np.where(peak > 0, peak, one)
    count = np.maximum(free.sum(axis=-1)[..., None, None], 1).astype(x.dtype)
    mean = scaled.sum(axis=-2, keepdims=True) / count
    centred = np.where(free[..., None], scaled - mean, zero)
    squares = (centred * centred).mean(axis=-1, keepdims=True)
    return peak * np.sqrt(squares.sum(axis=-2, keepdims=True) / count)
