"""Gradients of softmax entropies with respect to queries and keys, and to tokens."""

import tracemalloc

import numpy as np
import pytest
from conftest import assert_close
from oracle_arrays import softmax_entropy_vjp
from saliency_cases import check_differences

import qm_cupy as qm


def dense(gradient, query, key, causal=False):
    """Return the gradients for queries and keys from all N × N scores in float64."""
    q, k = query.astype(np.float64), key.astype(np.float64)
    scale = q.shape[-1] ** -0.5
    allowed = np.ones((len(q), len(q)), np.bool_)
    allowed = np.tril(allowed) if causal else allowed
    slope, _ = softmax_entropy_vjp(gradient, q @ k.T * scale, allowed)
    return scale * slope @ k, scale * slope.T @ q  # c G K and c Gᵀ Q


def peak_of(function, *args):
    """Return the peak number of bytes that NumPy allocates during a call."""
    tracemalloc.start()
    function(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


class TestScores:
    """Gradients through softmax(scores), with scores recomputed block by block."""

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("num_tokens", [2, 255, 256, 257, 600])  # a block has 256
    def test_blocks(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.query_key_entropy_vjp(gradient, query, key, causal=causal)
        wanted = dense(gradient, query, key, causal)
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == dtype
            assert_close(x, y, dtype, "stored" if dtype == np.float16 else "computed")

    @pytest.mark.parametrize("num_tokens", [255, 600])
    def test_blocks_of_self_attention(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        wanted = np.add(*dense(gradient, tokens, tokens))
        assert_close(
            got, wanted, dtype, "stored" if dtype == np.float16 else "computed"
        )

    def test_digits_stay_where_one_score_dominates(self, rng):
        """Wide tokens attend to themselves: the gradient is tiny but must be exact."""
        tokens = (2 * rng.standard_normal((300, 64))).astype(np.float32)
        gradient = rng.standard_normal(300)
        wanted = qm.self_attention_entropy_vjp(gradient, tokens.astype(np.float64))
        size = np.linalg.norm(wanted, axis=-1, keepdims=True)
        assert size.min() < 1e-5
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        assert (np.abs(got - wanted) <= 2e-4 * size).all()

    def test_equal_tokens_have_gradient_zero(self, rng):
        # p = 1/N and H = log N is the maximum of the entropy, where its slope is 0.
        tokens = np.ones((270, 4))
        got = qm.self_attention_entropy_vjp(rng.standard_normal(270), tokens)
        np.testing.assert_allclose(got, 0, atol=1e-12)

    def test_equal_largest_scores(self, rng):
        # Two maxima in every row: only one of them is left out of the sums.
        tokens = np.ones((5, 3))
        tokens[[1, 3]] = 3
        inputs = {"tokens": tokens}
        functions = qm.self_attention_entropy, qm.self_attention_entropy_vjp
        check_differences(rng, *functions, inputs, {})

    def test_huge_values(self, rng):
        # Scores of 1e50 need float64; scores of 1e450 are refused.
        tokens = (1e25 * rng.standard_normal((280, 4))).astype(np.float32)
        got = qm.self_attention_entropy_vjp(np.ones(280), tokens)
        assert np.isfinite(got).all()
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.self_attention_entropy_vjp(np.ones(280), tokens.astype(float) * 1e200)

    def test_shapes_and_dtypes_must_agree(self, rng):
        query = rng.standard_normal((4, 3))
        with pytest.raises(ValueError, match="`key` must have shape"):
            qm.query_key_entropy_vjp(np.ones(4), query, query[:3])
        with pytest.raises(TypeError, match="`key` must be float64 like `query`"):
            qm.query_key_entropy_vjp(np.ones(4), query, query.astype(np.float32))
        with pytest.raises(ValueError, match="`scale` must lie in"):
            qm.query_key_entropy_vjp(np.ones(4), query, query, scale=0)

    def test_memory_is_linear_in_the_tokens(self, rng):
        tokens = rng.standard_normal((4096, 8)).astype(np.float32)
        peaks = [
            peak_of(qm.self_attention_entropy_vjp, np.ones(n), tokens[:n])
            for n in (1024, 2048, 4096)
        ]
        assert peaks[2] < 4096 * 4096  # bytes: a quarter of N × N
        # Doubling N doubles the increase; it would be four times as large for N × N.
        assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)
