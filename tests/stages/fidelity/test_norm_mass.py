"""Norm mass: against the oracle, and for zeros and padding."""

import numpy as np
import oracle
from conftest import assert_close

import qm_cupy as qm


def test_norm_mass_against_the_oracle(rng, dtype):
    tokens = rng.standard_normal((3, 10, 4)).astype(dtype)
    got = qm.norm_mass(tokens, np.array([1, 4, 10]))
    assert got.dtype == np.result_type(dtype, np.float32)
    wanted = [oracle.norm_mass(x, k) for x, k in zip(tokens, (1, 4, 10), strict=True)]
    assert_close(got, wanted, dtype)


def test_norm_mass_of_zeros_and_with_padding():
    assert qm.norm_mass(np.zeros((4, 2)), 1) == 1  # there is no mass to lose
    mask = np.array([True, True, False])
    # 3 / (1 + 3): the padded token of norm 99 does not count.
    assert qm.norm_mass(np.array([[1.0], [3.0], [99.0]]), 1, mask=mask) == 0.75
