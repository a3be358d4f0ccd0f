"""What the tests of gradients' kernels share: sizes, gradients, a comparison."""

import numpy as np
import pytest
from conftest import TOLERANCE

VJP_SIZES = [1, 31, 33, 128, 129, 257]
WIDTHS = {1: 1, 31: 17, 32: 64, 33: 100, 128: 64, 129: 33, 257: 136}

vjp_sizes = pytest.mark.parametrize("num_tokens", VJP_SIZES)


def gradient_of(valid, dtype, seed=9):
    """Return a gradient of widely varying size, which is NaN where it is not read."""
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=valid.shape) * 10.0 ** -rng.integers(0, 6, valid.shape)
    return np.where(valid, gradient, np.nan).astype(dtype)


def swap(x):
    return np.swapaxes(x, -1, -2)


def check_product(got, slopes, sizes, tokens, dtype):
    """Compare to slopes @ tokens, by the size of its terms: G is rounded to dtype."""
    wanted, size = slopes @ tokens, sizes @ abs(tokens)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    share = max(tolerance.stored, tolerance.computed)
    assert got.dtype == dtype
    error = abs(got.astype(np.float64) - wanted)
    # A gradient below float16's range is 0 there.
    least = 1e-7 if dtype == np.float16 else 0
    assert (error <= share * size + least).all(), (error / (size + least)).max()
    assert not got[size == 0].any()
