"""Gradients of attention scores: what the entropies' vector–Jacobian products share.

No N × N array is kept: scores are computed again, some rows at a time.
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

# Of score gradients in flight: at 16 bits and 4096 tokens 128 tiles, so that their
# product with the tokens has a block for each multiprocessor. No call holds more for
# more heads, but one tile of 128 rows at least: memory is linear in N.
_BAND_BYTES = 128 << 20
_PAGE = "score_gradients"  # of the kernels that go through scores again


_AXES = {1: "N", 2: "BN", 3: "LBN", 4: "LBHN"}  # of entropies, by how many they are


def check_entropy_gradient(
    gradient: NDArray[Any], shape: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> None:
    check_gradient(gradient, shape, _AXES[len(shape)], mask=mask)


def masked_gradient(
    gradient: NDArray[Any], dtype: np.dtype[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return a gradient in another dtype, 0 for padding whatever it holds there."""
    gradient = gradient.astype(dtype, copy=False)
    return gradient if mask is None else np.where(mask, gradient, dtype.type(0))


def score_vjp(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradients of one head's queries and keys, each (N, d)."""
    scaled, never = query * scale, masked_score(query.dtype)
    of_query, of_key = np.zeros_like(query), np.zeros_like(key)
    for start in range(0, len(query), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(query))
        seen = slice(stop if causal else None)
        scores = scaled[start:stop] @ key[seen].T  # (block, N)
        if causal:
            later = np.triu_indices(stop - start, 1)
            scores[:, start:][later] = never
        _, r, t = softmax_state(scores, axis=1)
        slope = np.exp(scores)  # of the scores, which are s - m now
        slope *= (t / (1 + r))[:, None] - scores
        slope *= (gradient[start:stop] / (1 + r) * scale)[:, None]
        of_query[start:stop] = slope @ key[seen]
        of_key[seen] += slope.T @ query[start:stop]
    return of_query, of_key


class Scores(NamedTuple):
    """The softmax of every row and its gradient, as the kernels take them."""

    weights: Any
    units: Any
    mask: Any
    outer: int
    batch: int
    heads: int
    causal: int
    scale: float


def scores_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Scores:
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
        units = empty((outer,), acc_dtype)
        blocks = outer * _tiles(num_tokens)
        launch(_PAGE, "score_weights", query.dtype, args, blocks=blocks)
        args = (num_tokens, weights, units)
        launch(_PAGE, "weight_units", query.dtype, args, blocks=outer)
    return Scores(weights, units, mask, outer, batch, heads, int(causal), scale)


def token_gradients_cuda(scores: Scores, own: Any, other: Any, sides: int) -> Any:
    """Return the gradient of `own`, each row of whose scores is with all of `other`."""
    *_, num_tokens, dim = own.shape
    basic, acc_dtype = implementation() == "basic", accumulation_dtype(own.dtype)
    out = empty(own.shape, own.dtype)
    tiles = _tiles(num_tokens)  # of a head
    every, columns = scores.outer * tiles, tiles * TILE
    stored = acc_dtype if basic else own.dtype
    most = max(_BAND_BYTES // (TILE * columns * stored.itemsize), 1)
    band = empty((min(most, every), TILE, columns), stored)
    factor = other if basic else _transposed(other, scores)
    masked = scores.batch, scores.heads, num_tokens, dim
    for first in range(0, every, most):
        part = first, min(most, every - first)
        rows = part[1] * TILE
        arrays = own, other, scores.weights, scores.mask
        options = scores.causal, scores.scale, sides
        args: tuple[Any, ...] = (*arrays, *part, *masked, *options, band)
        kernel, blocks = (_PAGE, "score_gradients"), part[1] * tiles
        launch(*kernel, own.dtype, args, outputs=rows * columns, blocks=blocks)
        if basic:
            args = (band, factor, scores.mask, *part, *masked, scores.scale, out)
        else:
            args = (band, factor, scores.units, *part, num_tokens, dim, *options, out)
        kernel, blocks = (_PAGE, "token_gradients"), part[1] * _tiles(dim)
        launch(*kernel, own.dtype, args, outputs=rows * dim, blocks=blocks)
    return out


def _transposed(tokens: Any, scores: Scores) -> Any:
    """Return (L, B, H, D, 128 T), 0 for padding and behind the last token."""
    *_, num_tokens, dim = tokens.shape
    columns = _tiles(num_tokens) * TILE
    out = empty((scores.outer, dim, columns), tokens.dtype)
    sizes = scores.outer, scores.batch, scores.heads, num_tokens, dim
    squares = scores.outer * (columns // SQUARE) * -(-dim // SQUARE)
    args = (tokens, scores.mask, *sizes, out)
    launch(_PAGE, "transpose_tokens", tokens.dtype, args, blocks=squares)
    return out


def as_computed(gradient: Any, like: Any) -> Any:
    return contiguous(gradient, accumulation_dtype(like.dtype))


def _tiles(rows: int) -> int:
    return -(-rows // TILE)
