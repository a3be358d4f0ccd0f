"""Cosine similarity of every two tokens of a sequence."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_tokens
from ...arrays.conversion import Array, convert_inputs, on_callers_stream
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import Tiling
from ...progress import report
from ..saliency.token_norms import token_norms_cuda
from .clustering_memory import check_similarity_memory
from .unit_tokens import unit_tokens

_GRAM_ROWS = 2048  # rows of x xᵀ that one matrix product computes
_COPY_COLUMNS = 256  # columns of x xᵀ that are copied at once


@on_callers_stream
def cosine_similarity(tokens: Array) -> Array:
    r"""Return the cosine of the angle between every two tokens of a sequence.

    .. math:: S_{ij} = \frac{x_i \cdot x_j}{\lVert x_i \rVert \lVert x_j \rVert}

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.

    Returns
    -------
    ndarray of shape (N, N) or (B, N, N)
        Similarities within [-1, 1]; the matrices are exactly symmetric. float32, or
        float64 for float64 input. A token of norm 0 has similarity 0 with all tokens,
        itself included.

    Raises
    ------
    TypeError
        If `tokens` is not floating.
    ValueError
        If the shape is wrong or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> cosine_similarity(np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]))
    array([[1., 1., 0.],
           [1., 1., 0.],
           [0., 0., 1.]])
    """
    convert_back, tokens = convert_inputs({"tokens": tokens})
    check_tokens(tokens)
    if is_cuda(tokens):
        return convert_back(cosine_similarity_cuda(tokens))
    return convert_back(_cosine_similarity_reference(tokens))


def _cosine_similarity_reference(tokens: NDArray[Any]) -> NDArray[Any]:
    *batch, num_tokens, _ = tokens.shape
    dtype = np.result_type(tokens.dtype, np.float32)
    check_similarity_memory(tokens.shape, tokens.dtype)
    similarity = np.empty((*batch, num_tokens, num_tokens), dtype)
    for index in np.ndindex(*batch):
        unit = unit_tokens(tokens[index].astype(dtype))  # (N, D)
        gram(unit, similarity[index])
        # The diagonal is exactly 1, or 0 for a zero token.
        np.fill_diagonal(similarity[index], unit.any(axis=-1))
    # Rounding may exceed [-1, 1].
    return similarity.clip(-1, 1, out=similarity)


def cosine_similarity_cuda(tokens: Any, norms: Any = None) -> Any:
    """Return the cosines (B, N, N) of tokens (B, N, D), or (N, N) of one sequence.

    If `norms` (B, N) are given, they replace the norms of the tokens. They must not be
    smaller, because the results are limited to [-1, 1].
    """
    *leading, num_tokens, dim = tokens.shape
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    out = empty((*leading, num_tokens, num_tokens), acc_dtype)
    tokens = contiguous(tokens)
    norms = token_norms_cuda(tokens) if norms is None else norms
    args = (tokens, norms, batch, num_tokens, dim, out)
    kernel = "cosine_similarity", "cosine_similarity"
    # The matrix is symmetric, so the optimized kernel computes only tiles on or above
    # the diagonal. There is also a version of this kernel for wide tiles (128 × 256).
    # The basic kernel has a thread for each output.
    tiling = Tiling(batch, num_tokens, num_tokens, upper=True, wide=True)
    launch(*kernel, tokens.dtype, args, outputs=out.size, tiles=tiling)
    return out


def gram(x: NDArray[Any], out: NDArray[Any]) -> None:
    """Write x xᵀ (N, N) to `out`, exactly symmetric.

    Blocks of rows are computed one after another. Otherwise NumPy would compute the
    whole product with OpenBLAS's threaded syrk, which crashes from about 16,384 rows on
    (numpy#19685).
    """
    # NumPy also uses syrk for each block on the diagonal, `rows @ rows.T`. This is safe
    # for so few rows, and the block is exactly symmetric. The part to the right of the
    # block is computed once, and its transpose is copied to the part below the block.
    # If both were computed, rounding could make them differ.
    for start in range(0, len(x), _GRAM_ROWS):
        stop = start + _GRAM_ROWS
        rows, right = x[start:stop], out[start:stop]
        np.matmul(rows, rows.T, out=right[:, start:stop])
        if stop < len(x):
            np.matmul(rows, x[stop:].T, out=right[:, stop:])
        # NumPy copies the source, because it has the memory of the target too. Blocks
        # of columns keep this copy small.
        for column in range(stop, len(x), _COPY_COLUMNS):
            columns = slice(column, column + _COPY_COLUMNS)
            out[columns, start:stop] = right[:, columns].T
        report(1 - (max(len(x) - stop, 0) / len(x)) ** 2)
