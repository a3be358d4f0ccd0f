"""The kernels of the gradient of `linear`, run by an interpreter on the CPU."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import random
from vjp_cases import alignment_of

import qm_cupy as qm
from qm_cupy.priors import linear

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
def test_weight_gradients_are_summed_in_parts_of_rows(monkeypatch):
    gradient, merged, prior = alignment_of(33, np.float64)
    whole = qm.alignment_loss_vjp(gradient, merged, prior)
    # 3 sequences of 33 tokens are 99 rows. In the first case, parts have at most 40
    # rows, which gives three parts of 33 rows. In the second case, there are at most
    # two parts, of 50 rows. Both numbers of rows are rounded up to 64, a multiple of
    # 32.
    for rows, max_parts in ((40, 32), (7, 2)):
        monkeypatch.setattr(linear, "_PART_ROWS", rows)
        monkeypatch.setattr(linear, "_MAX_PARTS", max_parts)
        parts = qm.alignment_loss_vjp(gradient, merged, prior)
        # Only gradients of weights are sums over rows. Gradients of tokens have the
        # same bits.
        np.testing.assert_array_equal(parts[0], whole[0])
        for mlp, other in zip(parts[1], whole[1], strict=True):
            for x, y in zip(mlp, other, strict=True):
                assert_close(x, y)


@pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
def test_gradients_with_tf32_are_within_its_tolerance():
    """The layer has no ReLU, because rounding to TF32 could change its signs."""
    x, weight = random((99, 37), np.float32), random((50, 37), np.float32, 1)
    gradient = random((99, 50), np.float32, 2) / 99
    plain = linear.linear_vjp_cuda(gradient, x, weight)
    with qm.allow_tf32():
        got = linear.linear_vjp_cuda(gradient, x, weight)
    for y, z in zip(got[:2], plain[:2], strict=True):
        assert_close(y, z, "tf32")
        assert (y != z).any()  # otherwise TF32 was not used
    np.testing.assert_array_equal(got[2], plain[2])  # db is a sum without products
