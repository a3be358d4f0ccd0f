"""Gradients of softmax entropies with respect to queries and keys, and to tokens.

Q and K are the queries and keys of a head of N tokens, c the scale of the scores, and G
the gradient of the loss ℒ with respect to the scores (N, N). The library never stores
all of G: it computes the scores again for 256 rows (a block) at a time.
"""

import tracemalloc

import numpy as np
import pytest
from conftest import assert_close
from oracle_arrays import softmax_entropy_vjp
from saliency_cases import check_differences

import qm_cupy as qm


def gradients_from_all_scores(gradient, query, key, causal=False):
    """Return ∂ℒ/∂Q and ∂ℒ/∂K, computed from all N × N scores at once, in float64."""
    q, k = query.astype(np.float64), key.astype(np.float64)
    scale = q.shape[-1] ** -0.5
    allowed = np.ones((len(q), len(q)), np.bool_)
    allowed = np.tril(allowed) if causal else allowed
    g, _ = softmax_entropy_vjp(gradient, q @ k.T * scale, allowed)
    return scale * g @ k, scale * g.T @ q  # c G K and c Gᵀ Q


def peak_bytes(function, *args):
    """Return the peak number of bytes that NumPy allocates during a call."""
    tracemalloc.start()
    function(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


class TestScoreGradients:
    """Gradients through the softmax of scores, which are computed again in blocks."""

    @pytest.mark.parametrize("causal", [False, True])
    # Fewer and more rows than the 256 of a block
    @pytest.mark.parametrize("num_tokens", [2, 255, 256, 257, 600])
    def test_one_and_several_blocks(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.query_key_entropy_vjp(gradient, query, key, causal=causal)
        wanted = gradients_from_all_scores(gradient, query, key, causal)
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == dtype
            assert_close(x, y, dtype, "stored" if dtype == np.float16 else "computed")

    @pytest.mark.parametrize("num_tokens", [255, 600])
    def test_one_and_several_blocks_of_self_attention(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        # A token is a query and a key.
        wanted = np.add(*gradients_from_all_scores(gradient, tokens, tokens))
        assert_close(
            got, wanted, dtype, "stored" if dtype == np.float16 else "computed"
        )

    def test_gradient_is_exact_where_one_score_dominates(self, rng):
        """Wide tokens attend almost only to themselves, so the gradient is tiny."""
        tokens = (2 * rng.standard_normal((300, 64))).astype(np.float32)
        gradient = rng.standard_normal(300)
        wanted = qm.self_attention_entropy_vjp(gradient, tokens.astype(np.float64))
        size = np.linalg.norm(wanted, axis=-1, keepdims=True)  # of each token
        assert size.min() < 1e-5
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        assert (np.abs(got - wanted) <= 2e-4 * size).all()

    def test_equal_tokens_have_gradient_zero(self, rng):
        # All p are 1/N, so H = log N is the maximum of the entropy: its derivative is
        # 0.
        tokens = np.ones((270, 4))
        got = qm.self_attention_entropy_vjp(rng.standard_normal(270), tokens)
        np.testing.assert_allclose(got, 0, atol=1e-12)

    def test_two_equal_largest_scores_in_every_row(self, rng):
        # The sums leave out one largest score of each row. The other one must count.
        tokens = np.ones((5, 3))
        tokens[[1, 3]] = 3
        inputs = {"tokens": tokens}
        functions = qm.self_attention_entropy, qm.self_attention_entropy_vjp
        check_differences(rng, *functions, inputs, {})

    def test_scores_beyond_float32(self, rng):
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
            peak_bytes(qm.self_attention_entropy_vjp, np.ones(n), tokens[:n])
            for n in (1024, 2048, 4096)
        ]
        assert peaks[2] < 4096 * 4096  # a quarter of the bytes of N × N float32 values
        # N doubles from one peak to the next. The increase doubles, too; with N × N
        # values it would be four times as large.
        assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)
