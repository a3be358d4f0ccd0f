"""Dtypes, marks and inputs for the tests of interpreted kernels.

The fixture `kernels` (conftest.py) runs a test with basic and with optimized kernels.
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
counted = pytest.mark.parametrize("counted", ["all", "fewer", "ragged"])
optimized = pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
# N around the warp size of 32 and around a block of 128 threads, where loops end.
SIZES = [1, 31, 32, 33, 127, 128, 129, 257]
sizes = pytest.mark.parametrize("num_tokens", SIZES)


def counts_of(counted, batch, num_groups):
    """Return K (B,) of up to three sequences whose arrays have `num_groups` rows.

    In the case "fewer", all K are equal, but below `num_groups`. A kernel that gets no
    counts then uses the wrong K.
    """
    fewer = (num_groups + 1) // 2
    cases = {"all": [num_groups] * 3, "fewer": [fewer] * 3}
    return np.array({**cases, "ragged": [num_groups, fewer, 1]}[counted][:batch])


def random(shape, dtype, seed=0, scale=1.0):
    x = np.random.default_rng(seed).normal(size=shape) * scale
    return x.astype(dtype)


def mask_of(batch, num_tokens, masked=True):
    """Return a mask with padding: on the left, in between, and a whole sequence.

    Sequence 0 has it on the left, others in between, and the last is all padding.
    """
    if not masked:
        return None
    mask = np.random.default_rng(5).random((batch, num_tokens)) < 0.7
    mask[0] = np.arange(num_tokens) >= num_tokens // 3
    mask[-1] = False
    return mask


def without_shape(kernel):
    """Return a kernel's name without the suffix of its tile shape."""
    return re.sub("_(half|wide|kept)$", "", kernel)


def valid_of(mask, shape):
    """Return a mask (B, N) for (B, N), (B, H, N) or (L, B, H, N)."""
    if mask is None:
        return np.ones(shape, np.bool_)
    return np.broadcast_to(mask[:, None] if len(shape) > 2 else mask, shape)


def allowed_of(valid, causal=False):
    """Return which tokens each token attends to, (..., N, N)."""
    allowed = valid[..., None, :] & valid[..., :, None]
    return np.tril(allowed) if causal else allowed  # j <= i


def labels_of(batch, num_tokens, num_groups, seed=3):
    """Return random labels with some padding and, if K > 1, an empty group."""
    rng = np.random.default_rng(seed)
    # Labels below K - 1 only, so that group K - 1 is empty.
    labels = rng.integers(0, max(num_groups - 1, 1), size=(batch, num_tokens))
    labels[rng.random((batch, num_tokens)) < 0.1] = -1  # padding
    return labels
