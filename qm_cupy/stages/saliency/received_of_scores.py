"""The attention that each token receives, from queries and keys, and its gradients.

The functions of this file take converted and checked arrays. attention_received.py has
the public functions and defines r, n, h, m and Z. The N × N scores are computed for
some rows at a time. The gradient of the loss with respect to the scores is
G_ij = A_ij (h_j - o_i) with o_i = Σ_k A_ik h_k (score_gradients.py).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.shapes import iter_sequences, layer_axes
from ...cuda.constants import KEYS, QUERIES, TILE
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import HALF, Tiling, kept_or_half
from ...progress import report
from ...settings import implementation
from .online_softmax import score_blocks, score_dtype
from .score_gradients import (
    ScoreGradient,
    in_accumulation_dtype,
    row_values_cuda,
    score_arguments_cuda,
    score_vjp,
    token_gradients_cuda,
)

_FILE = "attention_received"  # the .cu file of most kernels that this file launches


def num_queries(num_tokens: int, causal: bool, dtype: Any) -> NDArray[Any]:
    """Return n_j (N,) of tokens without padding: N, or N - j with a causal mask."""
    count = np.full(num_tokens, num_tokens, dtype)
    return count - np.arange(num_tokens, dtype=dtype) if causal else count


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    """Return the softmax of each row, in place."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


