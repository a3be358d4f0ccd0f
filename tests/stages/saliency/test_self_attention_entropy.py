"""`self_attention_entropy` compared with the oracle, at block edges and extremes.

The oracle (oracle.py) computes one sequence of N tokens with plain float64 loops. The
library computes 256 rows of scores (a block) at a time, and uses each score s_ij also
for s_ji. H is the entropy of a row.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestSelfAttentionEntropy:
    # Fewer and more rows than the 256 of a block
    @pytest.mark.parametrize("num_tokens", [1, 2, 255, 256, 257])
    def test_matches_the_oracle(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        wanted = oracle.self_attention_entropy(tokens)
        got = qm.self_attention_entropy(tokens)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_tiny_entropies_are_exact(self, rng):
        """Wide tokens attend almost only to themselves, so that H is about 1e-12."""
        tokens = (3.2 * rng.standard_normal((300, 16))).astype(np.float32)
        wanted = oracle.self_attention_entropy(tokens)
        assert wanted.min() < 1e-12
        got = qm.self_attention_entropy(tokens)
        np.testing.assert_allclose(got, wanted, rtol=2e-4)

    def test_one_long_token_dominates_every_row(self, rng):
        """All tokens attend to a long token: largest scores are off the diagonal."""
        tokens = rng.random((280, 4)).astype(np.float32) + 1
        tokens[270] = 25  # in the second block
        wanted = oracle.self_attention_entropy(tokens)
        assert wanted.min() < 1e-9
        # Every row, of both blocks, must include the score of column 270.
        np.testing.assert_allclose(qm.self_attention_entropy(tokens), wanted, rtol=2e-4)

    # Tokens 0..255 are in the first block, the others in the second one.
    @pytest.mark.parametrize("indices", [[270], [3, 4], [3, 270], [2, 9, 258, 270]])
    def test_entropy_of_n_equal_largest_scores_is_log_n(self, indices):
        """The equal scores are in one block or in two blocks."""
        tokens = np.ones((280, 4))
        tokens[indices] = 50
        wanted = np.full(280, np.log(len(indices)))
        assert_close(qm.self_attention_entropy(tokens), wanted)
        assert_close(qm.query_key_entropy(np.ones((280, 4)), tokens), wanted)

    def test_scores_beyond_float32(self, rng):
        tokens = rng.standard_normal((280, 4)).astype(np.float32)
        tokens[3] = tokens[270]  # two equal maxima, in different blocks
        got = qm.self_attention_entropy(tokens * np.float32(1e25))
        wanted = oracle.self_attention_entropy(tokens * np.float32(1e25))
        assert_close(got, wanted, "float32")
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.self_attention_entropy(tokens.astype(float) * 1e200)

    def test_layers_sequences_and_heads_are_separate(self, rng):
        tokens = rng.standard_normal((2, 3, 2, 5, 4))  # (L, B, H, N, d)
        got = qm.self_attention_entropy(tokens)
        assert got.shape == (2, 3, 2, 5)
        assert_close(got[1, 2, 0], oracle.self_attention_entropy(tokens[1, 2, 0]))
        layers = qm.self_attention_entropy(tuple(tokens))
        np.testing.assert_array_equal(np.stack(layers), got)

    def test_mask_has_the_bits_of_removing_the_padding(self, rng):
        tokens = rng.standard_normal((2, 3, 300, 4))  # (B, H, N, d)
        mask = rng.random((2, 300)) < 0.7  # (B, N), padding anywhere
        got = qm.self_attention_entropy(tokens, mask=mask)
        for b in range(2):
            wanted = qm.self_attention_entropy(tokens[b][:, mask[b]])
            np.testing.assert_array_equal(got[b][:, mask[b]], wanted)
            assert not got[b][:, ~mask[b]].any()
