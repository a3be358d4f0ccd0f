"""Gradients of attention scores, for vector–Jacobian products through the softmax.

One head has N tokens with queries Q and keys K, both (N, d). Its scores are
s_ij = c q_i · k_j with the factor c (`scale`), its attention is p_ij = softmax_j(s_ij),
and H_i is the entropy of row i. (m, r, t) is the state of a row (online_softmax.py):
m = max s, r = Σ e^(s - m) and t = Σ e^(s - m) (s - m), both sums without one score that
equals m. So 1 + r is the denominator of the softmax. g_i is the gradient of the loss ℒ
with respect to H_i. The gradient G_ij = ∂ℒ/∂s_ij of the scores is

    G_ij = -g_i p_ij (log p_ij + H_i),    log p_ij + H_i = (s_ij - m) - t / (1 + r)

with m, r and t of row i, and ∂ℒ/∂Q = c G K, ∂ℒ/∂K = c Gᵀ Q. `attention_received` has
another G, but the same products. Scores and G are computed for some rows at a time, so
memory is linear in N. One call computes L · B · H heads: L layers, B sequences and H
heads of each layer. `self_attention_entropy` uses the tokens themselves as queries and
as keys, and has H = 1. In comments, (..., N, d) has the axes of all heads first.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.shapes import layer_axes, layout_of
from ...cuda.constants import SQUARE, STATE_VALUES, TILE
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .online_softmax import score_blocks, softmax_state

# A "band" is the part of G that is in memory at once, at most this many bytes. It
# consists of row tiles: 128 rows of G with all N columns. With 16-bit values and 4096
# tokens, a row tile has 1 MiB and a band 128 row tiles. The product of the band with
# the tokens then has at least 128 blocks, which is almost one for each of the 132
# multiprocessors of an H100. A band has at least one row tile and does not grow with
# the number of heads, so memory is linear in N.
_BAND_BYTES = 128 << 20
_FILE = "score_gradients"  # the .cu file of all kernels that this file launches


def check_row_gradient(
    gradient: NDArray[Any], shape: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> None:
    """Raise if the gradient does not have the shape (..., N) of the results of rows."""
    check_gradient(gradient, shape, layout_of(len(shape), "N"), mask=mask)


def masked_gradient(
    gradient: NDArray[Any], dtype: np.dtype[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return a gradient (..., N) in another dtype, with 0 for padding."""
    gradient = gradient.astype(dtype, copy=False)
    # `where` replaces NaN, too; a product with the mask would keep it.
    return gradient if mask is None else np.where(mask, gradient, dtype.type(0))


# Returns G (block, keys) of some rows from their scores, which it may overwrite.
ScoreGradient = Callable[[slice, NDArray[Any]], NDArray[Any]]


def entropy_gradient(gradient: NDArray[Any]) -> ScoreGradient:
    """Return the function that computes G of one head for the entropies.

    `gradient` is g (N,).
    """

    def score_gradient(rows: slice, scores: NDArray[Any]) -> NDArray[Any]:
        # `softmax_state` also changes `scores` in place to s - m.
        _, r, t = softmax_state(scores, axis=1)
        # Three factors of G: (1 + r) p, then -(log p + H), then g / (1 + r).
        block = np.exp(scores)
        block *= (t / (1 + r))[:, None] - scores
        block *= (gradient[rows] / (1 + r))[:, None]
        return block

    return score_gradient