def received_of_scores(
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    """Return r (..., N); `mask` is (..., N)."""
    received = np.zeros(query.shape[:-1], np.result_type(query.dtype, np.float32))
    count = math.prod(received.shape[:-1])
    sequences = iter_sequences(received.shape[:-1], mask)
    for number, (index, valid) in enumerate(sequences):
        unpadded = slice(None) if valid is None else valid  # without the padding
        q, k = query[index][unpadded], key[index][unpadded]
        # Inputs below float64 are computed in float32, or in float64 for huge scores.
        dtype = score_dtype(q, k, scale)
        q, k = q.astype(dtype) * dtype.type(scale), k.astype(dtype)
        total = np.zeros(len(q), dtype)  # Σ_i A_ij, (N,)
        for rows, scores in score_blocks(q, k, causal):
            total[: scores.shape[1]] += _softmax(scores).sum(axis=0)
            report((number + rows.stop / len(q)) / count)
        received[index][unpadded] = total / num_queries(len(q), causal, dtype)
    return received


def query_counts_cuda(like: Any, causal: bool, mask: Any) -> Any:
    """Return n_j of every token, (B, N), 0 for padding; `like` is (..., N, d)."""
    *leading, num_tokens, _ = like.shape
    _, batch, _ = layer_axes(leading)
    counts = empty((batch, num_tokens), accumulation_dtype(like.dtype))
    args = contiguous(mask), batch, num_tokens, int(causal), counts
    # The optimized kernel has a warp for each token, the basic kernel a thread.
    launch(_FILE, "query_counts", like.dtype, args, rows=counts.size)
    return counts


def received_of_scores_cuda(
    query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Any:
    """Return r (..., N); `mask` is (B, N)."""
    *leading, num_tokens, head_dim = query.shape
    dtype, acc_dtype = query.dtype, accumulation_dtype(query.dtype)
    out = empty((*leading, num_tokens), acc_dtype)
    query, key = contiguous(query), contiguous(key)
    counts = query_counts_cuda(query, causal, mask)
    # The first pass computes m and 1 / Z of each row, the second one sums columns.
    row_values = row_values_cuda(None, query, key, causal, scale, mask)
    arrays = query, key, row_values, contiguous(mask), counts
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    sizes = outer, batch, heads, num_tokens, head_dim
    args = (*arrays, *sizes, int(causal), scale, out)
    tiling, shape = None, None
    if implementation() == "optimized":
        # A block owns the keys of a tile, and goes through all tiles of queries. In
        # shared memory it also has m and 1 / Z of the queries of a tile.
        extra_bytes = 2 * TILE * acc_dtype.itemsize
        row_bytes = head_dim * dtype.itemsize
        tiling, shape = kept_or_half(outer, num_tokens, row_bytes, dtype, extra_bytes)
    kernel = _FILE, "query_key_received"
    launch(*kernel, dtype, args, outputs=out.size, tiles=tiling, shape=shape)
    return out


def _received_gradient(h: NDArray[Any]) -> ScoreGradient:
    """Return the function that computes G_ij = A_ij (h_j - Σ_k A_ik h_k) of a head.

    `h` is (N,).
    """

    def score_gradient(rows: slice, scores: NDArray[Any]) -> NDArray[Any]:
        a = _softmax(scores)  # A, (block, keys)
        seen = h[: scores.shape[1]]
        a *= seen - (a @ seen)[:, None]
        return a

    return score_gradient


def received_of_scores_vjp(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ∂ℒ/∂Q, and ∂ℒ/∂K in float64."""
    # Each (..., N, d). The loop does not write padding, which remains 0. The gradient
    # of the keys is rounded to their dtype after the sum over a group of heads.
    query_gradient = np.zeros_like(query, order="C")
    key_gradient = np.zeros(key.shape)
    for index, valid in iter_sequences(query.shape[:-2], mask):
        unpadded = slice(None) if valid is None else valid  # without the padding
        g, q, k = (x[index][unpadded] for x in (gradient, query, key))
        dtype = score_dtype(q, k, scale)
        g, q, k = (x.astype(dtype) for x in (g, q, k))
        score_gradient = _received_gradient(g / num_queries(len(g), causal, dtype))
        head_gradients = score_vjp(score_gradient, q, k, causal, dtype.type(scale))
        # Sums in `dtype` are rounded to the dtype of the inputs once, at the end.
        query_gradient[index][unpadded] = narrow(head_gradients[0], query.dtype)
        key_gradient[index][unpadded] = head_gradients[1]
    return query_gradient, key_gradient


def received_weights_cuda(gradient: Any, like: Any, causal: bool, mask: Any) -> Any:
    """Return h (..., N), 0 for padding; `like` is the source (..., N, d)."""
    *leading, num_tokens, _ = like.shape
    counts = query_counts_cuda(like, causal, mask)
    h = empty((*leading, num_tokens), counts.dtype)
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    arrays = in_accumulation_dtype(gradient, like), counts
    args = (*arrays, outer, batch, heads, num_tokens, h)
    kernel = "attention_received_vjp", "received_weights"
    launch(*kernel, like.dtype, args, outputs=h.size)
    return h


def received_of_scores_vjp_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> tuple[Any, Any]:
    """Return the gradients with respect to the queries and the keys."""
    *leading, num_tokens, head_dim = query.shape
    query, key = contiguous(query), contiguous(key)
    h = received_weights_cuda(gradient, query, causal, mask)
    # m, an unused value and 1 / Z of each row
    row_values = row_values_cuda(None, query, key, causal, scale, mask)
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    sizes = outer, batch, heads, num_tokens, head_dim
    args = (h, query, key, contiguous(mask), *sizes, int(causal), scale, row_values)
    # `attention_means` writes o_i = Σ_k A_ik h_k in place of the unused value.
    kernel = _FILE, "attention_means"
    tiling = Tiling(outer, num_tokens, num_tokens, whole_rows=True)
    work = {"outputs": h.size, "tiles": tiling, "shape": HALF._replace(suffix="")}
    launch(*kernel, query.dtype, args, **work)
    extra = score_arguments_cuda(row_values, h, query, causal, scale, mask)
    # ∂ℒ/∂Q = c G K and ∂ℒ/∂K = c Gᵀ Q. QUERIES selects G, and KEYS selects Gᵀ.
    query_gradient = token_gradients_cuda(extra, query, key, QUERIES)  # (..., N, d)
    return query_gradient, token_gradients_cuda(extra, key, query, KEYS)
