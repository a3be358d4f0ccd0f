"""Gradients of attention scores, for the vector–Jacobian products of the entropies.

With p = softmax(s) and the state (m, r, t) of a row (online_softmax.py), the gradient
g of the entropy H of row i gives

    G_ij = -g_i p_ij (log p_ij + H_i),    log p_ij + H_i = (s_ij - m) - t / (1 + r)

No N × N array is stored: scores are recomputed for some rows at a time.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient
from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import layer_axes
from ...cuda.constants import SQUARE, STATE_VALUES, TILE
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .online_softmax import BLOCK_ROWS, masked_score, softmax_state

# Bytes of score gradients that are in memory at once, a "band". With 16-bit values and
# 4096 tokens a band has 128 tiles of 128 rows, so that the product with the tokens has
# a block for each multiprocessor. More heads do not make it larger. A band has at least
# one tile of 128 rows, so memory is linear in N.
_BAND_BYTES = 128 << 20
_PAGE = "score_gradients"  # the .cu file of all kernels here


_AXES = {1: "N", 2: "BN", 3: "LBN", 4: "LBHN"}  # of entropies, by number of axes


def check_entropy_gradient(
    gradient: NDArray[Any], shape: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> None:
    """Raise if the gradient does not have the shape of the entropies."""
    check_gradient(gradient, shape, _AXES[len(shape)], mask=mask)


def masked_gradient(
    gradient: NDArray[Any], dtype: np.dtype[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return a gradient in another dtype, with 0 for padding even where it is NaN."""
    gradient = gradient.astype(dtype, copy=False)
    return gradient if mask is None else np.where(mask, gradient, dtype.type(0))


def score_vjp(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradients with respect to queries and keys of one head, each (N, d).

    G is computed for a block of rows at a time. ∂L/∂Q = c G K and ∂L/∂K = c Gᵀ Q with
    c the `scale`.
    """
    scaled, masked = query * scale, masked_score(query.dtype)
    of_query, of_key = np.zeros_like(query), np.zeros_like(key)
    for start in range(0, len(query), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(query))
        seen = slice(stop if causal else None)
        scores = scaled[start:stop] @ key[seen].T  # (block, N)
        if causal:
            later = np.triu_indices(stop - start, 1)
            scores[:, start:][later] = masked
        _, r, t = softmax_state(scores, axis=1)  # scores are s - m from here
        slope = np.exp(scores)  # (1 + r) p; the next two lines make it c G
        slope *= (t / (1 + r))[:, None] - scores
        slope *= (gradient[start:stop] / (1 + r) * scale)[:, None]
        # A query belongs to one block. A key gets a sum over blocks, in their order.
        of_query[start:stop] = slope @ key[seen]
        of_key[seen] += slope.T @ query[start:stop]
    return of_query, of_key


class Scores(NamedTuple):
    """Arguments of the kernels: values of each row of scores, and sizes."""

    weights: Any  # (L · B · H, N, 3): m, t / (1 + r) and g / (1 + r)
    units: Any  # (L · B · H,): unit of the stored G of a head; None for basic kernels
    mask: Any
    outer: int  # L · B · H
    batch: int
    heads: int
    causal: int
    scale: float


def scores_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Scores:
    """Compute the values of each row of scores, in one pass over the scores."""
    *leading, num_tokens, dim = query.shape
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    acc_dtype, mask = accumulation_dtype(query.dtype), contiguous(mask)
    weights = empty((outer, num_tokens, STATE_VALUES), acc_dtype)
    arrays = as_computed(gradient, query), query, key, mask
    sizes = outer, batch, heads, num_tokens, dim
    args: tuple[Any, ...] = (*arrays, *sizes, int(causal), scale, weights)
    if implementation() == "basic":
        units = None
        launch(_PAGE, "score_weights", query.dtype, args, outputs=outer * num_tokens)
    else:
        # G may be stored in 16 bits. It is relative to the largest |g / (1 + r)| of its
        # head, so that it does not overflow or become 0.
        units = empty((outer,), acc_dtype)
        blocks = outer * _tiles(num_tokens)  # a block for 128 rows
        launch(_PAGE, "score_weights", query.dtype, args, blocks=blocks)
        args = (num_tokens, weights, units)
        launch(_PAGE, "weight_units", query.dtype, args, blocks=outer)  # one a head
    return Scores(weights, units, mask, outer, batch, heads, int(causal), scale)


def token_gradients_cuda(scores: Scores, own: Any, other: Any, sides: int) -> Any:
    """Return the gradient with respect to `own`, whose scores are with all of `other`.

    `sides` says which gradients are summed: with QUERIES the rows of `own` are queries
    (G), with KEYS they are keys (Gᵀ), with both it is G + Gᵀ.
    """
    *_, num_tokens, dim = own.shape
    basic, acc_dtype = implementation() == "basic", accumulation_dtype(own.dtype)
    out = empty(own.shape, own.dtype)
    tiles = _tiles(num_tokens)  # of a head, along each axis of its scores
    num_tiles, columns = scores.outer * tiles, tiles * TILE
    stored = acc_dtype if basic else own.dtype  # tensor cores take the dtype of tokens
    max_tiles = max(_BAND_BYTES // (TILE * columns * stored.itemsize), 1)
    band = empty((min(max_tiles, num_tiles), TILE, columns), stored)
    factor = other if basic else _transposed(other, scores)
    masked = scores.batch, scores.heads, num_tokens, dim
    # The band is reused: first the gradients of its scores, then their product with the
    # tokens. Tiles are independent, so results do not depend on the size of the band.
    for first in range(0, num_tiles, max_tiles):
        part = first, min(max_tiles, num_tiles - first)
        rows = part[1] * TILE
        arrays = own, other, scores.weights, scores.mask
        options = scores.causal, scores.scale, sides
        args: tuple[Any, ...] = (*arrays, *part, *masked, *options, band)
        kernel, blocks = (_PAGE, "score_gradients"), part[1] * tiles  # one a tile
        launch(*kernel, own.dtype, args, outputs=rows * columns, blocks=blocks)
        if basic:
            args = (band, factor, scores.mask, *part, *masked, scores.scale, out)
        else:
            args = (band, factor, scores.units, *part, num_tokens, dim, *options, out)
        # A block computes 128 rows and 128 of the D columns.
        kernel, blocks = (_PAGE, "token_gradients"), part[1] * _tiles(dim)
        launch(*kernel, own.dtype, args, outputs=rows * dim, blocks=blocks)
    return out


def _transposed(tokens: Any, scores: Scores) -> Any:
    """Return tokens as (L · B · H, D, 128 T), T tiles; 0 for padding and after token N.

    The product with a band then reads both factors along rows.
    """
    *_, num_tokens, dim = tokens.shape
    columns = _tiles(num_tokens) * TILE
    out = empty((scores.outer, dim, columns), tokens.dtype)
    sizes = scores.outer, scores.batch, scores.heads, num_tokens, dim
    squares = scores.outer * (columns // SQUARE) * -(-dim // SQUARE)
    args = (tokens, scores.mask, *sizes, out)
    launch(_PAGE, "transpose_tokens", tokens.dtype, args, blocks=squares)
    return out


def as_computed(gradient: Any, like: Any) -> Any:
    """Return the gradient in the accumulation dtype of `like`, C-contiguous."""
    return contiguous(gradient, accumulation_dtype(like.dtype))


def _tiles(rows: int) -> int:
    """Return how many tiles of 128 rows cover a number of rows."""
    return -(-rows // TILE)
