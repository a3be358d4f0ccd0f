"""Gradients of saliency in float64, and their comparison with a kernel's."""

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


def valid_tokens(mask, leading, num_tokens):
    """Return the tokens of (..., N) by a mask (B, N); B is the second axis of four."""
    valid = np.ones((*leading, num_tokens), np.bool_)
    if mask is None:
        return valid
    return valid & (mask[:, None] if len(leading) == 3 else mask)


def allowed_pairs(valid, causal=False):
    allowed = valid[..., None, :] & valid[..., :, None]
    return np.tril(allowed) if causal else allowed


def score_gradients(gradient, scores, allowed):
    """Return G of the scores' entropies, and the size of its terms, in float64."""
    top = np.where(allowed, scores, -np.inf).max(-1, keepdims=True)
    d = np.where(allowed, scores - np.where(np.isfinite(top), top, 0), 0)
    e = np.where(allowed, np.exp(d), 0)
    total = np.maximum(e.sum(-1, keepdims=True), 1)
    mean = (e * d).sum(-1, keepdims=True) / total
    g = np.where(allowed.any(-1), gradient, 0).astype(np.float64)
    weight = np.where(allowed, g[..., None] * e / total, 0)
    return weight * (mean - d), abs(weight) * (1 - mean - d)


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


def saliency_vjp_of(gradient, entropy, valid, salient):
    """Return the gradient of entropy (L, B, H, N), given g (B, N) that is 0 outside."""
    layers, _, heads, _ = entropy.shape
    out = np.zeros(entropy.shape)
    for layer, b in np.ndindex(entropy.shape[:2]):
        token = np.flatnonzero(valid[b])
        h = entropy[layer, b].astype(np.float64).mean(0)[token]
        if len(token) == 0 or h.min() == h.max():
            continue
        y, g = (h - h.min()) / (h.max() - h.min()), gradient[b, token]
        low, high = h == h.min(), h == h.max()
        slope = g - low * (g @ (1 - y)) / low.sum() - high * (g @ y) / high.sum()
        out[layer, b][:, token] = slope / (h.max() - h.min())
    return out / layers / heads * (1 if salient == "high" else -1)
