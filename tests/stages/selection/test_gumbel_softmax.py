"""`gumbel_softmax`: probabilities and K-hot masks, ties, temperatures and padding.

s is the saliency, g the Gumbel noise and τ the temperature: π = softmax((s + g) / τ).
The oracle (oracle.py) computes one sequence with plain float64 loops.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestGumbelSoftmax:
    def test_probabilities_match_the_oracle(self, rng, dtype):
        saliency = rng.random((2, 12)).astype(dtype)
        noise = qm.gumbel_noise((2, 12), seed=5)
        got = qm.gumbel_softmax(saliency, temperature=0.7, seed=5)
        for b in range(2):
            wanted = oracle.gumbel_softmax(saliency[b], noise[b], 0.7)
            assert_close(got[b], wanted, dtype)

    def test_k_hot_mask_matches_the_oracle(self, rng):
        saliency = rng.random((2, 12))
        noise = qm.gumbel_noise((2, 12), seed=5)
        got = qm.gumbel_softmax(saliency, seed=5, hard=4)
        for b in range(2):
            np.testing.assert_array_equal(
                got[b], oracle.top_k_mask(saliency[b] + noise[b], 4)
            )

    def test_lower_index_wins_a_tie(self):
        # Three tokens have the highest score; the first two are selected.
        got = qm.gumbel_softmax(np.array([0.5, 1, 1, 0.5, 1]), seed=None, hard=2)
        np.testing.assert_array_equal(got, [0, 1, 1, 0, 0])

    def test_lower_index_wins_many_ties(self, rng):
        """An unstable sort may keep the order of few elements, but not of 500."""
        saliency = rng.integers(0, 3, (2, 500)).astype(float)
        got = qm.gumbel_softmax(saliency, seed=None, hard=200)
        for b in range(2):
            np.testing.assert_array_equal(got[b], oracle.top_k_mask(saliency[b], 200))

    @pytest.mark.parametrize("temperature", [1e-45, 1e-46, 5e-324])
    def test_tiny_temperature_gives_the_one_hot_mask(self, rng, dtype, temperature):
        saliency = rng.random(9).astype(dtype)
        # The limit τ → 0 is 1 for the highest score. A temperature that rounds to 0
        # would give NaN from 0 / 0.
        got = qm.gumbel_softmax(saliency, temperature=temperature)
        np.testing.assert_array_equal(got, qm.gumbel_softmax(saliency, hard=1))

    @pytest.mark.parametrize("temperature", [1e46, 1e308])
    def test_huge_temperature_gives_equal_probabilities(self, rng, dtype, temperature):
        # The limit τ → ∞ is the uniform distribution.
        got = qm.gumbel_softmax(rng.random(8).astype(dtype), temperature=temperature)
        np.testing.assert_array_equal(got, np.full(8, 1 / 8))

    @pytest.mark.parametrize("hard", [None, 3])
    def test_mask_has_the_result_of_removing_the_padding(self, rng, hard):
        """The n-th token of a sequence gets draw n, for any position of the padding."""
        saliency, mask = rng.random((4, 20)), rng.random((4, 20)) < 0.6
        mask[0] = np.arange(20) >= 8  # padding on the left
        got = qm.gumbel_softmax(saliency, seed=5, hard=hard, mask=mask)
        assert not got[~mask].any()
        for b in range(4):
            # Pass only the tokens of sequence b, without the padding. With
            # `sequence_offset=b` they get the noise of sequence b.
            unpadded = qm.gumbel_softmax(
                saliency[b, mask[b]], seed=5, hard=hard, sequence_offset=b
            )
            assert_close(got[b, mask[b]], unpadded)

    def test_mask_and_k_of_each_sequence(self, rng):
        saliency = rng.random((2, 6))
        mask = np.array([[True] * 6, [True, False, True, True, False, False]])
        soft = qm.gumbel_softmax(saliency, mask=mask)
        assert_close(soft.sum(axis=-1), [1, 1])
        assert not soft[~mask].any()
        hard = qm.gumbel_softmax(saliency, hard=np.array([4, 3]), mask=mask)
        np.testing.assert_array_equal(hard.sum(axis=-1), [4, 3])
        assert not hard[~mask].any()

    @pytest.mark.parametrize("temperature", [0, -1, np.inf, np.nan])
    def test_temperature_out_of_range_is_refused(self, temperature):
        with pytest.raises(ValueError, match="`temperature` must lie in"):
            qm.gumbel_softmax(np.ones(3), temperature=temperature)

    def test_k_above_the_number_of_unpadded_tokens_is_refused(self):
        # Sequence 1 has one token, so K = 2 is too large for it.
        mask = np.array([[True, True, True], [True, False, False]])
        with pytest.raises(ValueError, match=r"`hard` must lie in 1\.\.1.*sequence 1"):
            qm.gumbel_softmax(np.ones((2, 3)), hard=2, mask=mask)
