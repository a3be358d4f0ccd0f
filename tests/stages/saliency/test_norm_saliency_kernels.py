"""The kernels of `norm_saliency` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 loops and formulas
(oracle.py, oracle_arrays.py). n is the norm of a token x, and ℒ the loss.
"""

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
    batch, dim = 2, 37  # a row of 37 is not a number of whole vectors of 16 bytes
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    valid = valid_of(mask, (batch, num_tokens))
    tokens[~valid] = np.nan  # padding must not be read
    wanted = np.zeros(valid.shape)
    for b, row in enumerate(valid):
        if row.any():  # the oracle needs at least one token
            wanted[b, row] = oracle.norm_saliency(tokens[b, row])
    assert_close(qm.norm_saliency(tokens, mask=mask), wanted, dtype)


@dtypes
@vjp_sizes
@masked
def test_norm_saliency_vjp(dtype, num_tokens, masked):
    batch, dim = 2, 37
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, num_tokens // 2] = 0  # the gradient of a token of norm 0 is 0
    valid = valid_of(mask, (batch, num_tokens))
    tokens[~valid] = np.nan  # padding must not be read
    gradient = gradient_of(valid, dtype)
    got = qm.norm_saliency_vjp(gradient, tokens, mask=mask)
    assert got.dtype == dtype
    x = np.where(valid[..., None], tokens, 0).astype(np.float64)
    norms = np.linalg.norm(x, axis=-1)
    g = np.where(valid, gradient, 0).astype(np.float64)
    # ∂ℒ/∂n is the gradient of min–max scaling, as for entropies (L, B, H, N) of one
    # layer and one head. ∂ℒ/∂x = ∂ℒ/∂n · x / n.
    norm_gradient = saliency_vjp(g, norms[None, :, None], valid, "high")[0, :, 0]
    wanted = (norm_gradient / np.where(norms > 0, norms, 1))[..., None] * x
    tolerance = TOLERANCE[np.dtype(dtype).name]
    limit = max(tolerance.stored, tolerance.computed)
    np.testing.assert_allclose(
        got.astype(np.float64), wanted, rtol=limit, atol=limit * abs(wanted).max()
    )
