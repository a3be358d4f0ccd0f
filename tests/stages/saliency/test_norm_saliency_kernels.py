"""The kernels of `norm_saliency` and its gradient, run by the interpreter."""

import numpy as np
import oracle
import pytest
from conftest import TOLERANCE, assert_close
from entropy_vjp_cases import gradient_of, vjp_sizes
from kernel_cases import dtypes, mask_of, masked, random, sizes, valid_of
from oracle_arrays import saliency_vjp

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_norm_saliency(dtype, num_tokens, masked):
    batch, dim = 2, 37  # rows that are not whole vectors of 16 bytes
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    valid = valid_of(mask, (batch, num_tokens))
    tokens[~valid] = np.nan  # padding must not be read
    wanted = np.zeros(valid.shape)
    for b, own in enumerate(valid):
        if own.any():
            wanted[b, own] = oracle.norm_saliency(tokens[b, own])
    assert_close(qm.norm_saliency(tokens, mask=mask), wanted, dtype)


@dtypes
@vjp_sizes
@masked
def test_norm_saliency_vjp(dtype, num_tokens, masked):
    batch, dim = 2, 37
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, num_tokens // 2] = 0  # a norm of 0 has no slope; its gradient is 0
    valid = valid_of(mask, (batch, num_tokens))
    tokens[~valid] = np.nan
    gradient = gradient_of(valid, dtype)
    got = qm.norm_saliency_vjp(gradient, tokens, mask=mask)
    assert got.dtype == dtype
    x = np.where(valid[..., None], tokens, 0).astype(np.float64)
    norms = np.linalg.norm(x, axis=-1)
    g = np.where(valid, gradient, 0).astype(np.float64)
    # ∂L/∂x = ∂L/∂n · x / n, with the norms as one layer of one head.
    slope = saliency_vjp(g, norms[None, :, None], valid, "high")[0, :, 0]
    wanted = (slope / np.where(norms > 0, norms, 1))[..., None] * x
    tolerance = TOLERANCE[np.dtype(dtype).name]
    limit = max(tolerance.stored, tolerance.computed)
    np.testing.assert_allclose(
        got.astype(np.float64), wanted, rtol=limit, atol=limit * abs(wanted).max()
    )
