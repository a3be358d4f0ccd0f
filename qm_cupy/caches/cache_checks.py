"""Checks of the arguments of functions that read key-value caches.

A cache (..., N, d) has N entries for each of H key heads, B sequences and L layers, and
queries (..., T, d) have H or a multiple of H heads. The leading axes are (), (B,),
(B, H) or (L, B, H).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_finite_values,
    check_floating,
    check_integer,
    check_mask,
    check_not_negative,
    check_number,
    check_shape,
)
from ..arrays.libraries import is_cuda
from ..arrays.shapes import check_heads, expand_mask, layout_of, saliency_shape
from ..settings import finite_checked

# Larger entries could overflow in the squares of distances.
_LARGEST = 1e100


class Rotary(NamedTuple):
    """How a model rotates keys by their positions (RoPE)."""

    inv_freq: NDArray[np.float64]
    """(r / 2,): angles for one position, in radians. The first r elements rotate."""
    interleaved: bool
    """Whether elements (2i, 2i + 1) are a pair, instead of (i, i + r / 2)."""
    scaling: float
    """Factor of the rotated elements."""


def check_cache(
    keys: NDArray[Any], values: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Raise unless keys and values are a cache; return the mask (B, N).

    Padding may be NaN.
    """
    check_heads("keys", keys, "Nd")
    check_heads("values", values, "Nd")
    check_not_empty("keys", keys.shape)
    if values.shape[:-1] != keys.shape[:-1]:
        letters = ", ".join(layout_of(keys.ndim, "Nd")[:-1])
        raise ValueError(
            f"`values` must have the axes ({letters}) = {tuple(keys.shape[:-1])} of "
            f"`keys` before the last one, got shape {tuple(values.shape)}"
        )
    if values.dtype != keys.dtype:
        raise TypeError(
            f"`values` must be {keys.dtype} like `keys`, got {values.dtype}"
        )
    return check_mask(mask, saliency_shape(keys.shape[:-1]))


def check_not_empty(name: str, shape: tuple[int, ...]) -> None:
    """Raise if an axis is empty, such as that of a batch without sequences."""
    if 0 in shape:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(shape)}")


def check_cache_values(
    keys: NDArray[Any], values: NDArray[Any], present: NDArray[np.bool_] | None
) -> None:
    """Raise if an entry that is present (..., N) is not finite, or is huge."""
    read = None if present is None else present[..., None]
    check_finite_values("keys", keys, read)
    check_finite_values("values", values, read)
    if keys.dtype == np.float64 and finite_checked() and not is_cuda(keys):
        size = np.abs(keys if read is None else np.where(read, keys, 0))
        if size.max(initial=0) > _LARGEST:
            raise ValueError(
                f"`keys` must lie within ±{_LARGEST:g}, because their squared "
                f"distances are computed, got {size.max():.3g}: scale them down"
            )


def check_bias(
    bias: NDArray[Any] | None, keys: NDArray[Any], mask: NDArray[np.bool_] | None
) -> None:
    """Raise unless biases (..., N) are finite or -inf, except those of padding."""
    if bias is None:
        return
    check_floating("bias", bias)
    axes = layout_of(keys.ndim, "Nd")[:-1]
    check_shape("bias", bias, axes, tuple(keys.shape[:-1]))
    if not finite_checked() or is_cuda(bias):
        return
    wrong = np.isnan(bias) | (bias == np.inf)
    if mask is not None:
        wrong &= expand_mask(mask, bias.shape)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"`bias` must be finite or -inf, got {bias[at]} at index {at}")


def check_queries(
    query: NDArray[Any] | None,
    keys: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    scale: Any,
    causal: Any = True,
) -> float:
    """Raise unless queries (..., T, d) fit the keys; return the scale of scores.

    `causal` is whether they are those of the last entries.
    """
    causal = check_flag("causal", causal)
    if query is not None:
        check_query_heads(query, keys)
        num_queries, num_entries = query.shape[-2], keys.shape[-2]
        if causal and num_queries > num_entries:
            raise ValueError(
                f"`query` must have those of the last T ≤ N = {num_entries} entries, "
                f"got T = {num_queries}: pass `causal=False` for other queries"
            )
        read = None
        if causal and mask is not None:
            read = expand_mask(mask[..., num_entries - num_queries :], query.shape[:-1])
            read = read[..., None]
        check_finite_values("query", query, read)
    if scale is None:  # 1/√d
        scale = keys.shape[-1] ** -0.5
    return check_number("scale", scale, 0, np.inf, "()")


