"""`unmerge_tokens`: every token gets the value of its group."""

import numpy as np
import pytest

import qm_cupy as qm


@pytest.fixture
def problem(rng):
    """Return tokens (2, 20, 5), labels (2, 20) of 6 groups, and mass (2, 20)."""
    tokens = rng.standard_normal((2, 20, 5))
    labels = qm.cluster_tokens(tokens, 6)
    return tokens, labels, rng.random((2, 20))


def test_every_token_gets_the_row_of_its_group(problem, dtype):
    _, labels, _ = problem
    merged = np.arange(60, dtype=dtype).reshape(2, 6, 5)
    got = qm.unmerge_tokens(merged, labels)
    assert got.dtype == dtype
    for b in range(2):
        # These labels have no padding, so they can index the merged tokens.
        np.testing.assert_array_equal(got[b], merged[b][labels[b]])
