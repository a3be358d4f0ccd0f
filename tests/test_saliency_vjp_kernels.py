"""Gradients of saliency, interpreted, against their formulas in float64.

The public functions are called, on NumPy arrays that pass for CUDA's, so that every
launcher runs too.
"""

import numpy as np
import pytest
from conftest import TOLERANCE
from kernel_cases import dtypes, mask_of, masked, optimized, random
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.saliency import score_gradients as gradients_page

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [1, 31, 33, 128, 129, 257]
WIDTHS = {1: 1, 31: 17, 32: 64, 33: 100, 128: 64, 129: 33, 257: 136}

sizes = pytest.mark.parametrize("num_tokens", SIZES)


def gradient_of(valid, dtype, seed=9):
    """Return a gradient of widely varying size, which is NaN where it is not read."""
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=valid.shape) * 10.0 ** -rng.integers(0, 6, valid.shape)
    return np.where(valid, gradient, np.nan).astype(dtype)


def valid_of(mask, leading, num_tokens):
    """Return the tokens of (..., N) by a mask (B, N); B is the second axis of four."""
    valid = np.ones((*leading, num_tokens), np.bool_)
    if mask is None:
        return valid
    return valid & (mask[:, None] if len(leading) == 3 else mask)


def allowed_of(valid, causal=False):
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


@dtypes
@sizes
@masked
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_query_key_entropy_vjp(dtype, num_tokens, masked, causal):
    leading, head_dim = (1, 2, 2), WIDTHS[num_tokens]
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, leading, num_tokens)
    shape = (*leading, num_tokens, head_dim)
    query, key = random(shape, dtype, 1, 1.5), random(shape, dtype, 2, 1.5)
    query[~valid] = key[~valid] = np.nan  # is not read
    gradient = gradient_of(valid, np.float32)
    options = {"causal": causal, "mask": mask}
    got = qm.query_key_entropy_vjp(gradient, query, key, **options)
    q, k = (np.where(valid[..., None], x, 0).astype(np.float64) for x in (query, key))
    scale = head_dim**-0.5
    allowed = allowed_of(valid, causal)
    slopes, terms = score_gradients(gradient, q @ swap(k) * scale, allowed)
    check_product(got[0], slopes * scale, terms * scale, k, dtype)
    check_product(got[1], swap(slopes) * scale, swap(terms) * scale, q, dtype)


@dtypes
def test_query_key_entropy_vjp_takes_the_mask_of_its_sequence(dtype):
    """Of layers, sequences and heads there are different numbers."""
    query, key = (random((2, 3, 5, 33, 8), dtype, seed) for seed in (1, 2))
    gradient, mask = random((2, 3, 5, 33), np.float32), mask_of(4, 33)[:3]
    got = qm.query_key_entropy_vjp(gradient, query, key, mask=mask)
    for b in range(3):
        one = gradient[:, [b]], query[:, [b]], key[:, [b]]
        wanted = qm.query_key_entropy_vjp(*one, mask=mask[[b]])
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x[:, [b]], y)


@dtypes
@sizes
@masked
def test_self_attention_entropy_vjp(dtype, num_tokens, masked):
    dim = WIDTHS[num_tokens]
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, (2,), num_tokens)
    tokens = random((2, num_tokens, dim), dtype, scale=0.9)
    tokens[~valid] = np.nan
    gradient = gradient_of(valid, np.float32)
    got = qm.self_attention_entropy_vjp(gradient, tokens, mask=mask)
    x = np.where(valid[..., None], tokens, 0).astype(np.float64)
    scale = dim**-0.5
    found = score_gradients(gradient, x @ swap(x) * scale, allowed_of(valid))
    slopes, terms = (scale * (y + swap(y)) for y in found)
    check_product(got, slopes, terms, x, dtype)


@dtypes
def test_one_score_dominates(dtype):
    """Wide tokens look at themselves: the gradient is tiny, and still exact."""
    tokens = random((1, 1, 130, 256), dtype, scale=1.2)  # a layer of one sequence
    gradient = random((1, 1, 130), np.float32, 3)
    got = qm.self_attention_entropy_vjp(gradient, tokens)
    x = tokens.astype(np.float64)
    every = np.ones((130, 130), np.bool_)
    slopes, _ = score_gradients(gradient, x @ swap(x) / 16, every)
    wanted = (slopes + swap(slopes)) @ x / 16
    size = np.linalg.norm(wanted, axis=-1)
    assert size.max() < 1e-3
    error = np.linalg.norm(got.astype(np.float64) - wanted, axis=-1)
    shares = {2: 1e-2, 4: 5e-4, 8: 1e-9}
    least = 1e-6 if dtype == np.float16 else 0  # below which it has few bits
    share = shares[np.dtype(dtype).itemsize]
    assert (error <= share * size.max() + least).all()


@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e3, 1e30])
@dtypes
def test_gradients_of_any_size(dtype, size):
    """The stored band has units of its own: a half neither overflows nor vanishes."""
    if dtype == np.float16 and not 1e-5 < size < 1e5:
        pytest.skip("the results themselves are beyond float16")
    query, key = random((2, 40, 8), dtype, 1), random((2, 40, 8), dtype, 2)
    gradient = random((2, 40), np.float32)
    wanted = qm.query_key_entropy_vjp(gradient, query, key)
    got = qm.query_key_entropy_vjp(gradient * np.float32(size), query, key)
    share = {2: 2e-2, 4: 1e-5, 8: 1e-6}[np.dtype(dtype).itemsize]
    for x, y in zip(got, wanted, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64) * size
        np.testing.assert_allclose(x, y, rtol=0, atol=share * abs(y).max())


