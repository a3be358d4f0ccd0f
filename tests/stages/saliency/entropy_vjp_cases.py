"""Sizes, gradients and a comparison, for the tests of gradients' kernels."""

import numpy as np
import pytest
from conftest import TOLERANCE

# Token counts at and around a warp (32) and a tile (128).
VJP_SIZES = [1, 31, 33, 128, 129, 257]
# A width D for each number of tokens: whole tile steps, odd, and around a tile.
WIDTHS = {1: 1, 31: 17, 32: 64, 33: 100, 128: 64, 129: 33, 257: 136}

vjp_sizes = pytest.mark.parametrize("num_tokens", VJP_SIZES)


def gradient_of(valid, dtype, seed=9):
    """Return a gradient whose entries differ by up to 10⁵, with NaN for padding.

    NaN must not be read.
    """
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=valid.shape) * 10.0 ** -rng.integers(0, 6, valid.shape)
    return np.where(valid, gradient, np.nan).astype(dtype)


def swap(x):
    return np.swapaxes(x, -1, -2)


def check_product(got, slopes, sizes, tokens, dtype):
    """Compare a gradient with slopes @ tokens.

    The tolerance is relative to the sum of the magnitudes of the terms, because the
    score gradients G are stored in `dtype`.
    """
    wanted, size = slopes @ tokens, sizes @ abs(tokens)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    relative = max(tolerance.stored, tolerance.computed)
    assert got.dtype == dtype
    error = abs(got.astype(np.float64) - wanted)
    # A gradient below the range of float16 becomes 0.
    least = 1e-7 if dtype == np.float16 else 0
    assert (error <= relative * size + least).all(), (error / (size + least)).max()
    # Without terms (padding) the result is exactly 0.
    assert not got[size == 0].any()
