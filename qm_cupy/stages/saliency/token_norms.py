"""L2 norms of tokens (B, N, D): B sequences of N tokens of width D."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch


def relative_norms(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return L2 norms (B, N) divided by the largest absolute value of the sequence.

    After the division the largest square is 1: no square overflows, and not all squares
    become 0. The results of the callers do not depend on the divisor. Padding gets 0.
    """
    x = unpadded_tokens(tokens, mask)
    largest = np.abs(x).max(axis=(-2, -1), keepdims=True)  # (B, 1, 1)
    # A sequence of zeros is divided by 1 instead of 0; its norms are 0.
    return np.linalg.norm(x / np.where(largest > 0, largest, 1), axis=-1)


def unpadded_tokens(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    """Return a copy (B, N, D) in float64 that is 0 for padding, which may be NaN."""
    x = tokens.astype(np.float64, order="C")
    return x if mask is None else np.where(mask[..., None], x, 0)


def token_norms_cuda(tokens: Any, mask: Any = None) -> Any:
    """Return the L2 norm of each token, (..., N, D) -> (..., N); 0 for padding.

    Unlike `relative_norms`, this function does not divide the norms.
    """
    out = empty(tokens.shape[:-1], accumulation_dtype(tokens.dtype))
    arrays = contiguous(tokens), contiguous(mask)
    args = (*arrays, out.size, tokens.shape[-1], out)
    # A warp for each token: its threads add up the D squares together. The basic kernel
    # has one thread for each token.
    launch("token_norms", "token_norms", tokens.dtype, args, rows=out.size)
    return out
