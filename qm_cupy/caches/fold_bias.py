"""A bias for each key as eight more dimensions, for attention kernels without a bias.

    q' = [q, 1, 1, 0, ...]      k' = [k, hi, lo, 0, ...]      hi + lo = b / c

so that c q' · k' = c q · k + b. hi is b / c rounded to the dtype of the keys, and lo
the rounded rest.
"""

from typing import Any

import numpy as np

from ..arrays.checks import check_finite_values, check_number
from ..arrays.conversion import (
    Array,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.shapes import check_heads
from .cache_checks import check_bias, check_query_heads

FOLDED = 8  # dimensions, so that rows of 16-bit types stay aligned to 16 bytes
# What stands for -inf: the weight of such a key is exp(-30,000) = 0.
_ABSENT = -30_000.0


@on_callers_stream
def fold_bias(
    query: Array, keys: Array, bias: FloatArray, *, scale: float | None = None
) -> tuple[Array, Array]:
    r"""Return queries and keys of width d + 8, whose products contain the bias.

    .. math:: c\,q'_i \cdot k'_j = c\,q_i \cdot k_j + b_j

    Use it with attention kernels that take no bias. Pass them the scale c, because
    their default would be that of the width d + 8.

    Parameters
    ----------
    query : ndarray of shape (T, d), (B, T, d), (B, H, T, d) or (L, B, H, T, d)
        Queries; float16, bfloat16, float32 or float64.
    keys : ndarray of shape (..., N, d)
        Keys of the dtype of `query`. They may have fewer heads, a number that divides
        H.
    bias : ndarray of shape (..., N)
        Bias b of each key, with the leading axes of `keys`. For -inf, the score becomes
        about -30,000, whose weight is 0 if the other scores are not as low.
    scale : float, optional
        The factor c > 0 of the scores, 1/√d by default.

    Returns
    -------
    query : ndarray of shape (..., T, d + 8)
        The queries, then two ones and zeros, in their dtype.
    keys : ndarray of shape (..., N, d + 8)
        The keys, then the two parts of the bias and zeros, in their dtype.

    Raises
    ------
    TypeError
        If an array is not floating, or the dtypes of queries and keys differ.
    ValueError
        If a shape does not fit, an entry is not finite, or b / c exceeds the range of
        the dtype.

    Notes
    -----
    Two numbers hold b / c, so the error of a score is at most :math:`2^{-16} |b|` in
    bfloat16, and :math:`2^{-22} |b|` in float16.

    Examples
    --------
    >>> import numpy as np
    >>> query, keys = fold_bias(np.ones((1, 2)), np.ones((1, 2)), np.array([3.0]))
    >>> (query @ keys.T / np.sqrt(2)).round(4)  # √2 and the bias
    array([[4.4142]])
    """
    convert_back, query, keys, bias = convert_inputs(
        {"query": query, "keys": keys, "bias": bias}
    )
    check_heads("keys", keys, "Nd")
    check_query_heads(query, keys)
    check_bias(bias, keys, None)
    check_finite_values("query", query)
    check_finite_values("keys", keys)
    if scale is None:  # 1/√d
        scale = query.shape[-1] ** -0.5
    scale = check_number("scale", scale, 0, np.inf, "()")
    folded = compute_fold_bias(query, keys, bias, scale)
    return convert_back(folded[0]), convert_back(folded[1])


def compute_fold_bias(query: Any, keys: Any, bias: Any, scale: float) -> Any:
    """Return wider queries and keys of converted arrays; elementwise, also on a GPU."""
    largest = _largest(keys.dtype)
    wide = np.maximum(bias.astype(np.float64), _ABSENT) / scale
    wide = np.clip(wide, -largest, largest)
    high = wide.astype(keys.dtype)
    low = (wide - high.astype(np.float64)).astype(keys.dtype)
    dim = keys.shape[-1]
    new_query, new_keys = (
        np.zeros((*x.shape[:-1], dim + FOLDED), x.dtype, like=x) for x in (query, keys)
    )
    new_query[..., :dim] = query
    new_query[..., dim : dim + 2] = 1
    new_keys[..., :dim] = keys
    new_keys[..., dim] = high
    new_keys[..., dim + 1] = low
    return new_query, new_keys


def _largest(dtype: Any) -> float:
    """Return a number whose double still fits the dtype."""
    return 2.0**14 if dtype == np.float16 else 2.0**126
