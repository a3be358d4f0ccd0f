"""Attention of the transformer prior: rotated queries and keys, sizes as weights."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from ..cuda.launch import device_counts, launch

_BASE = 10_000.0  # base of the rotary wavelengths 2π · 10000^(2i / d), in positions
_SCORES = 1 << 22  # attention scores in memory at once: 16 MB of float32


class Span(NamedTuple):
    """Positions and sizes of the T tokens of a pass, and which of them are valid."""

    positions: Any
    """(B, T), or None: `start`, `start` + 1, …"""
    sizes: Any
    """(B, capacity of the cache), or None: every size is 1."""
    counts: NDArray[np.int64]
    """(B,), the number of valid tokens among the T tokens of each sequence."""
    start: int
    """Number of tokens that are already in the cache, before these T tokens."""
    reverse: bool
    """Whether a token attends to itself and later tokens, instead of earlier ones."""


def rotary_turns(width: int) -> NDArray[np.float64]:
    """Return the fraction of a full turn that one position adds to each pair, (d/2,).

    Pair i of a head of width d rotates by the angle position · 10000^(-2i / d). In
    turns, the angle is divided by 2π.
    """
    pairs = np.arange(width // 2)
    turns: NDArray[np.float64] = _BASE ** (-2.0 * pairs / width) / (2 * np.pi)
    return turns


def split_heads(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> NDArray[Any]:
    """Return rotated queries (B, T, H, d); write keys and values to the caches.

    `heads` is (B, T, 3, H, d): queries, keys and values. `turns` is None if positions
    are learned. Then nothing is rotated.
    """
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
            positions = span.start + np.arange(rows)[None]  # (1, T)
        # Whole turns are dropped in float64, so a large position keeps its digits.
        angle = 2 * np.pi * (positions[:, :, None, None] * turns % 1)  # (B, T, 1, d/2)
        cosine, sine = np.cos(angle), np.sin(angle)
        query, key = (_rotated(x, cosine, sine) for x in (query, key))
    slots = slice(span.start, span.start + rows)  # of the cache: (B, H, capacity, d)
    keys[:, :, slots] = key.transpose(0, 2, 1, 3)
    values[:, :, slots] = value.transpose(0, 2, 1, 3)
    return query


def _rotated(
    x: NDArray[Any], cosine: NDArray[np.float64], sine: NDArray[np.float64]
) -> NDArray[Any]:
    # Elements i and i + d/2 are a pair (a, b), which is rotated by the angle θ_i:
    # (a cos θ - b sin θ, b cos θ + a sin θ).
    a, b = np.split(x, 2, axis=-1)  # (B, T, H, d/2) each
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def _split_heads_cuda(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> Any:
    batch, rows, _, num_heads, width = heads.shape
    query = empty((batch, rows, num_heads, width), heads.dtype)
    sizes = batch, rows, num_heads, width, keys.shape[-2], span.start
    args = (heads, span.positions, turns, *sizes, query, keys, values)
    kernel, pairs = ("attention", "split_heads"), query.size // 2  # a thread for each
    launch(*kernel, heads.dtype, args, outputs=query.size, threads=pairs)
    return query


def attend(query: Any, keys: Any, values: Any, span: Span) -> Any:
    """Return the attention output of queries (B, T, H, d) over the cached keys.

    Keys and values are (B, H, capacity, d). Attention is proportional to sizes n_j:
    p_ij = softmax_j(q_i · k_j / √d + log n_j), so a merged token that stands for n
    tokens counts n times.
    """
    if is_cuda(query):
        return attend_cuda(query, keys, values, span)
    return _attend_reference(query, keys, values, span)


def _attend_reference(
    query: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], span: Span
) -> NDArray[Any]:
    batch, rows, num_heads, width = query.shape
    length = span.start + rows
    keys, values = keys[:, :, :length], values[:, :, :length]  # (B, H, length, d)
    j = np.arange(length)  # keys, counted from the first in the cache
    # Keys from `limits` on are padding.
    limits = (span.start + span.counts)[:, None, None, None]  # (B, 1, 1, 1)
    bias: Any = 0
    if span.sizes is not None:
        sizes = span.sizes[:, None, None, :length]
        with np.errstate(divide="ignore"):
            bias = np.log(sizes)  # (B, 1, 1, length); -inf for size 0: not attended to
    read = np.empty_like(query)
    # Blocks of `part` queries bound the memory of the scores.
    part = max(1, _SCORES // max(1, batch * num_heads * length))
    for first in range(0, rows, part):
        block = slice(first, min(first + part, rows))
        some = query[:, block].transpose(0, 2, 1, 3) * query.dtype.type(width**-0.5)
        scores = some @ keys.swapaxes(-1, -2) + bias  # (B, H, part, length)
        i = (span.start + np.arange(rows)[block])[:, None]  # (part, 1)
        allowed = (j >= i if span.reverse else j <= i) & (j < limits)
        scores[~np.broadcast_to(allowed, scores.shape)] = -np.inf
        # exp(s - max s) cannot overflow. If all keys are masked, the maximum is -inf;
        # the floor of -1e30 avoids -inf - (-inf) = NaN, and the result is 0.
        scores -= np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        read[:, block] = ((scores @ values) / np.where(total > 0, total, 1)).transpose(
            0, 2, 1, 3
        )
    return read


def attend_cuda(query: Any, keys: Any, values: Any, span: Span) -> Any:
    batch, rows, num_heads, width = query.shape
    out = empty(query.shape, query.dtype)
    counts = span.counts
    # None means that all T tokens are valid: the kernel then reads no counts.
    valid = None if (counts == rows).all() else device_counts(counts)[0]
    sizes = batch, rows, num_heads, width, keys.shape[-2], span.start
    arrays = query, keys, values, span.sizes, valid
    args = (*arrays, *sizes, int(span.reverse), width**-0.5, out)
    kernel, blocks = ("attention", "attend"), batch * rows * num_heads  # (B, T, H)
    launch(*kernel, query.dtype, args, outputs=out.size, blocks=blocks)
    return out
