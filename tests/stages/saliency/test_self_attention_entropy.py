import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestSelfAttentionEntropy:
    @pytest.mark.parametrize("num_tokens", [1, 2, 255, 256, 257])  # a block has 256
    def test_oracle(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        wanted = oracle.self_attention_entropy(tokens)
        got = qm.self_attention_entropy(tokens)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_tiny_entropies_keep_their_digits(self, rng):
        """Wide tokens are most similar to themselves: H ≈ 1e-12 must be exact too."""
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
        # States of the sink's column must be merged into every row.
        assert wanted.min() < 1e-9
        np.testing.assert_allclose(qm.self_attention_entropy(tokens), wanted, rtol=2e-4)

    @pytest.mark.parametrize("indices", [[270], [3, 4], [3, 270], [2, 9, 258, 270]])
    def test_equal_largest_scores_divide_the_attention(self, indices):
        """The entropy of n equal maxima is log n: in a block or across two blocks."""
        tokens = np.ones((280, 4))
        tokens[indices] = 50
        wanted = np.full(280, np.log(len(indices)))
        assert_close(qm.self_attention_entropy(tokens), wanted)
        assert_close(qm.query_key_entropy(np.ones((280, 4)), tokens), wanted)

    def test_huge_values(self, rng):
        tokens = rng.standard_normal((280, 4)).astype(np.float32)
        tokens[3] = tokens[270]  # two equal maxima, in different blocks
        got = qm.self_attention_entropy(tokens * np.float32(1e25))
        wanted = oracle.self_attention_entropy(tokens * np.float32(1e25))
        assert_close(got, wanted, "float32")
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.self_attention_entropy(tokens.astype(float) * 1e200)

    def test_layers_and_batch(self, rng):
        tokens = rng.standard_normal((2, 3, 5, 4))  # (L, B, N, D)
        got = qm.self_attention_entropy(tokens)
        assert got.shape == (2, 3, 5)
        assert_close(got[1, 2], oracle.self_attention_entropy(tokens[1, 2]))

    def test_mask_is_cutting_out(self, rng):
        tokens = rng.standard_normal((2, 2, 300, 4))
        mask = rng.random((2, 300)) < 0.7  # padding anywhere
        got = qm.self_attention_entropy(tokens, mask=mask)
        for b in range(2):
            wanted = qm.self_attention_entropy(tokens[:, b][..., mask[b], :])
            np.testing.assert_array_equal(got[:, b][..., mask[b]], wanted)
            assert not got[:, b][..., ~mask[b]].any()
