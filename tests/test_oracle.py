"""The oracle's formulas for whole arrays agree with its loops and with differences."""

import numpy as np
import oracle
import oracle_arrays
import pytest
from conftest import assert_close
from differences import assert_slope


@pytest.fixture
def tokens(rng):
    tokens = rng.standard_normal((17, 4))
    tokens[[3, 9]] = 0  # zero tokens have no direction
    return tokens


@pytest.fixture
def allowed():
    """Return a mask (6, 6): causal, and without token 2 as row and as column."""
    valid = np.arange(6) != 2
    return np.tril(valid & valid[:, None])


def test_cosine(tokens):
    assert_close(oracle_arrays.cosine(tokens, tokens), oracle.cosine_similarity(tokens))


def test_softmax(rng):
    scores, noise = rng.random((2, 9))
    wanted = oracle.gumbel_softmax(scores, noise, 0.3)
    assert_close(oracle_arrays.softmax(scores + noise, True, 0.3), wanted)
    valid = np.arange(9) % 3 > 0  # indices 0, 3 and 6 are padding
    wanted = oracle.gumbel_softmax(scores[valid], noise[valid], 0.3)
    got = oracle_arrays.softmax(scores + noise, valid, 0.3)
    # Padding must not change the others: the loop sees only the valid tokens.
    assert_close(got[valid], wanted)
    assert not got[~valid].any()  # padded tokens get probability 0


# At scale 30 one score dominates, where log1p and the centred sum matter.
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_softmax_entropy(rng, scale):
    query, key = rng.standard_normal((2, 8, 5))
    for causal in (False, True):
        allowed = np.ones((8, 8), np.bool_)
        allowed = np.tril(allowed) if causal else allowed
        got = oracle_arrays.softmax_entropy(scale * query @ key.T, allowed)
        wanted = oracle.query_key_entropy(query, key, causal, scale)
        np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_softmax_entropy_vjp(rng, allowed):
    gradient, scores = rng.standard_normal(6), rng.standard_normal((6, 6))
    got, size = oracle_arrays.softmax_entropy_vjp(gradient, scores, allowed)

    def loss(x):
        return gradient @ oracle_arrays.softmax_entropy(x, allowed)

    assert_slope(got, loss, scores)
    assert (abs(got) <= size).all()  # no term is larger than the bound of rounding
    assert not size[~allowed].any()


def test_attention_received(rng):
    query, key = rng.standard_normal((2, 6, 3))
    for causal in (False, True):
        allowed = np.tril(np.ones((6, 6), bool)) if causal else np.ones((6, 6), bool)
        attention = oracle_arrays.softmax(0.7 * query @ key.T, allowed)
        got = oracle_arrays.attention_received(attention, allowed)
        wanted = oracle.query_key_received(query, key, causal, 0.7)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        np.testing.assert_allclose(
            oracle.attention_received(attention, causal), wanted, rtol=1e-12
        )


def test_attention_received_vjp(rng, allowed):
    gradient, scores = rng.standard_normal(6), rng.standard_normal((6, 6))

    def loss(x):
        attention = oracle_arrays.softmax(x, allowed)
        return gradient @ oracle_arrays.attention_received(attention, allowed)

    attention = oracle_arrays.softmax(scores, allowed)
    got, size = oracle_arrays.attention_received_vjp(gradient, attention, allowed)
    assert_slope(got, loss, scores)
    assert (abs(got) <= size).all()
    assert not size[~allowed].any()


def test_attention_entropy_vjp(rng):
    # All positive: log a is smooth there.
    gradient, attention = rng.standard_normal(5), rng.random((5, 5)) + 0.1

    # The gradient takes unnormalised weights, so the loss normalises them.
    def loss(x):
        return gradient @ oracle.attention_entropy(x / x.sum(-1, keepdims=True))

    got, size = oracle_arrays.attention_entropy_vjp(gradient, attention)
    assert_slope(got, loss, attention)
    assert (abs(got) <= size).all()


@pytest.mark.parametrize("salient", ["low", "high"])
def test_saliency_vjp(rng, salient):
    gradient, entropy = rng.standard_normal((1, 6)), rng.random((2, 1, 3, 6))
    valid = np.array([[True, True, False, True, True, True]])
    got = oracle_arrays.saliency_vjp(gradient, entropy, valid, salient)

    def loss(x):
        # (L, N) of the valid tokens: heads are averaged first.
        layers = x.mean(2)[:, 0, valid[0]]
        return gradient[valid] @ oracle.saliency(layers, salient)

    assert_slope(got, loss, entropy)


@pytest.mark.parametrize("num_groups", [1, 5, 40])
def test_top_k(rng, num_groups):
    # Four values for forty tokens: ties decide most of the selection.
    scores = rng.integers(0, 4, 40).astype(float)
    got = oracle_arrays.top_k(scores, np.ones(40, np.bool_), num_groups)
    wanted = np.flatnonzero(oracle.top_k_mask(scores, num_groups))
    np.testing.assert_array_equal(got, wanted)


# The first step halves the groups at most, so K = 6 and K = 1 need several steps.
@pytest.mark.parametrize("num_groups", [1, 6, 13])
def test_matchings(tokens, num_groups):
    groups = oracle_arrays.bipartite(tokens, num_groups)
    assert [sorted(g) for g in groups] == oracle.bipartite(tokens, num_groups)
    # Zero tokens are among these: both forms must place them alike.
    groups = oracle_arrays.contiguous(tokens, num_groups)
    assert groups == oracle.contiguous(tokens, num_groups)
    # With two protected tokens, K must leave room for the groups between them.
    if num_groups > 4:
        groups = oracle_arrays.contiguous(tokens, num_groups, {2, 8})
        assert groups == oracle.contiguous(tokens, num_groups, {2, 8})


def test_mlp(rng):
    shapes = (5, 4), (5,), (3, 5), (3,)
    weights, x = [rng.standard_normal(shape) for shape in shapes], rng.random((6, 4))
    wanted = [oracle.mlp(row, *weights) for row in x]
    assert_close(oracle_arrays.mlp(x, *weights), wanted)
