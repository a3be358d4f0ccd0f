"""The kernels of `norm_mass`, interpreted."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, mask_of, masked, random, sizes, valid_of

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_norm_mass(dtype, num_tokens, masked):
    batch, dim, num_groups = 3, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[2] = 0
    each = np.array([num_groups, 1, num_groups])
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    norms = np.where(valid_of(mask, norms.shape), norms, 0)
    for counts in (num_groups, each):
        got = qm.norm_mass(tokens, counts, mask=mask)
        largest = -np.sort(-norms, axis=-1)
        kept = np.where(np.arange(num_tokens) < np.reshape(counts, (-1, 1)), largest, 0)
        total = norms.sum(-1)
        wanted = np.where(total > 0, kept.sum(-1) / np.where(total > 0, total, 1), 1)
        assert_close(got, wanted, dtype)
