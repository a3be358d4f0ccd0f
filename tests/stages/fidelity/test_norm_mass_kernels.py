"""The kernels of `norm_mass`, run by an interpreter on the CPU."""

import numpy as np
import oracle
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
    tokens[2] = 0  # norm mass 1, with no mass to divide by
    ragged = np.array([num_groups, 1, num_groups])
    valid = valid_of(mask, (batch, num_tokens))
    # If K is the same for all sequences, the kernel gets a null pointer, otherwise an
    # array.
    for counts in (num_groups, ragged):
        got = qm.norm_mass(tokens, counts, mask=mask)
        per_sequence = np.broadcast_to(counts, batch)
        sequences = zip(tokens, valid, per_sequence, strict=True)
        wanted = [oracle.norm_mass(x[own], count) for x, own, count in sequences]
        assert_close(got, wanted, dtype)
