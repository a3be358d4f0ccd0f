"""The kernels of `attention_entropy` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 loops and formulas
(oracle.py, oracle_arrays.py). a is a row of attention, p = a / Σ a.
"""

import numpy as np
import oracle
import pytest
from conftest import TOLERANCE, assert_close
from entropy_vjp_cases import gradient_of, vjp_sizes
from kernel_cases import allowed_of, dtypes, mask_of, masked, random, sizes, valid_of
from oracle_arrays import attention_entropy_vjp

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_attention_entropy(dtype, num_tokens, masked):
    layers, batch, heads = 2, 3, 2
    mask = mask_of(batch, num_tokens, masked)
    shape = (layers, batch, heads, num_tokens, num_tokens)
    a = np.exp(random(shape, np.float64, scale=2))
    a[..., ::3] = 0  # 0 log 0 = 0
    a[0, ..., -1, :] = 0  # a row without attention
    # Rows of layer 1 have the sum 1; rows of layer 0 have any sum.
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]
    a = a.astype(dtype)
    got = qm.attention_entropy(a, mask=mask)
    valid = valid_of(mask, shape[:-1])  # (L, B, H, N)
    # Padded rows and columns count as 0. The lower limit avoids 0 / 0 in empty rows.
    a = np.where(allowed_of(valid), a.astype(np.float64), 0)
    p = a / np.maximum(a.sum(-1, keepdims=True), 1e-300)
    for index in np.ndindex(shape[:3]):
        assert_close(got[index], oracle.attention_entropy(p[index]), dtype)
    assert got.min() >= 0


@dtypes
@vjp_sizes
@masked
def test_attention_entropy_vjp(dtype, num_tokens, masked):
    leading = (2, 2, 2)  # L, B, H
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, (*leading, num_tokens))
    a = np.exp(random((*leading, num_tokens, num_tokens), np.float64, scale=2))
    a[..., ::3] = 0  # 0 log 0 = 0
    a[0, ..., -1, :] = 0  # a row without attention
    # Rows of layer 1 have the sum 1; rows of layer 0 have any sum.
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]
    a = a.astype(dtype)
    gradient = gradient_of(valid, dtype)
    got = qm.attention_entropy_vjp(gradient, a, mask=mask)
    assert got.dtype == dtype
    a = np.where(allowed_of(valid), a, 0)
    # `size` is the sum of the magnitudes of the terms of each entry, which may cancel.
    wanted, size = attention_entropy_vjp(np.where(valid, gradient, 0), a)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    relative = max(tolerance.stored, tolerance.computed)
    # 1e-7 allows for the smallest steps of float16, about 6e-8.
    assert (abs(got.astype(np.float64) - wanted) <= relative * size + 1e-7).all()
    # The derivative at a = 0 is infinite; the library defines the gradient as 0 there.
    assert not got[a == 0].any()
