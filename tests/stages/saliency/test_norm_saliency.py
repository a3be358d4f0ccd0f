"""`norm_saliency`: the L2 norms of the tokens of a sequence, scaled to [0, 1].

The oracle (oracle.py) computes the same formula with plain float64 loops.
"""

import numpy as np
import oracle
from conftest import assert_close

import qm_cupy as qm


class TestNormSaliency:
    def test_matches_the_oracle(self, rng, dtype):
        tokens = rng.standard_normal((9, 5)).astype(dtype)
        assert_close(qm.norm_saliency(tokens), oracle.norm_saliency(tokens), dtype)

    def test_padding_does_not_count_for_the_range(self):
        # Norms 3, 1 and 2 scale to 1, 0 and ½. The token with norm 50 is padding, so 50
        # is not the maximum.
        tokens = np.array([[[3.0], [1.0], [2.0], [50.0]]])
        mask = np.array([[True, True, True, False]])
        assert_close(qm.norm_saliency(tokens, mask=mask), [[1, 0, 0.5, 0]])
