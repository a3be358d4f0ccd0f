"""L2 norms of tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch


def relative_norms(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return L2 norms (B, N) divided by the largest entry of the sequence.

    Callers use only ratios of norms, so the divisor cancels. With it, no square
    overflows or becomes 0. Padding gets 0.
    """
    x = tokens.astype(np.float64)  # (B, N, D)
    if mask is not None:
        x = x * mask[..., None]
    peak = np.abs(x).max(axis=(-2, -1), keepdims=True)  # (B, 1, 1)
    # A sequence of zeros keeps its norms of 0.
    return np.linalg.norm(x / np.where(peak > 0, peak, 1), axis=-1)


def token_norms_cuda(tokens: Any, mask: Any = None) -> Any:
    """Return the L2 norm of each token, (..., N, D) -> (..., N); 0 for padding."""
    out = empty(tokens.shape[:-1], accumulation_dtype(tokens.dtype))
    arrays = contiguous(tokens), contiguous(mask)
    args = (*arrays, out.size, tokens.shape[-1], out)
    # One warp for each token; the basic kernel has one thread for each token.
    launch("token_norms", "token_norms", tokens.dtype, args, rows=out.size)
    return out
