"""The kernels of `query_key_entropy` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 formulas
(oracle_arrays.py). Q and K are the queries and keys of a head, c the scale of the
scores, G the gradient of the loss ℒ with respect to the scores.
"""

import numpy as np
import pytest
from conftest import assert_close
from entropy_vjp_cases import WIDTHS, check_product, gradient_of, transposed, vjp_sizes
from kernel_cases import allowed_of, dtypes, mask_of, masked, random, sizes, valid_of
from oracle_arrays import softmax_entropy, softmax_entropy_vjp

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_query_key_entropy(dtype, num_tokens, masked):
    layers, batch, heads = 1, 2, 2
    # A head width d for each N: less than one step of a tile, whole steps, and odd.
    widths = {1: 1, 31: 17, 32: 64, 33: 100, 127: 80, 128: 128, 129: 33, 257: 72}
    shape = (layers, batch, heads, num_tokens, widths[num_tokens])
    mask = mask_of(batch, num_tokens, masked)
    query, key = random(shape, dtype, 1, 2), random(shape, dtype, 2, 2)
    scores = query.astype(np.float64) @ np.swapaxes(key.astype(np.float64), -1, -2)
    for causal in (False, True):
        got = qm.query_key_entropy(query, key, causal=causal, mask=mask)
        allowed = allowed_of(valid_of(mask, shape[:-1]), causal)
        wanted = softmax_entropy(scores * shape[-1] ** -0.5, allowed)
        assert_close(got, wanted, dtype)


@dtypes
def test_query_key_entropy_takes_the_mask_of_its_sequence(dtype):
    """L, B and H differ, so a kernel that exchanges two axes reads another mask."""
    query, key = (random((2, 3, 5, 33, 8), dtype, seed) for seed in (1, 2))
    mask = mask_of(4, 33)[:3]
    got = qm.query_key_entropy(query, key, mask=mask)
    for b in range(3):  # each sequence in a batch of its own
        one = qm.query_key_entropy(query[:, [b]], key[:, [b]], mask=mask[[b]])
        np.testing.assert_array_equal(got[:, [b]], one)


@dtypes
@pytest.mark.parametrize("head_dim", [192, 255, 256])
def test_query_key_entropy_of_wide_heads(dtype, head_dim):
    # The queries of a block may not fit in shared memory; then another kernel runs.
    query, key = (random((70, head_dim), dtype, seed) for seed in (1, 2))
    got = qm.query_key_entropy(query, key, causal=True, scale=0.3)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    assert_close(got, softmax_entropy(scores * 0.3, np.tri(70, dtype=bool)), dtype)


@dtypes
@pytest.mark.parametrize("scale", [1e-25, 0.3, 1e3, 1e6])
def test_entropy_of_n_equal_scores_is_log_n(dtype, scale):
    """Equal scores have equal weights, even if scores are very large or small."""
    token = random((1, 40), dtype) + np.ones(1, dtype)
    query = np.repeat(token, 129, axis=0)
    mask = np.arange(129) >= 2  # the first two are padding; 127 tokens are left
    wanted = np.where(mask, np.log(mask.sum()), 0)
    got = qm.query_key_entropy(query, query, scale=scale, mask=mask)
    assert_close(got, wanted, dtype)
    got = qm.query_key_entropy(query, query, scale=scale, causal=True)
    assert_close(
        got, np.log(np.arange(129) + 1), dtype
    )  # token i attends to i + 1 tokens
    assert_close(qm.self_attention_entropy(query, mask=mask), wanted, dtype)


@dtypes
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_give_nan(dtype, wrong):
    """Inputs on a GPU are not checked for NaN, so the result must be NaN."""
    query, key = (random((130, 24), dtype, seed) for seed in (1, 2))
    key[70, 3] = wrong
    got = qm.query_key_entropy(query, key, causal=True)
    # With a causal mask, tokens before token 70 do not attend to it.
    assert np.isfinite(got[:70]).all()
    assert np.isnan(got[70:]).all()
    assert np.isnan(qm.self_attention_entropy(key)).all()
    got = qm.query_key_entropy(query, key, mask=np.arange(130) != 70)
    assert np.isfinite(got).all()  # padding may be NaN


@dtypes
@vjp_sizes
@masked
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_query_key_entropy_vjp(dtype, num_tokens, masked, causal):
    leading, head_dim = (1, 2, 2), WIDTHS[num_tokens]
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, (*leading, num_tokens))
    shape = (*leading, num_tokens, head_dim)
    query, key = random(shape, dtype, 1, 1.5), random(shape, dtype, 2, 1.5)
    query[~valid] = key[~valid] = np.nan  # padding must not be read
    gradient = gradient_of(valid, np.float32)
    options = {"causal": causal, "mask": mask}
    got = qm.query_key_entropy_vjp(gradient, query, key, **options)
    q, k = (np.where(valid[..., None], x, 0).astype(np.float64) for x in (query, key))
    scale = head_dim**-0.5
    allowed = allowed_of(valid, causal)
    # G, and the magnitudes of the terms of its entries
    g, terms = softmax_entropy_vjp(gradient, q @ transposed(k) * scale, allowed)
    # ∂ℒ/∂Q = c G K and ∂ℒ/∂K = c Gᵀ Q
    check_product(got[0], g * scale, terms * scale, k, dtype)
    check_product(got[1], transposed(g) * scale, transposed(terms) * scale, q, dtype)


@dtypes
def test_query_key_entropy_vjp_takes_the_mask_of_its_sequence(dtype):
    """L, B and H differ, so a kernel that exchanges two axes reads another mask."""
    query, key = (random((2, 3, 5, 33, 8), dtype, seed) for seed in (1, 2))
    gradient, mask = random((2, 3, 5, 33), np.float32), mask_of(4, 33)[:3]
    got = qm.query_key_entropy_vjp(gradient, query, key, mask=mask)
    for b in range(3):  # each sequence in a batch of its own
        one = gradient[:, [b]], query[:, [b]], key[:, [b]]
        wanted = qm.query_key_entropy_vjp(*one, mask=mask[[b]])
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x[:, [b]], y)
