import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class TestAttentionEntropy:
    def test_hand_worked(self):
        attention = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
        wanted = [0, np.log(2), 1.5 * np.log(2)]
        assert_close(qm.attention_entropy(attention), wanted)

    @pytest.mark.parametrize("num_tokens", [1, 2, 31, 300])  # 300: more than one block
    def test_oracle(self, rng, dtype, num_tokens):
        attention = softmax(3 * rng.standard_normal((num_tokens, num_tokens)))
        attention = attention.astype(dtype)
        p = attention.astype(np.float64)  # of float16, a row's sum is no longer 1
        wanted = oracle.attention_entropy(p / p.sum(-1, keepdims=True))
        got = qm.attention_entropy(attention)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_every_leading_axis(self, rng):
        attention = softmax(rng.standard_normal((3, 2, 4, 5, 5)))
        got = qm.attention_entropy(attention)
        assert got.shape == (3, 2, 4, 5)
        assert_close(got[2, 1, 3], oracle.attention_entropy(attention[2, 1, 3]))
        assert_close(qm.attention_entropy(attention[0]), got[0])

    def test_rows_are_relative_to_their_sum(self):
        attention = np.array([[2.5, 2.5, 0], [0, 0, 0], [1e-30, 1e-30, 2e-30]])
        wanted = [np.log(2), 0, 1.5 * np.log(2)]
        assert_close(qm.attention_entropy(attention), wanted)

    def test_masked_rows_are_relative_to_what_is_left(self):
        attention = np.tile([0.05, 0.05, 0.9], (3, 1))
        got = qm.attention_entropy(attention, mask=np.array([True, True, False]))
        assert_close(got, [np.log(2), np.log(2), 0])

    def test_never_negative(self, rng, dtype):
        """One entry a row: entropy 0 but for rounding."""
        attention = np.diag(rng.uniform(0.1, 5, 300)).astype(dtype)
        got = qm.attention_entropy(attention)
        assert_close(got, np.zeros(300), "float32")
        assert (got >= 0).all()

    @pytest.mark.parametrize("lead", [(), (2,), (3, 2), (3, 2, 4)])
    def test_mask_is_cutting_off(self, rng, lead):
        attention = softmax(rng.standard_normal((*lead, 6, 6)))
        mask = np.ones((2, 6) if lead else 6, bool)
        mask[..., 4:] = False
        got = qm.attention_entropy(attention, mask=mask)
        assert_close(got[..., :4], qm.attention_entropy(attention[..., :4, :4]))
        assert not got[..., 4:].any()

    def test_negative_is_refused(self):
        with pytest.raises(ValueError, match=r"`attention` must be ≥ 0, got -0.5 at"):
            qm.attention_entropy(np.array([[1.5, -0.5], [0.5, 0.5]]))

    def test_not_square_is_refused(self):
        with pytest.raises(ValueError, match=r"`attention` must have shape .*\(3, 3\)"):
            qm.attention_entropy(np.ones((3, 2)))


