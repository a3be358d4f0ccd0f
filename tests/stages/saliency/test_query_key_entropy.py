"""`query_key_entropy` compared with the oracle, and its masks and checks.

The oracle (oracle.py) computes one head of N tokens with plain float64 loops.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestQueryKeyEntropy:
    @pytest.mark.parametrize("causal", [False, True])
    # 300 tokens are more than one block of 256 rows.
    @pytest.mark.parametrize("num_tokens", [1, 33, 300])
    def test_matches_the_oracle(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        wanted = oracle.query_key_entropy(query, key, causal=causal)
        got = qm.query_key_entropy(query, key, causal=causal)
        assert got.dtype == np.result_type(dtype, np.float32)
        assert_close(got, wanted, dtype)

    def test_scale_multiplies_the_scores(self, rng):
        query, key = rng.standard_normal((2, 9, 4))
        wanted = oracle.query_key_entropy(query, key, scale=2.5)
        assert_close(qm.query_key_entropy(query, key, scale=2.5), wanted)

    @pytest.mark.parametrize("causal", [False, True])
    def test_mask_has_the_result_of_removing_the_padding(self, rng, causal):
        query, key = rng.standard_normal((2, 3, 2, 4, 8, 5))  # each (L, B, H, N, d)
        mask = np.ones((2, 8), bool)
        mask[0, [0, 3, 4]] = False  # padding in front and in between
        got = qm.query_key_entropy(query, key, causal=causal, mask=mask)
        assert got.shape == (3, 2, 4, 8)
        for b in range(2):
            # The same tokens without the padding, in the same order
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
