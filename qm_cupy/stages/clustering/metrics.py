"""The metrics by which tokens are compared: cosine and Euclidean.

For both metrics, groups are computed from vectors. For "cosine" they are the tokens x
scaled to norm 1. For "euclidean" they are the tokens minus a common offset, divided by
a common unit:

    v_i = (x_i - o) / u

The offset o is the mean token, and the unit u is the largest ‖x_i - o‖ (on a CPU, the
next lower power of two). The offset does not change distances, and the unit divides all
of them. Both keep the numbers small: ‖v_i - v_j‖² = v_i·v_i + v_j·v_j - 2 v_i·v_j loses
digits if the tokens are far from the origin, and its squares could overflow.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import row_blocks, rows_of
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...progress import span
from ..merging.merge_tokens import merge_tokens_cuda
from ..saliency.token_norms import token_norms_cuda
from .cosine_similarity import cosine_similarity_cuda, gram
from .unit_tokens import unit_tokens, unit_tokens_cuda

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# A distance ½‖v_i - v_j‖² below this fraction of ½‖v_i‖² + ½‖v_j‖² is 0, so that equal
# tokens have distance 0: it may come from rounding alone. The fraction is 64 times the
# distance from 1 to the next float64.
NOISE = 2.0**-46


def metric_vectors(tokens: NDArray[Any], metric: str) -> tuple[NDArray[Any], float]:
    """Return the vectors (N, D) of one sequence in float64, and their unit."""
    x = tokens.astype(np.float64, order="C")  # BLAS rounds other layouts differently
    if metric == "cosine":
        return unit_tokens(x), 1.0
    # Divide by the largest entry first, so that no sum overflows.
    peak = _power_of_two(max(x.max(initial=0), -x.min(initial=0)))
    x /= peak
    x -= x.mean(axis=0)
    largest = _power_of_two(_largest_norm(x))
    x /= largest
    unit = peak * largest
    if unit == np.inf:
        raise ValueError(
            "`tokens` are too large: their Euclidean distances exceed the range of "
            f"float64, got entries up to {np.abs(tokens).max():.3g}"
        )
    return x, unit


def _largest_norm(x: NDArray[Any]) -> Any:
    """Return the largest norm of vectors (N, D), or 0 if N = 0."""
    blocks = row_blocks(*x.shape)
    return max((np.linalg.norm(x[rows], axis=-1).max() for rows in blocks), default=0)


def _power_of_two(x: Any) -> float:
    """Return the greatest power of two up to x, which divides without rounding.

    Return 1 for 0.
    """
    return math.ldexp(0.5, math.frexp(x)[1]) if x > 0 else 1.0


def half_squared_distances(vectors: NDArray[Any], metric: str) -> NDArray[np.float64]:
    """Return ½‖v_i - v_j‖² (N, N), or 1 - cos for unit vectors.

    Both are equal for unit vectors. A token of norm 0 has no unit vector: its cosine
    with every token is 0, so its distance to every other token is 1.
    """
    distance = np.empty((len(vectors), len(vectors)))
    with span(0, 0.8):
        gram(vectors, distance)
    half_square = distance.diagonal() / 2  # (N,)
    # Blocks of rows, so that no other array has N² entries.
    for rows in row_blocks(*distance.shape):
        block = distance[rows]
        if metric == "cosine":
            np.subtract(1, block, out=block)
            block[block < NOISE] = 0
            block.clip(0, 2, out=block)  # rounding can exceed the range
            continue
        # The two squares are added first: both entries of a pair then have the same
        # bits.
        squares = half_square[rows, None] + half_square
        np.subtract(squares, block, out=block)
        squares *= NOISE
        block[block < squares] = 0
    return distance


def free_mask_cuda(tokens: Any, mask: Any, protect: Any) -> Any:
    """Return a mask (..., N) of the tokens that are neither padding nor protected.

    Return None if all tokens are free. A protected token takes no part in the grouping
    of the others, so it must not change their offset and their unit.
    """
    if protect is None:
        return mask
    out = empty(tokens.shape[:-1], np.bool_)
    args = (contiguous(mask), contiguous(protect), out.size, out)
    launch("metrics", "free_mask", np.float32, args, outputs=out.size)
    return out


def centered_tokens_cuda(tokens: Any, mask: Any) -> Any:
    """Return tokens (..., N, D) minus their mean, in the accumulation dtype.

    Tokens that are not in the mask become 0. The mean is rounded to the dtype of the
    tokens. Any offset would do, as long as all tokens of a sequence have the same one.
    """
    (batch, num_tokens), dim = rows_of(tokens[..., 0]), tokens.shape[-1]
    mask = contiguous(mask)
    # The mean is that of one group, to which all tokens belong.
    one_group = empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (mask, one_group.size, one_group)
    launch("metrics", "one_group", np.float32, args, outputs=one_group.size)
    means = merge_tokens_cuda(tokens, one_group, 1, None, None)  # (..., 1, D)
    out = empty(tokens.shape, accumulation_dtype(tokens.dtype))
    args = (contiguous(tokens), means, mask, batch, num_tokens, dim, out)
    launch("metrics", "centered_tokens", tokens.dtype, args, outputs=out.size)
    return out


def metric_vectors_cuda(tokens: Any, mask: Any, protect: Any, metric: str) -> Any:
    """Return vectors (..., N, D) in the accumulation dtype.

    Tokens that are not in the mask become 0. For "euclidean", the vectors have the unit
    of the tokens.
    """
    if metric == "cosine":
        return unit_tokens_cuda(tokens, mask)
    return centered_tokens_cuda(tokens, free_mask_cuda(tokens, mask, protect))


def products_operand_cuda(tokens: Any, mask: Any, protect: Any, metric: str) -> Any:
    """Return vectors whose products x · y need no other preparation.

    The kernels divide products by norms, so cosines need no unit vectors. For
    "euclidean", tokens of 16 bits are not centred either: tensor cores multiply them as
    they are, and their products are exact. The rounding error of the distances then
    depends on the norms of the tokens, not on their distances to the mean.
    """
    if metric == "cosine" or tokens.dtype.itemsize == 2:
        return contiguous(tokens)
    return centered_tokens_cuda(tokens, free_mask_cuda(tokens, mask, protect))


def similarities_cuda(
    tokens: Any, mask: Any, protect: Any, metric: str, *, squared: bool
) -> tuple[Any, Any]:
    """Return a matrix (B, N, N) for `linkage_cuda`, and the units (B, N) or None.

    For "cosine" it holds cosines. For "euclidean" it holds 1 - d, where d is the
    distance ‖v_i - v_j‖, or ½‖v_i - v_j‖² if `squared`. Entry (b, i) of the units is
    the unit of sequence b.
    """
    if metric == "cosine":
        return cosine_similarity_cuda(tokens), None
    batch, num_tokens, _ = tokens.shape
    mask = free_mask_cuda(tokens, mask, protect)
    x = products_operand_cuda(tokens, mask, None, metric)
    norms = token_norms_cuda(x, mask)  # 0 for tokens that are not in the mask
    units = empty(norms.shape, norms.dtype)
    args: tuple[Any, ...] = (norms, batch, num_tokens, units)
    launch("metrics", "largest_norms", norms.dtype, args, blocks=batch)
    # With the unit instead of norms, "cosines" are the products v_i · v_j.
    matrix = cosine_similarity_cuda(x, units)
    diagonal = empty(norms.shape, norms.dtype)
    args = (matrix, batch, num_tokens, diagonal)
    launch("metrics", "diagonals", norms.dtype, args, outputs=diagonal.size)
    args = (diagonal, batch, num_tokens, int(squared), matrix)
    kernel = "metrics", "euclidean_similarity"
    launch(*kernel, norms.dtype, args, outputs=matrix.size)
    return matrix, units


def scale_heights_cuda(dendrograms: Any, units: Any) -> None:
    """Multiply the heights of dendrograms (B, N - 1, 4) by their units (B, N)."""
    batch, num_rows, _ = dendrograms.shape
    args = (units, batch, num_rows, dendrograms)
    launch("metrics", "scale_heights", units.dtype, args, outputs=batch * num_rows)
