import numpy as np
import oracle
import oracle_arrays
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestCosineSimilarity:
    def test_more_rows_than_one_product_computes(self, rng):
        tokens = rng.standard_normal((4100, 3))
        got = qm.cosine_similarity(tokens)
        assert np.array_equal(got, got.T)  # bit for bit
        unit = oracle_arrays.unit(tokens)
        # One product computes 2048 rows. These are the first and last rows of the three
        # products.
        for row in (0, 2047, 2048, 4095, 4096, 4099):
            np.testing.assert_allclose(got[row], unit @ unit[row], atol=1e-14)

    def test_oracle(self, rng, dtype):
        tokens = rng.standard_normal((2, 9, 5)).astype(dtype)
        tokens[0, 3] = 0  # cosine 0 with all tokens, itself included
        got = qm.cosine_similarity(tokens)
        assert got.dtype == np.result_type(dtype, np.float32)
        for b in range(2):
            assert_close(got[b], oracle.cosine_similarity(tokens[b]), dtype)

    def test_matrix_is_exactly_symmetric_with_ones_on_the_diagonal(self, rng):
        tokens = rng.standard_normal((130, 65)).astype(np.float32)
        got = qm.cosine_similarity(tokens)
        np.testing.assert_array_equal(got, got.T)
        np.testing.assert_array_equal(np.diagonal(got), np.ones(130))

    # In float32, the square of 1e30 overflows, and the square of 1e-30 is 0.
    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_squares_of_large_and_small_tokens_do_not_overflow(self, rng, scale):
        tokens = rng.standard_normal((5, 4))
        scaled = (tokens * scale).astype(np.float32)
        assert_close(qm.cosine_similarity(scaled), qm.cosine_similarity(tokens), "f4")
