"""Attention of the transformer prior: rotated queries and keys, sizes as weights.

A prior is a model that predicts a merged token from the tokens before it. A pass reads
T tokens of each of B sequences; these tokens are the rows of the pass. There are H
heads of width d. Keys and values of all tokens so far are in a cache with memory for
`capacity` tokens; a token has one slot. The size n_j of a token is the number of tokens
that were merged into it.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from ..cuda.launch import counts_on_device, launch

_BASE = 10_000.0  # base of the rotary wavelengths 2π · 10000^(2i / d), in positions
_MAX_SCORES = 1 << 22  # scores in memory at once, at most: 16 MB of float32


class Span(NamedTuple):
    """The T tokens of a pass: positions and validity; and all sizes in the cache."""

    positions: Any
    """(B, T), or None if positions are `start`, `start` + 1, … For learned positions,
    the attention also gets None, because it does not use them."""
    sizes: Any
    """(B, capacity of the cache): the size of the token in each slot, or None if every
    size is 1."""
    counts: NDArray[np.int64]
    """(B,), the number of valid tokens among the T tokens; later ones are padding."""
    start: int
    """Number of tokens that are already in the cache, before these T tokens."""
    reverse: bool
    """Whether a token attends to itself and later tokens, instead of earlier ones."""


def rotary_turns(width: int) -> NDArray[np.float64]:
    """Return the rotation of each pair of elements for one position, (d/2,), in turns.

    Elements i and i + d/2 of a head of width d are a pair. Pair i rotates by the angle
    position · 10000^(-2i / d). A turn is a rotation by 2π.
    """
    pairs = np.arange(width // 2)
    turns: NDArray[np.float64] = _BASE ** (-2.0 * pairs / width) / (2 * np.pi)
    return turns


def split_heads(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> NDArray[Any]:
    """Return rotated queries (B, T, H, d); write keys and values to the caches.

    `heads` is (B, T, 3, H, d): queries, keys and values. The caches `keys` and `values`
    are (B, H, capacity, d). `turns` is the result of `rotary_turns`, or None if
    positions are learned. Then nothing is rotated.
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
    num_rows = heads.shape[1]
    query, key, value = (heads[:, :, i] for i in range(3))  # (B, T, H, d)
    if turns is not None:
        positions = span.positions
        if positions is None:
            positions = span.start + np.arange(num_rows)[None]  # (1, T)
        # Whole turns do not change the rotation. `% 1` removes them in float64, as the
        # kernels do. The kernels round the angle to float32 for float32 values, and a
        # large angle would lose its fraction of a turn.
        angle = 2 * np.pi * (positions[:, :, None, None] * turns % 1)  # (B, T, 1, d/2)
        cosine, sine = np.cos(angle), np.sin(angle)
        query, key = (_rotated(x, cosine, sine) for x in (query, key))
    # The new tokens have the next free slots of the caches.
    slots = slice(span.start, span.start + num_rows)
    keys[:, :, slots] = key.transpose(0, 2, 1, 3)  # (B, T, H, d) -> (B, H, T, d)
    values[:, :, slots] = value.transpose(0, 2, 1, 3)
    return query


def _rotated(
    x: NDArray[Any], cosine: NDArray[np.float64], sine: NDArray[np.float64]
) -> NDArray[Any]:
    # Elements i and i + d/2 are a pair (a, b). Rotated by its angle θ_i, it is
    # (a cos θ_i - b sin θ_i, b cos θ_i + a sin θ_i).
    a, b = np.split(x, 2, axis=-1)  # (B, T, H, d/2) each
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def _split_heads_cuda(
    heads: Any, span: Span, turns: Any, keys: Any, values: Any
) -> Any:
    batch, num_rows, _, num_heads, width = heads.shape
    query = empty((batch, num_rows, num_heads, width), heads.dtype)
    sizes = batch, num_rows, num_heads, width, keys.shape[-2], span.start
    args = (heads, span.positions, turns, *sizes, query, keys, values)
    # A thread for each pair. The basic kernel has a thread for each element.
    kernel, pairs = ("attention", "split_heads"), query.size // 2
    launch(*kernel, heads.dtype, args, outputs=query.size, threads=pairs)
    return query


def attend(query: Any, keys: Any, values: Any, span: Span) -> Any:
    """Return the attention output of queries (B, T, H, d) over the cached keys.

    Keys and values are (B, H, capacity, d). With query q_i, key k_j and size n_j, the
    weight of token j for token i is p_ij = softmax_j(q_i · k_j / √d + log n_j). The
    term log n_j multiplies e^(q_i · k_j / √d) by n_j, so a merged token that stands for
    n tokens counts n times.
    """
    if is_cuda(query):
        return attend_cuda(query, keys, values, span)
    return _attend_reference(query, keys, values, span)


def _attend_reference(
    query: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], span: Span
) -> NDArray[Any]:
    batch, num_rows, num_heads, width = query.shape
    length = span.start + num_rows  # number of tokens in the cache
    keys, values = keys[:, :, :length], values[:, :, :length]  # (B, H, length, d)
    key = np.arange(length)  # slot of each key
    # Keys in slots from `limits` on are padding.
    limits = (span.start + span.counts)[:, None, None, None]  # (B, 1, 1, 1)
    bias: Any = 0
    if span.sizes is not None:
        sizes = span.sizes[:, None, None, :length]
        with np.errstate(divide="ignore"):
            bias = np.log(sizes)  # (B, 1, 1, length); -inf for size 0: weight 0
    output = np.empty_like(query)
    # A block of `block_rows` queries is computed at a time, to limit the memory of the
    # scores.
    block_rows = max(1, _MAX_SCORES // max(1, batch * num_heads * length))
    for start in range(0, num_rows, block_rows):
        block = slice(start, min(start + block_rows, num_rows))
        block_query = query[:, block].transpose(0, 2, 1, 3) * query.dtype.type(
            width**-0.5
        )
        scores = (
            block_query @ keys.swapaxes(-1, -2) + bias
        )  # (B, H, block_rows, length)
        row = (span.start + np.arange(num_rows)[block])[
            :, None
        ]  # slots of the queries, (block_rows, 1)
        allowed = (key >= row if span.reverse else key <= row) & (key < limits)
        scores[~np.broadcast_to(allowed, scores.shape)] = -np.inf
        # exp(s - max s) of a score s cannot overflow. If all keys are masked, the
        # maximum is -inf. The floor of -1e30 avoids -inf - (-inf) = NaN: all
        # exponentials are 0, and so is the result.
        scores -= np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        output[:, block] = (
            (scores @ values) / np.where(total > 0, total, 1)
        ).transpose(0, 2, 1, 3)
    return output


def attend_cuda(query: Any, keys: Any, values: Any, span: Span) -> Any:
    """Launch the kernel of `attend`. Optimized: a block for each query and head."""
    batch, num_rows, num_heads, width = query.shape
    out = empty(query.shape, query.dtype)
    # None means that all T tokens are valid: the kernel then reads no counts.
    gpu_counts, _ = counts_on_device(span.counts, num_rows)
    sizes = batch, num_rows, num_heads, width, keys.shape[-2], span.start
    arrays = query, keys, values, span.sizes, gpu_counts
    args = (*arrays, *sizes, int(span.reverse), width**-0.5, out)
    kernel, blocks = ("attention", "attend"), batch * num_rows * num_heads  # (B, T, H)
    launch(*kernel, query.dtype, args, outputs=out.size, blocks=blocks)
    return out