def score_vjp(
    score_gradient: ScoreGradient,
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ∂ℒ/∂Q = c G K and ∂ℒ/∂K = c Gᵀ Q of one head, each (N, d).

    Padding must have been removed. G is computed for a block of rows at a time.
    """
    scaled = query * scale
    query_gradient, key_gradient = np.zeros_like(query), np.zeros_like(key)
    for rows, scores in score_blocks(scaled, key, causal):
        seen = slice(scores.shape[1])  # the keys that a row of the block may see
        block = score_gradient(rows, scores)  # G, (block, keys)
        # A query belongs to one block. The gradient of a key is a sum over the blocks,
        # added in the order of the blocks.
        query_gradient[rows] = block @ key[seen] * scale
        key_gradient[seen] += block.T @ scaled[rows]
        del block  # free it before the next one is computed
    return query_gradient, key_gradient


def sum_groups(gradient: Any, key: Any) -> Any:
    """Return ∂ℒ/∂K in the shape and dtype of `key`, from the heads of the queries.

    `gradient` is that of `repeat_heads(key, query)`. The heads of a group are added in
    their order, in float32 or float64.
    """
    if gradient.shape != key.shape:
        *outer, num_heads, num_tokens, dim = key.shape
        shape = *outer, num_heads, gradient.shape[-3] // num_heads, num_tokens, dim
        group = gradient.reshape(shape)
        group = group.astype(np.result_type(group.dtype, np.float32), copy=False)
        gradient = group[..., 0, :, :]
        for head in range(1, group.shape[-3]):
            gradient = gradient + group[..., head, :, :]
    return gradient if gradient.dtype == key.dtype else narrow(gradient, key.dtype)


class ScoreArguments(NamedTuple):
    """The arguments that the kernels need, besides the tokens, to compute G.

    They are three values for each row, the mask, sizes and options. The kernels compute
    the scores again from the tokens, then G from the scores and these arguments.
    """

    # (L · B · H, N, 3): m, t / (1 + r) and g / (1 + r) of each row or, for
    # `attention_received`, m, o and 1 / (1 + r). The optimized kernels store m / ln 2,
    # because they compute 2^x instead of e^x. They store the third value divided by
    # `units` of the head.
    row_values: Any
    # (L · B · H, N): h of each key for `attention_received`, for which
    # G_ij = p_ij (h_j - o_i) with o_i = Σ_k p_ik h_k. The optimized kernels store h and
    # o divided by max |h| of the head, which `units` contains. None for entropies.
    key_values: Any
    # (L · B · H,): max |g / (1 + r)| / 512, with the maximum over the rows of the head.
    # The optimized kernels store G of a head divided by this number. The absolute
    # values of the stored G + Gᵀ are then below 2 (log N + 1) · 512, which fits into
    # float16. None for the basic kernels, which store G itself.
    units: Any
    mask: Any  # (B, N), or None
    outer: int  # L · B · H
    batch: int
    heads: int
    causal: int  # 0 or 1
    scale: float  # c


def row_values_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Any:
    """Compute `ScoreArguments.row_values` of an entropy, in one pass over the scores.

    If `gradient` is None, g is 1.
    """
    *leading, num_tokens, dim = query.shape  # (..., N, d)
    # The kernel computes from B and H which row of the mask (B, N) belongs to a head.
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    acc_dtype = accumulation_dtype(query.dtype)
    row_values = empty((outer, num_tokens, STATE_VALUES), acc_dtype)
    arrays = contiguous(gradient, acc_dtype), query, key, contiguous(mask)
    sizes = outer, batch, heads, num_tokens, dim
    args = (*arrays, *sizes, int(causal), scale, row_values)
    # `score_weights` writes `row_values`, which the kernels call weights. The basic
    # kernel has a thread for each row, the optimized kernel a block for each row tile.
    work = {"outputs": outer * num_tokens}
    if implementation() == "optimized":
        work = {"blocks": outer * _num_tiles(num_tokens)}
    launch(_FILE, "score_weights", query.dtype, args, **work)
    return row_values


def score_arguments_cuda(
    row_values: Any, key_values: Any, query: Any, causal: bool, scale: float, mask: Any
) -> ScoreArguments:
    """Return the arguments for G; scale the values of rows and keys in place."""
    *leading, num_tokens, _ = query.shape  # (..., N, d)
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    units = None
    if implementation() == "optimized":
        # The optimized kernels store G in the dtype of the tokens, which may have 16
        # bits. Division by the unit of its head keeps G from overflowing or becoming 0.
        units = empty((outer,), accumulation_dtype(query.dtype))
        args = (num_tokens, key_values, row_values, units)
        # A block for each head, because the unit needs a maximum over it.
        launch(_FILE, "weight_units", query.dtype, args, blocks=outer)
    values = row_values, key_values, units, contiguous(mask)
    return ScoreArguments(*values, outer, batch, heads, int(causal), scale)


def token_gradients_cuda(
    extra: ScoreArguments, own: Any, other: Any, sides: int
) -> Any:
    """Return ∂ℒ/∂own = c · M · other, (..., N, d).

    M is a matrix (N, N) for each head. `sides` has the bits QUERIES and KEYS of
    cuda/constants.py, and selects M:

    - QUERIES: M = G. `own` has the queries and `other` the keys.
    - KEYS: M = Gᵀ. `own` has the keys and `other` the queries.
    - QUERIES | KEYS: M = G + Gᵀ. `own` and `other` are the same tokens.
    """
    *_, num_tokens, dim = own.shape
    basic, acc_dtype = implementation() == "basic", accumulation_dtype(own.dtype)
    out = empty(own.shape, own.dtype)
    row_tiles = _num_tiles(num_tokens)  # of one head
    # M is square, so N columns need as many 128-wide tiles as N rows. `columns` is N
    # rounded up to a multiple of 128.
    num_row_tiles, columns = extra.outer * row_tiles, row_tiles * TILE
    # The tensor cores multiply factors of one dtype, so an optimized kernel stores the
    # band in the dtype of the tokens.
    band_dtype = acc_dtype if basic else own.dtype
    max_row_tiles = max(_BAND_BYTES // (TILE * columns * band_dtype.itemsize), 1)
    band = empty((min(max_row_tiles, num_row_tiles), TILE, columns), band_dtype)
    factor = other if basic else _transposed(other, extra)
    sizes = extra.batch, extra.heads, num_tokens, dim
    # Each pass of the loop overwrites the band. The first kernel writes rows of M to
    # the band; the second one multiplies the band by the tokens and writes to `out`.
    # Row tiles are independent, so results do not depend on the size of the band.
    for first in range(0, num_row_tiles, max_row_tiles):
        part = first, min(max_row_tiles, num_row_tiles - first)  # (first, number)
        rows = part[1] * TILE
        arrays = own, other, extra.row_values, extra.key_values, extra.mask
        options = extra.causal, extra.scale, sides
        args: tuple[Any, ...] = (*arrays, *part, *sizes, *options, band)
        # A block for each 128 × 128 tile of the band. The basic kernels have a thread
        # for each entry of the band here, and for each entry of `out` below.
        # Each optimized kernel has one form of G; the basic kernel has both forms.
        received = not basic and extra.key_values is not None
        kernel = _FILE, "received_gradients" if received else "score_gradients"
        blocks = part[1] * row_tiles
        launch(*kernel, own.dtype, args, outputs=rows * columns, blocks=blocks)
        if basic:
            args = (band, factor, extra.mask, *part, *sizes, extra.scale, out)
        else:
            # This kernel needs no mask: the transposed tokens are 0 for padding.
            args = (band, factor, extra.units, *part, num_tokens, dim, *options, out)
        # A block for each row tile and 128 of the d columns of `out`.
        kernel, blocks = (_FILE, "token_gradients"), part[1] * _num_tiles(dim)
        launch(*kernel, own.dtype, args, outputs=rows * dim, blocks=blocks)
    return out


def _transposed(tokens: Any, extra: ScoreArguments) -> Any:
    """Return tokens (..., N, d) as (L · B · H, d, columns), with N rounded up to tiles.

    The product with a band then reads both factors along rows. Padding and the columns
    after token N are 0.
    """
    *_, num_tokens, dim = tokens.shape
    columns = _num_tiles(num_tokens) * TILE
    out = empty((extra.outer, dim, columns), tokens.dtype)
    sizes = extra.outer, extra.batch, extra.heads, num_tokens, dim
    # A block transposes a square of SQUARE × SQUARE entries in shared memory.
    squares = extra.outer * (columns // SQUARE) * -(-dim // SQUARE)
    args = (tokens, extra.mask, *sizes, out)
    launch(_FILE, "transpose_tokens", tokens.dtype, args, blocks=squares)
    return out


def in_accumulation_dtype(gradient: Any, like: Any) -> Any:
    """Return the gradient C-contiguous, in the dtype that sums of `like` have."""
    return contiguous(gradient, accumulation_dtype(like.dtype))


def _num_tiles(length: int) -> int:
    """Return the number of tiles that cover rows or columns: ⌈length / 128⌉."""
    return -(-length // TILE)
