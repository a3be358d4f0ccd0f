import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


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
        # The mean of scaled heads would differ from the scaled mean of heads.
        entropy = rng.random((3, 2, 4, 7))  # (L, B, H, N)
        assert_close(qm.saliency(entropy), qm.saliency(entropy.mean(axis=2)))

    def test_constant_row(self):
        # A constant row normalises to 0, which "low" turns into 1 - 0.
        assert_close(qm.saliency(np.full(4, 2.0)), np.ones(4))
        assert_close(qm.saliency(np.full(4, 2.0), salient="high"), np.zeros(4))

    def test_padding_sets_no_extreme(self):
        # y = (5 - 1)/4, 0/4, 1/4 for the three tokens; -9 and 99 are padding.
        entropy = np.array([[5.0, 1.0, 2.0, -9.0, 99.0]])
        mask = np.array([[True, True, True, False, False]])
        assert_close(qm.saliency(entropy, mask=mask), [[0, 1, 0.75, 0, 0]])

    def test_unknown_word(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency(np.ones(3), salient="mid")
