"""Sizes, gradients and a comparison, for the tests of the gradient kernels.

N is the number of tokens, D their width. G (N, N) is the gradient of a loss with
respect to attention scores.
"""

import numpy as np
import pytest
from conftest import TOLERANCE

# Token counts at and around a warp (32) and a tile (128).
VJP_SIZES = [1, 31, 33, 128, 129, 257]
# A width D for each number of tokens N: whole steps of a tile, odd, and around a tile.
WIDTHS = {1: 1, 31: 17, 32: 64, 33: 100, 128: 64, 129: 33, 257: 136}

vjp_sizes = pytest.mark.parametrize("num_tokens", VJP_SIZES)


def gradient_of(valid, dtype, seed=9):
    """Return a gradient (..., N), with NaN for padding, which must not be read.

    The entries differ in size by factors of up to 10⁵.
    """
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=valid.shape) * 10.0 ** -rng.integers(0, 6, valid.shape)
    return np.where(valid, gradient, np.nan).astype(dtype)


def transposed(x):
    """Return a view with the last two axes exchanged."""
    return np.swapaxes(x, -1, -2)


def check_product(got, score_gradient, magnitudes, tokens, dtype):
    """Compare a gradient (..., N, D) with score_gradient @ tokens.

    `magnitudes` (..., N, N) bounds the terms of the entries of the score gradient G.
    The tolerance is relative to magnitudes @ |tokens| instead of the result, because G
    is stored in `dtype` and the terms of a sum may cancel.
    """
    wanted, size = score_gradient @ tokens, magnitudes @ abs(tokens)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    relative = max(tolerance.stored, tolerance.computed)
    assert got.dtype == dtype
    error = abs(got.astype(np.float64) - wanted)
    # float16 has steps of 6e-8 near 0, so smaller gradients become 0.
    absolute = 1e-7 if dtype == np.float16 else 0
    assert (error <= relative * size + absolute).all(), (
        error / (size + absolute)
    ).max()
    # A sum without terms (padding) is exactly 0.
    assert not got[size == 0].any()
