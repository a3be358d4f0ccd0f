"""What the tests of interpreted kernels share: dtypes, marks and inputs.

The fixture `kernels` (conftest.py) runs a test on each kind of kernels.
"""

import re

import ml_dtypes
import numpy as np
import pytest

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=[np.dtype(t).name for t in DTYPES]
)
masked = pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
optimized = pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
SIZES = [1, 31, 32, 33, 127, 128, 129, 257]
sizes = pytest.mark.parametrize("num_tokens", SIZES)


def random(shape, dtype, seed=0, scale=1.0):
    x = np.random.default_rng(seed).normal(size=shape) * scale
    return x.astype(dtype)


def mask_of(batch, num_tokens, masked=True):
    """Return padding on the left of sequence 0, in between, and all of the last."""
    if not masked:
        return None
    mask = np.random.default_rng(5).random((batch, num_tokens)) < 0.7
    mask[0] = np.arange(num_tokens) >= num_tokens // 3
    mask[-1] = False
    return mask


def whatever_shape(kernel):
    """Return a kernel's name without the shape of its tiles."""
    return re.sub("_(half|wide|kept)$", "", kernel)


def valid_of(mask, shape):
    """Return the tokens of (..., N) by a mask (B, N); B is the second axis of four."""
    if mask is None:
        return np.ones(shape, np.bool_)
    return np.broadcast_to(mask[:, None] if len(shape) == 4 else mask, shape)


def allowed_of(valid, causal=False):
    """Return which tokens each token attends to, (..., N, N)."""
    allowed = valid[..., None, :] & valid[..., :, None]
    return np.tril(allowed) if causal else allowed


def labels_of(batch, num_tokens, num_groups, seed=3):
    """Random labels with some padding and, if there is room, an empty group."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(num_groups - 1, 1), size=(batch, num_tokens))
    labels[rng.random((batch, num_tokens)) < 0.1] = -1
    return labels
