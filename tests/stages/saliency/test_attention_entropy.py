"""`attention_entropy` compared with hand-worked values and with the oracle.

The oracle (oracle.py) computes one matrix with plain float64 loops. The entropy of a
row is H = -Σ p log p of its probabilities p, in nats. N tokens give matrices (N, N),
for L layers, B sequences and H heads.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close
from oracle_arrays import softmax

import qm_cupy as qm


class TestAttentionEntropy:
    def test_hand_worked_values(self):
        # The three rows have H = 0, log 2, and ½ log 4 + ½ log 2 = 1.5 log 2. Entries
        # of 0 add nothing.
        attention = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
        wanted = [0, np.log(2), 1.5 * np.log(2)]
        assert_close(qm.attention_entropy(attention), wanted)

    # 300 rows are more than one block of 256 rows.
    @pytest.mark.parametrize("num_tokens", [1, 2, 31, 300])
    def test_matches_the_oracle(self, rng, dtype, num_tokens):
        attention = softmax(3 * rng.standard_normal((num_tokens, num_tokens)))
        attention = attention.astype(dtype)
        p = attention.astype(np.float64)  # in float16 the sum of a row is not exactly 1
        wanted = oracle.attention_entropy(p / p.sum(-1, keepdims=True))
        got = qm.attention_entropy(attention)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_layers_sequences_and_heads_are_separate(self, rng):
        attention = softmax(rng.standard_normal((3, 2, 4, 5, 5)))
        got = qm.attention_entropy(attention)  # (L, B, H, N)
        assert got.shape == (3, 2, 4, 5)
        assert_close(got[2, 1, 3], oracle.attention_entropy(attention[2, 1, 3]))
        # One layer of heads, and the layers as a tuple, have the same bits.
        np.testing.assert_array_equal(qm.attention_entropy(attention[0]), got[0])
        layers = qm.attention_entropy(tuple(attention))
        assert isinstance(layers, tuple)
        np.testing.assert_array_equal(layers, got)

    def test_rows_are_relative_to_their_sum(self):
        # Two equal entries (log 2); no attention (0); and tiny values in the ratio
        # 1 : 1 : 2, which is ¼, ¼, ½ (1.5 log 2).
        attention = np.array([[2.5, 2.5, 0], [0, 0, 0], [1e-30, 1e-30, 2e-30]])
        wanted = [np.log(2), 0, 1.5 * np.log(2)]
        assert_close(qm.attention_entropy(attention), wanted)

    def test_masked_rows_are_relative_to_their_remaining_sum(self):
        # Without the third column two equal values are left: entropy log 2.
        attention = np.tile([0.05, 0.05, 0.9], (3, 1))
        got = qm.attention_entropy(attention, mask=np.array([True, True, False]))
        assert_close(got, [np.log(2), np.log(2), 0])

    def test_entropy_is_never_negative(self, rng, dtype):
        """Rounding could make the entropy of a row with one entry, 0, negative."""
        attention = np.diag(rng.uniform(0.1, 5, 300)).astype(dtype)
        got = qm.attention_entropy(attention)
        assert_close(got, np.zeros(300), "float32")
        assert (got >= 0).all()

    # Leading axes: none, (B), (B, H) and (L, B, H)
    @pytest.mark.parametrize("leading", [(), (2,), (2, 3), (3, 2, 4)])
    def test_mask_has_the_result_of_removing_the_padding(self, rng, leading):
        attention = softmax(rng.standard_normal((*leading, 6, 6)))
        mask = np.ones((2, 6) if leading else 6, bool)
        mask[..., 4:] = False
        # The last two of six tokens are padding: the upper left 4 × 4 part remains.
        got = qm.attention_entropy(attention, mask=mask)
        assert_close(got[..., :4], qm.attention_entropy(attention[..., :4, :4]))
        assert not got[..., 4:].any()

    def test_negative_is_refused(self):
        with pytest.raises(ValueError, match=r"`attention` must be ≥ 0, got -0.5 at"):
            qm.attention_entropy(np.array([[1.5, -0.5], [0.5, 0.5]]))

    def test_not_square_is_refused(self):
        with pytest.raises(ValueError, match=r"`attention` must have shape .*\(3, 3\)"):
            qm.attention_entropy(np.ones((3, 2)))