class TestQueryKeyEntropy:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("num_tokens", [1, 33, 300])
    def test_oracle(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        wanted = oracle.query_key_entropy(query, key, causal=causal)
        got = qm.query_key_entropy(query, key, causal=causal)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_scale(self, rng):
        query, key = rng.standard_normal((2, 9, 4))
        wanted = oracle.query_key_entropy(query, key, scale=2.5)
        assert_close(qm.query_key_entropy(query, key, scale=2.5), wanted)

    @pytest.mark.parametrize("causal", [False, True])
    def test_mask_is_cutting_out(self, rng, causal):
        query, key = rng.standard_normal((2, 3, 2, 4, 8, 5))  # L B H N d
        mask = np.ones((2, 8), bool)
        mask[0, [0, 3, 4]] = False  # holes, at the front too
        got = qm.query_key_entropy(query, key, causal=causal, mask=mask)
        assert got.shape == (3, 2, 4, 8)
        for b in range(2):
            wanted = qm.query_key_entropy(
                query[:, b : b + 1][..., mask[b], :],
                key[:, b : b + 1][..., mask[b], :],
                causal=causal,
            )
            assert_close(got[:, b : b + 1][..., mask[b]], wanted)
            assert not got[:, b][..., ~mask[b]].any()

    def test_shapes_and_dtypes_must_agree(self, rng):
        query = rng.standard_normal((4, 3))
        with pytest.raises(ValueError, match="`key` must have shape"):
            qm.query_key_entropy(query, query[:3])
        with pytest.raises(TypeError, match="`key` must be float64 like `query`"):
            qm.query_key_entropy(query, query.astype(np.float32))


class TestSelfAttentionEntropy:
    @pytest.mark.parametrize("num_tokens", [1, 2, 255, 256, 257])
    def test_oracle(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        wanted = oracle.self_attention_entropy(tokens)
        got = qm.self_attention_entropy(tokens)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_tiny_entropies_keep_their_digits(self, rng):
        """Wide tokens are most similar to themselves: H ~ 1e-12, and still exact."""
        tokens = (3.2 * rng.standard_normal((300, 16))).astype(np.float32)
        wanted = oracle.self_attention_entropy(tokens)
        assert wanted.min() < 1e-12
        got = qm.self_attention_entropy(tokens)
        np.testing.assert_allclose(got, wanted, rtol=2e-4)

    def test_one_long_token_dominates_every_row(self, rng):
        """The largest score is off the diagonal: an attention sink."""
        tokens = rng.random((280, 4)).astype(np.float32) + 1
        tokens[270] = 25
        wanted = oracle.self_attention_entropy(tokens)
        assert wanted.min() < 1e-9
        np.testing.assert_allclose(qm.self_attention_entropy(tokens), wanted, rtol=2e-4)

    @pytest.mark.parametrize("places", [[270], [3, 4], [3, 270], [2, 9, 258, 270]])
    def test_equal_largest_scores_share_the_attention(self, places):
        """In a block, across blocks, on the diagonal and off it."""
        tokens = np.ones((280, 4))
        tokens[places] = 50
        wanted = np.full(280, np.log(len(places)))
        assert_close(qm.self_attention_entropy(tokens), wanted)
        assert_close(qm.query_key_entropy(np.ones((280, 4)), tokens), wanted)

    def test_huge_values(self, rng):
        tokens = rng.standard_normal((280, 4)).astype(np.float32)
        tokens[3] = tokens[270]
        got = qm.self_attention_entropy(tokens * np.float32(1e25))
        wanted = oracle.self_attention_entropy(tokens * np.float32(1e25))
        assert_close(got, wanted, "float32")
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.self_attention_entropy(tokens.astype(float) * 1e200)

    def test_layers_and_batch(self, rng):
        tokens = rng.standard_normal((2, 3, 5, 4))
        got = qm.self_attention_entropy(tokens)
        assert got.shape == (2, 3, 5)
        assert_close(got[1, 2], oracle.self_attention_entropy(tokens[1, 2]))

    def test_mask_is_cutting_out(self, rng):
        tokens = rng.standard_normal((2, 2, 300, 4))
        mask = rng.random((2, 300)) < 0.7
        got = qm.self_attention_entropy(tokens, mask=mask)
        for b in range(2):
            wanted = qm.self_attention_entropy(tokens[:, b][..., mask[b], :])
            np.testing.assert_array_equal(got[:, b][..., mask[b]], wanted)
            assert not got[:, b][..., ~mask[b]].any()


class TestSaliency:
    def test_oracle(self, rng, dtype):
        entropy = rng.random((3, 2, 7)).astype(dtype)
        for salient in ("low", "high"):
            got = qm.saliency(entropy, salient=salient)
            assert got.shape == (2, 7)
            for b in range(2):
                wanted = oracle.saliency(entropy[:, b].astype(float), salient)
                assert_close(got[b], wanted, dtype)

    def test_heads_are_averaged_before_layers(self, rng):
        entropy = rng.random((3, 2, 4, 7))
        assert_close(qm.saliency(entropy), qm.saliency(entropy.mean(axis=2)))

    def test_constant_row(self):
        assert_close(qm.saliency(np.full(4, 2.0)), np.ones(4))
        assert_close(qm.saliency(np.full(4, 2.0), salient="high"), np.zeros(4))

    def test_padding_sets_no_extreme(self):
        entropy = np.array([[5.0, 1.0, 2.0, -9.0, 99.0]])
        mask = np.array([[True, True, True, False, False]])
        assert_close(qm.saliency(entropy, mask=mask), [[0, 1, 0.75, 0, 0]])

    def test_unknown_word(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency(np.ones(3), salient="mid")


class TestNormSaliency:
    def test_oracle(self, rng, dtype):
        tokens = rng.standard_normal((9, 5)).astype(dtype)
        assert_close(qm.norm_saliency(tokens), oracle.norm_saliency(tokens), dtype)

    def test_mask(self):
        tokens = np.array([[[3.0], [1.0], [2.0], [50.0]]])
        mask = np.array([[True, True, True, False]])
        assert_close(qm.norm_saliency(tokens, mask=mask), [[1, 0, 0.5, 0]])
