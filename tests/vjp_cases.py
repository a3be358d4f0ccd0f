"""Helpers for the tests of gradient kernels, which compare with float64 references."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import random

import qm_cupy as qm

# N around the warp size of 32, and beyond one block; D below, at and above a warp.
VJP_SIZES, WIDTHS = [1, 31, 32, 33, 129, 257], [1, 7, 32, 130]

vjp_sizes = pytest.mark.parametrize("num_tokens", VJP_SIZES)


def wide(x):
    return x.astype(np.float64)


def assert_gradient(got, wanted, dtype, like=None):
    """Compare a gradient, of values of about 1, at the tolerance of its own dtype."""
    assert got.dtype == (dtype if like is None else like)
    assert got.flags.c_contiguous
    # A 16-bit gradient is rounded once when it is stored.
    column = "stored" if got.dtype.itemsize == 2 else "computed"
    assert_close(got, wanted, dtype, column)


def alignment_of(num_groups, dtype, dim=37, hidden_dim=50):
    """Return the gradients of the losses, merged tokens and a prior.

    The gradients are multiplied by `dim`, because the losses are means over it.
    """
    gradient = random((3, 3), np.float32, 5) * dim
    merged = random((3, num_groups, dim), dtype)
    return tuple(gradient), merged, qm.MLPPrior.init(dim, hidden_dim=hidden_dim)
