"""Tokens scaled to norm 1."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import row_blocks
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch


def unit_tokens(x: NDArray[Any]) -> NDArray[Any]:
    """Return each token (N, D) divided by its norm; zero tokens stay zero.

    The tokens are overwritten, if they are in C order.
    """
    # In C order: BLAS rounds products of other layouts differently.
    x = np.ascontiguousarray(x)
    for block in row_blocks(*x.shape):
        rows = x[block]
        # Divide by the largest entry first, so that no square overflows or vanishes.
        peak = np.abs(rows).max(axis=-1, keepdims=True)  # (block, 1)
        rows /= np.where(peak > 0, peak, 1)
        # The largest entry is now ±1, so the norm is 0 only for zero tokens.
        norm = np.linalg.norm(rows, axis=-1, keepdims=True)  # (block, 1)
        rows /= np.where(norm > 0, norm, 1)
    return x


def unit_tokens_cuda(tokens: Any, mask: Any) -> Any:
    """Return unit tokens (..., D) in the accumulation dtype; zero tokens stay zero.

    Padding, where `mask` is False, becomes zero too.
    """
    tokens, num_rows = contiguous(tokens), math.prod(tokens.shape[:-1])
    out = empty(tokens.shape, accumulation_dtype(tokens.dtype))
    args = (tokens, mask, num_rows, tokens.shape[-1], out)
    launch("unit_tokens", "unit_tokens", tokens.dtype, args, rows=num_rows)
    return out
