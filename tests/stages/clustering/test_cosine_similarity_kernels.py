"""The kernels of `cosine_similarity`, interpreted."""

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
    # 37 is not a multiple of a vector, so rows are not aligned.
    tokens = random((2, num_tokens, 32 if num_tokens % 2 == 0 else 37), dtype)
    tokens[:, num_tokens // 2] = 0
    got = qm.cosine_similarity(tokens)
    assert_close(got, cosine(tokens, tokens), dtype)
    # Exactly symmetric: linkage reads either half.
    np.testing.assert_array_equal(got, np.swapaxes(got, 1, 2))


@dtypes
def test_cosine_similarity_of_what_is_not_a_number(dtype):
    """GPU inputs are not checked: NaN cosines let linkage leave such a token alone."""
    tokens = random((2, 33, 9), dtype)
    tokens[0, 5] = np.nan
    bad = np.zeros((2, 33, 33), np.bool_)
    bad[0, 5] = bad[0, :, 5] = True
    np.testing.assert_array_equal(np.isnan(qm.cosine_similarity(tokens)), bad)