@pytest.mark.parametrize("num_tokens", [32, 150])
@optimized
def test_tf32(num_tokens):
    """Of each factor 10 bits are left, of scores and of their gradients."""
    tokens = random((2, num_tokens, 40), np.float32)
    gradient = random((2, num_tokens), np.float32, 3)
    wanted = qm.self_attention_entropy_vjp(gradient, tokens)
    with qm.allow_tf32():
        got = qm.self_attention_entropy_vjp(gradient, tokens)
    assert (got != wanted).any()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-2 * abs(wanted).max())


def test_memory_is_linear_in_the_tokens(monkeypatch):
    """Where a band is one tile of rows, as it is for very many tokens."""
    monkeypatch.setattr(gradients_page, "_BAND_BYTES", 0)
    held, empty = [], cuda.empty

    def counted(shape, dtype):
        held.append(empty(shape, dtype))
        return held[-1]

    monkeypatch.setattr(cuda, "empty", counted)
    bytes_of = []
    for num_tokens in (128, 256):
        held.clear()
        tokens = random((num_tokens, 4), np.float32)
        qm.query_key_entropy_vjp(tokens[:, 0], tokens, tokens)
        bytes_of.append(sum(x.nbytes for x in held))
    assert bytes_of[1] <= 2 * bytes_of[0]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@dtypes
def test_bands_change_no_bit(dtype, causal, monkeypatch):
    shape = (1, 2, 2, 140, 24)
    query, key = random(shape, dtype, 1), random(shape, dtype, 2)
    gradient = random(shape[:-1], np.float32)
    options = {"causal": causal, "mask": mask_of(2, 140)}
    wanted = qm.query_key_entropy_vjp(gradient, query, key, **options)
    for size in (0, 400_000):  # one tile at a time, and several but not all
        monkeypatch.setattr(gradients_page, "_BAND_BYTES", size)
        got = qm.query_key_entropy_vjp(gradient, query, key, **options)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


@dtypes
@sizes
@masked
def test_attention_entropy_vjp(dtype, num_tokens, masked):
    leading = (2, 2, 2)
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, leading, num_tokens)
    a = np.exp(random((*leading, num_tokens, num_tokens), np.float64, scale=2))
    a[..., ::3] = 0
    a[0, ..., -1, :] = 0  # a row without attention
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]  # the others' sum is any
    a = a.astype(dtype)
    gradient = gradient_of(valid, dtype)
    got = qm.attention_entropy_vjp(gradient, a, mask=mask)
    assert got.dtype == dtype
    a = np.where(allowed_of(valid), a, 0).astype(np.float64)
    total = np.maximum(a.sum(-1, keepdims=True), 1e-300)
    log_p = np.log(np.where(a > 0, a / total, 1))
    entropy = -(a / total * log_p).sum(-1, keepdims=True)
    g = np.where(valid, gradient, 0).astype(np.float64)[..., None]
    wanted = np.where(a > 0, -g * (log_p + entropy) / total, 0)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    share = max(tolerance.stored, tolerance.computed)
    size = np.where(a > 0, abs(g) * (abs(log_p) + entropy) / total, 0)
    assert (abs(got.astype(np.float64) - wanted) <= share * size + 1e-7).all()
    assert not got[a == 0].any()


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


@dtypes
@sizes
@masked
def test_saliency_vjp(dtype, num_tokens, masked):
    layers, batch, heads = 3, 2, 2
    mask = mask_of(batch, num_tokens, masked)
    # Sixteenths: means are exact, and some tokens tie at both ends.
    entropy = np.random.default_rng(2).integers(
        0, 8, (layers, batch, heads, num_tokens)
    )
    entropy = (entropy / 16).astype(dtype)
    entropy[1] = 2  # a constant layer gets nothing
    valid = valid_of(mask, (batch,), num_tokens)
    gradient = gradient_of(valid, np.float32)
    g = np.where(valid, gradient, 0).astype(np.float64)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    share = max(tolerance.stored, tolerance.computed)
    for salient in ("low", "high"):
        options = {"salient": salient, "mask": mask}
        got = qm.saliency_vjp(gradient, entropy, **options)
        assert got.dtype == dtype
        wanted = saliency_vjp_of(g, entropy, valid, salient)
        np.testing.assert_allclose(
            got.astype(np.float64), wanted, rtol=share, atol=share * abs(wanted).max()
        )


@dtypes
@sizes
@masked
def test_norm_saliency_vjp(dtype, num_tokens, masked):
    batch, dim = 2, 37
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, num_tokens // 2] = 0  # a norm that has no slope
    valid = valid_of(mask, (batch,), num_tokens)
    tokens[~valid] = np.nan
    gradient = gradient_of(valid, dtype)
    got = qm.norm_saliency_vjp(gradient, tokens, mask=mask)
    assert got.dtype == dtype
    x = np.where(valid[..., None], tokens, 0).astype(np.float64)
    norms = np.linalg.norm(x, axis=-1)
    g = np.where(valid, gradient, 0).astype(np.float64)
    slope = saliency_vjp_of(g, norms[None, :, None], valid, "high")[0, :, 0]
    wanted = (slope / np.where(norms > 0, norms, 1))[..., None] * x
    tolerance = TOLERANCE[np.dtype(dtype).name]
    share = max(tolerance.stored, tolerance.computed)
    np.testing.assert_allclose(
        got.astype(np.float64), wanted, rtol=share, atol=share * abs(wanted).max()
    )
