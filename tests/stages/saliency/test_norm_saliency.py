import numpy as np
import oracle
from conftest import assert_close

import qm_cupy as qm


class TestNormSaliency:
    def test_oracle(self, rng, dtype):
        tokens = rng.standard_normal((9, 5)).astype(dtype)
        assert_close(qm.norm_saliency(tokens), oracle.norm_saliency(tokens), dtype)

    def test_mask(self):
        # Norms 3, 1 and 2 scale to 1, 0 and ½. The padded 50 is not the maximum.
        tokens = np.array([[[3.0], [1.0], [2.0], [50.0]]])
        mask = np.array([[True, True, True, False]])
        assert_close(qm.norm_saliency(tokens, mask=mask), [[1, 0, 0.5, 0]])