def check_query_heads(query: NDArray[Any], keys: NDArray[Any]) -> None:
    """Raise unless queries (..., T, d) have the dtype, width and heads of the keys."""
    check_heads("query", query, "Td")
    if query.dtype != keys.dtype:
        raise TypeError(f"`query` must be {keys.dtype} like `keys`, got {query.dtype}")
    _check_query_shape("query", query.shape, keys.shape, "Td")


def check_attention(
    attention: NDArray[Any] | None, keys: NDArray[Any], present: Any
) -> None:
    """Raise unless attention received (..., N) fits the keys, and is ≥ 0."""
    if attention is None:
        return
    check_heads("attention", attention, "N")
    _check_query_shape("attention", (*attention.shape, 0), keys.shape, "N")
    read = None
    if present is not None:
        heads = attention.shape[-2] // keys.shape[-3] if keys.ndim > 3 else 1
        read = np.repeat(present, heads, axis=-2) if heads > 1 else present
    check_finite_values("attention", attention, read)
    check_not_negative("attention", attention, read)


def _check_query_shape(
    name: str, shape: tuple[int, ...], keys: tuple[int, ...], last: str
) -> None:
    """Raise unless the leading axes are those of the keys, with a multiple of H heads.

    Both shapes end with two axes. The last one must agree if `last` is "Td", and the
    one before if `last` is "N".
    """
    layout = layout_of(len(keys), "Nd")
    fits = len(shape) == len(keys)
    fits = fits and all(
        q == k or (axis == "H" and q > 0 and q % k == 0)
        for axis, q, k in zip(layout[:-2], shape[:-2], keys[:-2], strict=True)
    )
    same = (shape[-1], keys[-1]) if last == "Td" else (shape[-2], keys[-2])
    if not fits or same[0] != same[1]:
        wanted = (*keys[:-2], "T", keys[-1]) if last == "Td" else keys[:-1]
        heads = ", or a multiple of H heads" if "H" in layout else ""
        got = shape if last == "Td" else shape[:-1]
        letters = ", ".join(layout[:-2] + last)
        raise ValueError(
            f"`{name}` must have shape ({letters}) = "
            f"({', '.join(map(str, wanted))}){heads}, got {tuple(got)}"
        )


def check_rotary(
    inv_freq: Any, interleaved: Any, scaling: Any, dim: int
) -> Rotary | None:
    """Return the rotation of keys of width d, or None without `inv_freq`."""
    scaling = check_number("rotary_scaling", scaling, 0, np.inf, "()")
    interleaved = check_flag("interleaved", interleaved)
    if inv_freq is None:
        if interleaved or scaling != 1:
            raise ValueError(
                "`interleaved` and `rotary_scaling` need `inv_freq`: pass the model's "
                "`rotary_emb.inv_freq`"
            )
        return None
    try:
        angles = np.asarray(inv_freq, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"`inv_freq` must be numbers (r / 2), got {type(inv_freq).__name__}"
        ) from None
    if angles.ndim != 1 or not 1 <= len(angles) <= dim // 2:
        raise ValueError(
            f"`inv_freq` must have shape (r / 2) with r ≤ d = {dim}, got {angles.shape}"
        )
    check_finite_values("inv_freq", angles)
    return Rotary(angles, interleaved, scaling)


def check_count(name: str, count: Any) -> int:
    """Return a number of entries ≥ 0, or raise."""
    number = check_integer(name, count)
    if number < 0:
        raise ValueError(f"`{name}` must be ≥ 0, got {number}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return an option that is True or False, or raise."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return bool(value)


def check_window(window: Any) -> int:
    """Return the largest number of entries of a window, or raise."""
    size = check_integer("window", window)
    if size < 8:
        raise ValueError(f"`window` must be at least 8, got {size}")
    return size
