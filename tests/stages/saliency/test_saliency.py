"""`saliency` compared with the oracle, and its ranges, heads and masks.

Entropies (L, B, H, N) of each layer, averaged over the heads, are scaled to y in [0, 1]
over the tokens of a sequence. The saliency is 1 minus the mean of y over the layers
("low"), or the mean itself ("high"). The oracle (oracle.py) has plain float64 loops.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestSaliency:
    def test_matches_the_oracle(self, rng, dtype):
        entropy = rng.random((3, 2, 1, 7)).astype(dtype)  # (L, B, H, N)
        for salient in ("low", "high"):
            got = qm.saliency(entropy, salient=salient)
            assert got.shape == (2, 7)
            for b in range(2):
                wanted = oracle.saliency(entropy[:, b, 0].astype(float), salient)
                assert_close(got[b], wanted, dtype)

    def test_heads_are_averaged_before_the_scaling(self, rng):
        # The mean of scaled heads would differ from the scaled mean of the heads.
        entropy = rng.random((3, 2, 4, 7))  # (L, B, H, N)
        means = entropy.mean(axis=2, keepdims=True)
        assert_close(qm.saliency(entropy), qm.saliency(means))
        # One layer of heads
        assert_close(qm.saliency(entropy[1]), qm.saliency(means[1, :, 0]))

    def test_equal_entropies(self):
        # A constant row is scaled to 0. With "low" the saliency is 1 - 0.
        assert_close(qm.saliency(np.full(4, 2.0)), np.ones(4))
        assert_close(qm.saliency(np.full(4, 2.0), salient="high"), np.zeros(4))

    def test_padding_does_not_count_for_the_range(self):
        # The three tokens have y = (5 - 1)/4, 0/4, 1/4, so the saliency 1 - y is 0, 1,
        # ¾. -9 and 99 are padding.
        entropy = np.array([[5.0, 1.0, 2.0, -9.0, 99.0]])
        mask = np.array([[True, True, True, False, False]])
        assert_close(qm.saliency(entropy, mask=mask), [[0, 1, 0.75, 0, 0]])

    def test_padding_of_any_size_is_zero(self):
        # Scaled by w = 1e-30, padding of 1e30 overflows: inf · 0 would be NaN.
        entropy = np.array([1e-30, 2e-30, 1e30], np.float32)
        mask = np.array([True, True, False])
        for salient, wanted in (("low", [1, 0, 0]), ("high", [0, 1, 0])):
            actual = qm.saliency(entropy, mask=mask, salient=salient)
            np.testing.assert_array_equal(actual, wanted)

    def test_unknown_salient_is_refused(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency(np.ones(3), salient="mid")
