"""Attention of the transformer prior: rotated queries and keys, sizes as weights."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from ..cuda.launch import device_counts, launch

_BASE = 10_000.0  # of the rotary wavelengths
_SCORES = 1 << 22  # attention scores at a time


class Span(NamedTuple):
    """Where the tokens of a pass stand, and which of them may be attended to."""

    positions: Any
    """(B, T), or None: from `start` on."""
    sizes: Any
    """(B, capacity of the cache), or None: all 1."""
    counts: NDArray[np.int64]
    """Valid ones among the T of each sequence."""
    start: int
    """Tokens before them, which are in the cache."""
    reverse: bool


def rotary_turns(width: int) -> NDArray[np.float64]:
    """Return by what share of a turn one position rotates each pair: 1 / wavelength."""
    pairs = np.arange(width // 2)
    turns: NDArray[np.float64] = _BASE ** (-2.0 * pairs / width) / (2 * np.pi)
    return turns


def split_heads(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> NDArray[Any]:
    """Return queries (B, T, H, d), rotated; keys and values go to the caches."""
    if is_cuda(heads):
        return _split_heads_cuda(heads, span, turns, keys, values)
    return _split_heads_reference(heads, span, turns, keys, values)


def _split_heads_reference(
    heads: NDArray[Any],
    span: Span,
    turns: NDArray[np.float64] | None,
    keys: NDArray[Any],
    values: NDArray[Any],
) -> NDArray[Any]:
    rows = heads.shape[1]
    query, key, value = (heads[:, :, i] for i in range(3))  # (B, T, H, d)
    if turns is not None:
        positions = span.positions
        if positions is None:
            positions = span.start + np.arange(rows)[None]
        angle = 2 * np.pi * (positions[:, :, None, None] * turns % 1)  # (B, T, 1, d/2)
        cosine, sine = np.cos(angle), np.sin(angle)
        query, key = (_rotated(x, cosine, sine) for x in (query, key))
    there = slice(span.start, span.start + rows)
    keys[:, :, there] = key.transpose(0, 2, 1, 3)
    values[:, :, there] = value.transpose(0, 2, 1, 3)
    return query


def _rotated(
    x: NDArray[Any], cosine: NDArray[np.float64], sine: NDArray[np.float64]
) -> NDArray[Any]:
    a, b = np.split(x, 2, axis=-1)
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def _split_heads_cuda(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> Any:
    batch, rows, _, num_heads, width = heads.shape
    query = empty((batch, rows, num_heads, width), heads.dtype)
    sizes = batch, rows, num_heads, width, keys.shape[-2], span.start
    args = (heads, span.positions, turns, *sizes, query, keys, values)
    kernel, pairs = ("attention", "split_heads"), query.size // 2
    launch(*kernel, heads.dtype, args, outputs=query.size, threads=pairs)
    return query


def attend(query: Any, keys: Any, values: Any, span: Span) -> Any:
    """Return what each query (B, T, H, d) reads from the cache (B, H, capacity, d)."""
    if is_cuda(query):
        return attend_cuda(query, keys, values, span)
    return _attend_reference(query, keys, values, span)


def _attend_reference(
    query: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], span: Span
) -> NDArray[Any]:
    batch, rows, num_heads, width = query.shape
    length = span.start + rows
    keys, values = keys[:, :, :length], values[:, :, :length]
    j = np.arange(length)
    limits = (span.start + span.counts)[:, None, None, None]
    bias: Any = 0
    if span.sizes is not None:
        sizes = span.sizes[:, None, None, :length]
        with np.errstate(divide="ignore"):
            bias = np.log(sizes)  # -inf for size 0
    read = np.empty_like(query)
    part = max(1, _SCORES // max(1, batch * num_heads * length))
    for first in range(0, rows, part):
        chosen = slice(first, min(first + part, rows))
        some = query[:, chosen].transpose(0, 2, 1, 3) * query.dtype.type(width**-0.5)
        scores = some @ keys.swapaxes(-1, -2) + bias  # (B, H, part, length)
        i = (span.start + np.arange(rows)[chosen])[:, None]
        allowed = (j >= i if span.reverse else j <= i) & (j < limits)
        scores[~np.broadcast_to(allowed, scores.shape)] = -np.inf
        scores -= np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        read[:, chosen] = ((scores @ values) / np.where(total > 0, total, 1)).transpose(
            0, 2, 1, 3
        )
    return read


def attend_cuda(query: Any, keys: Any, values: Any, span: Span) -> Any:
    batch, rows, num_heads, width = query.shape
    out = empty(query.shape, query.dtype)
    counts = span.counts
    each = None if (counts == rows).all() else device_counts(counts)[0]
    sizes = batch, rows, num_heads, width, keys.shape[-2], span.start
    arrays = query, keys, values, span.sizes, each
    args = (*arrays, *sizes, int(span.reverse), width**-0.5, out)
    kernel, blocks = ("attention", "attend"), batch * rows * num_heads
    launch(*kernel, query.dtype, args, outputs=out.size, blocks=blocks)
    return out
