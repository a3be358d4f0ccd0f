"""The kernels of `attention_received` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 formulas. A is the
attention of a head, Q and K its queries and keys, c the scale of the scores, G the
gradient of the loss ℒ with respect to the scores.
"""

import numpy as np
import pytest
from conftest import assert_close
from entropy_vjp_cases import WIDTHS, check_product, gradient_of, transposed, vjp_sizes
from kernel_cases import (
    allowed_of,
    dtypes,
    mask_of,
    masked,
    optimized,
    random,
    sizes,
    valid_of,
)
from oracle_arrays import attention_received, attention_received_vjp, softmax

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
# A head width d for each N: less than one step of a tile, whole steps, and odd.
HEAD_DIMS = {1: 1, 31: 17, 32: 64, 33: 100, 63: 40, 64: 64, 65: 24, 127: 80, 128: 128,
             129: 33, 255: 8, 256: 16, 257: 72}  # fmt: skip


@dtypes
@sizes
@masked
def test_of_attention(dtype, num_tokens, masked):
    shape = (1, 2, 2, num_tokens)
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, shape)
    attention = softmax(random((*shape, num_tokens), np.float64)).astype(dtype)
    attention[~allowed_of(valid)] = np.nan  # padding must not be read
    for causal in (False, True):
        got = qm.attention_received(attention, causal=causal, mask=mask)
        # The sums of 16-bit probabilities are in float32.
        exact = np.float64 if dtype is np.float64 else np.float32
        assert_close(
            got, attention_received(attention, allowed_of(valid, causal)), exact
        )


@dtypes
@sizes
@masked
def test_of_queries_and_keys(dtype, num_tokens, masked):
    check_scores(dtype, num_tokens, masked)


@dtypes
@pytest.mark.parametrize("num_tokens", [63, 64, 65, 255, 256])
def test_around_half_tiles_and_blocks(dtype, num_tokens):
    check_scores(dtype, num_tokens, True)


def check_scores(dtype, num_tokens, masked):
    shape = (1, 2, 2, num_tokens, HEAD_DIMS[num_tokens])
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, shape[:-1])
    query, key = random(shape, dtype, 1, 2), random(shape, dtype, 2, 2)
    scores = query.astype(np.float64) @ transposed(key.astype(np.float64))
    query[~valid] = key[~valid] = np.nan  # padding must not be read
    pair = {"query": query, "key": key}
    for causal in (False, True):
        got = qm.attention_received(**pair, causal=causal, mask=mask)
        allowed = allowed_of(valid, causal)
        wanted = attention_received(
            softmax(scores * shape[-1] ** -0.5, allowed), allowed
        )
        assert_close(got, wanted, dtype)


@dtypes
def test_mask_of_its_sequence(dtype):
    """L, B and H differ, so a kernel that exchanges two axes reads another mask."""
    query, key = (random((2, 3, 5, 33, 8), dtype, seed) for seed in (1, 2))
    attention = abs(random((2, 3, 5, 33, 33), dtype, 3))
    gradient, mask = random((2, 3, 5, 33), np.float32), mask_of(4, 33)[:3]
    for causal in (False, True):
        for source in ({"attention": attention}, {"query": query, "key": key}):
            options = {"causal": causal, "mask": mask}
            got = qm.attention_received(**source, **options)
            gradients = qm.attention_received_vjp(gradient, **source, **options)
            for b in range(3):  # each sequence in a batch of its own
                one = {name: x[:, [b]] for name, x in source.items()}
                one |= {"causal": causal, "mask": mask[[b]]}
                wanted = qm.attention_received(**one)
                np.testing.assert_array_equal(got[:, [b]], wanted)
                wanted = qm.attention_received_vjp(gradient[:, [b]], **one)
                for x, y in zip(gradients, wanted, strict=True):
                    assert (x is None) == (y is None)
                    if x is not None:
                        np.testing.assert_array_equal(x[:, [b]], y)


@dtypes
@causal_or_not
@pytest.mark.parametrize("head_dim", [192, 255, 256])
def test_wide_heads(dtype, head_dim, causal):
    # The keys of a block may not fit in shared memory; then another kernel runs.
    query, key = (random((70, head_dim), dtype, seed) for seed in (1, 2))
    got = qm.attention_received(query=query, key=key, causal=causal, scale=0.3)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    allowed = allowed_of(np.ones(70, bool), causal)
    assert_close(
        got, attention_received(softmax(scores * 0.3, allowed), allowed), dtype
    )


