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
    return np.ones(shape, np.bool_) if mask is None else np.broadcast_to(mask, shape)


def labels_of(batch, num_tokens, num_groups, seed=3):
    """Random labels with some padding and, if there is room, an empty group."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(num_groups - 1, 1), size=(batch, num_tokens))
    labels[rng.random((batch, num_tokens)) < 0.1] = -1
    return labels


def entropy_of(scores, allowed):
    """Entropy of the softmax of each row over the allowed columns, centred, float64."""
    scores = np.where(allowed, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    shifted = np.where(allowed, scores - top, 0)
    e = np.where(allowed, np.exp(shifted), 0)
    total = e.sum(-1)
    dominant = np.argmax(scores, axis=-1)[..., None]
    others = e.copy()
    np.put_along_axis(others, dominant, 0, axis=-1)
    rest = others.sum(-1)
    value = np.log1p(rest) - (others * shifted).sum(-1) / np.maximum(total, 1)
    return np.where(allowed.any(-1), value, 0)


def allowed_of(mask, num_tokens, causal=False):
    allowed = np.ones((1, num_tokens, num_tokens), dtype=bool)
    if causal:
        allowed = np.tril(allowed)
    if mask is not None:
        allowed = allowed & mask[:, None, :] & mask[:, :, None]
    return allowed


def softmax_of(z, valid, temperature):
    top = np.where(valid, z, -1e30).max(-1, keepdims=True)
    e = np.where(valid, np.exp(np.where(valid, z - top, 0) / temperature), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def cosine_of(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    x = x / np.where(norm := np.linalg.norm(x, axis=-1, keepdims=True), norm, 1)
    y = y / np.where(norm := np.linalg.norm(y, axis=-1, keepdims=True), norm, 1)
    return x @ np.swapaxes(y, -1, -2)
