"""The kernels of `cosine_similarity`, run by an interpreter on the CPU."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random, sizes
from oracle_arrays import cosine

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
def test_cosine_similarity(dtype, num_tokens):
    # Rows of 37 entries are not a whole number of 16-byte vectors, so not all rows are
    # aligned.
    tokens = random((2, num_tokens, 32 if num_tokens % 2 == 0 else 37), dtype)
    tokens[:, num_tokens // 2] = 0
    got = qm.cosine_similarity(tokens)
    assert_close(got, cosine(tokens, tokens), dtype)
    # The matrix must be exactly symmetric, because linkage reads both halves.
    np.testing.assert_array_equal(got, np.swapaxes(got, 1, 2))


@dtypes
def test_cosines_of_a_nan_token_are_nan(dtype):
    """GPU inputs are not checked. Linkage recognises a NaN token by its NaN cosines."""
    tokens = random((2, 33, 9), dtype)
    tokens[0, 5] = np.nan
    is_nan = np.zeros((2, 33, 33), np.bool_)
    is_nan[0, 5] = is_nan[0, :, 5] = True
    np.testing.assert_array_equal(np.isnan(qm.cosine_similarity(tokens)), is_nan)