@dtypes
@pytest.mark.parametrize("scale", [1e-25, 0.3, 1e3, 1e6])
def test_equal_scores_have_equal_weights(dtype, scale):
    """Also if scores are very large or small: row i of A is 1 / n in all n columns."""
    token = random((1, 40), dtype) + np.ones(1, dtype)
    query = np.repeat(token, 129, axis=0)
    mask = np.arange(129) >= 2  # the first two are padding; 127 tokens are left
    got = qm.attention_received(query=query, key=query, scale=scale, mask=mask)
    assert_close(got * 127, mask, np.float32)
    got = qm.attention_received(query=query, key=query, scale=scale, causal=True)
    # Token i attends to i + 1 tokens, so r_j is the mean of 1 / (i + 1) over i >= j.
    sums = np.cumsum(1 / np.arange(129, 0, -1.0))[::-1]
    assert_close(got, sums / np.arange(129, 0, -1), np.float32)


@dtypes
@causal_or_not
def test_one_token_receives_all(dtype, causal):
    key = np.zeros((130, 24), dtype)
    key[0] = 40  # the other keys have the score 0
    query = np.ones((130, 24), dtype)
    got = qm.attention_received(query=query, key=key, causal=causal)
    assert_close(got, np.arange(130) == 0, dtype)


@dtypes
def test_nan_stays_nan_unless_it_is_padding(dtype):
    """Inputs on a GPU are not checked for NaN."""
    query, key = (random((130, 24), dtype, seed) for seed in (1, 2))
    key[70, 3] = np.nan
    got = qm.attention_received(query=query, key=key, causal=True)
    assert np.isnan(got[70])
    got = qm.attention_received(query=query, key=key, mask=np.arange(130) != 70)
    assert np.isfinite(got).all()


@dtypes
@vjp_sizes
@masked
@causal_or_not
def test_attention_vjp(dtype, num_tokens, masked, causal):
    shape = (1, 2, 2, num_tokens)
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, shape)
    gradient = gradient_of(valid, np.float32)
    attention = np.ones((*shape, num_tokens), dtype)
    got, *others = qm.attention_received_vjp(
        gradient, attention, causal=causal, mask=mask
    )
    assert others == [None, None]
    allowed = allowed_of(valid, causal)
    h = np.where(valid, gradient, 0) / np.maximum(allowed.sum(-2), 1)
    assert got.dtype == dtype
    column = "stored" if got.dtype.itemsize == 2 else "computed"
    assert_close(got, np.where(allowed, h[..., None, :], 0), dtype, column)
    assert not got[~allowed].any()


@dtypes
@vjp_sizes
@masked
@causal_or_not
def test_query_key_vjp(dtype, num_tokens, masked, causal):
    leading, head_dim = (1, 2, 2), WIDTHS[num_tokens]
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, (*leading, num_tokens))
    shape = (*leading, num_tokens, head_dim)
    query, key = random(shape, dtype, 1, 1.5), random(shape, dtype, 2, 1.5)
    query[~valid] = key[~valid] = np.nan  # padding must not be read
    gradient = gradient_of(valid, np.float32)
    none, *got = qm.attention_received_vjp(
        gradient, query=query, key=key, causal=causal, mask=mask
    )
    assert none is None
    q, k = (np.where(valid[..., None], x, 0).astype(np.float64) for x in (query, key))
    scale = head_dim**-0.5
    allowed = allowed_of(valid, causal)
    a = softmax(q @ transposed(k) * scale, allowed)
    # G, and the magnitudes of the terms of its entries
    g, terms = attention_received_vjp(gradient, a, allowed)
    # ∂ℒ/∂Q = c G K and ∂ℒ/∂K = c Gᵀ Q
    check_product(got[0], g * scale, terms * scale, k, dtype)
    check_product(got[1], transposed(g) * scale, transposed(terms) * scale, q, dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e3, 1e30])
@dtypes
def test_gradient_is_linear_for_any_size_of_the_gradient(dtype, size):
    """A band is stored relative to the gradient of its head, so it stays in range."""
    if dtype == np.float16 and not 1e-5 < size < 1e5:
        pytest.skip("the results themselves are beyond float16")
    query, key = random((2, 40, 8), dtype, 1), random((2, 40, 8), dtype, 2)
    # Without the division by 40 queries, float16 would have few digits of the result.
    gradient = 40 * random((2, 40), np.float32)
    pair = {"query": query, "key": key}
    wanted = qm.attention_received_vjp(gradient, **pair)
    got = qm.attention_received_vjp(gradient * np.float32(size), **pair)
    relative = {2: 2e-2, 4: 1e-5, 8: 1e-6}[np.dtype(dtype).itemsize]
    for x, y in zip(got[1:], wanted[1:], strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64) * size
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * abs(y).max())


@optimized
@pytest.mark.parametrize("dim", [20, 37, 50])
@dtypes
def test_results_do_not_depend_on_alignment(dtype, dim):
    """An unaligned row is read one element at a time, with the same sums as vectors."""
    num_tokens = 130 + dim
    attention = abs(random((num_tokens, num_tokens), dtype))
    shifted = np.empty(attention.size + 1, dtype)[1:].reshape(attention.shape)
    shifted[...] = attention
    for causal in (False, True):
        np.testing.assert_array_equal(
            qm.attention_received(shifted, causal=causal),
            qm.attention_received(attention, causal=causal),
        )
