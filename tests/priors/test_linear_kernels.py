"""The kernels of `linear` and of its gradient, run by an interpreter on the CPU."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
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


def wanted_of(x, weight, bias, norm, residual):
    """Return silu(norm(x) Wᵀ + b) + residual in float64."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if norm is not None:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.epsilon)
        x = x / scale * norm.weight.astype(np.float64)
    y = x @ weight.T
    if bias is not None:
        y = y + bias.astype(np.float64)
    y = y / (1 + np.exp(-y))
    return y if residual is None else y + residual.astype(np.float64)


# 3 rows are computed by `linear_few`, with the norm; 33 and 129 rows by tiles.
@dtypes
@pytest.mark.parametrize("rows", [3, 33, 129])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_silu_and_an_absent_bias(dtype, rows, has_bias):
    x, weight = random((rows, 37), dtype), random((50, 37), dtype, 1)
    bias = random((50,), dtype, 2) if has_bias else None
    residual = random((rows, 50), dtype, 3)
    # A large ε, so that a launcher that passes its own default fails.
    norm = linear.Norm(random((37,), dtype, 4), None, 0.5)
    cases = [{}, {"residual": residual}, {"norm": norm, "residual": residual}]
    # The basic kernels round normalized rows to the dtype of the input, and the sums of
    # a product have the errors of 37 of them.
    half = np.dtype(dtype).itemsize == 2
    for options in cases[: 2 if half else 3]:
        got = linear.linear(x, weight, bias, activation="silu", **options)
        args = options.get("norm"), options.get("residual")
        wanted = wanted_of(x, weight, bias, *args)
        assert_close(got, wanted, dtype, "stored" if half else "computed")


def test_silu_of_large_inputs_is_finite():
    """The exponential of a large negative input overflows, and the result is 0."""
    x = np.array([[-200.0], [-90.0], [0.0], [200.0]], np.float32)
    weight = np.ones((1, 1), np.float32)
    got = linear.linear(x, weight, None, activation="silu")
    np.testing.assert_allclose(got, [[0.0], [0.0], [0.0], [200.0]], atol=1e-30)
