"""The kernels of `attention_entropy` and of its gradient, interpreted."""

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close
from entropy_vjp_cases import allowed_pairs, gradient_of, valid_tokens, vjp_sizes
from kernel_cases import allowed_of, dtypes, mask_of, masked, random, sizes

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
    a[..., ::3] = 0
    a[0, ..., -1, :] = 0  # a row without attention
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]  # the others' sum is any
    a = a.astype(dtype)
    got = qm.attention_entropy(a, mask=mask)
    a = np.where(allowed_of(mask, num_tokens)[:, None], a.astype(np.float64), 0)
    p = a / np.maximum(a.sum(-1, keepdims=True), 1e-300)
    wanted = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    assert_close(got, wanted, dtype)
    assert got.min() >= 0


@dtypes
@vjp_sizes
@masked
def test_attention_entropy_vjp(dtype, num_tokens, masked):
    leading = (2, 2, 2)
    mask = mask_of(2, num_tokens, masked)
    valid = valid_tokens(mask, leading, num_tokens)
    a = np.exp(random((*leading, num_tokens, num_tokens), np.float64, scale=2))
    a[..., ::3] = 0
    a[0, ..., -1, :] = 0  # a row without attention
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]  # the others' sum is any
    a = a.astype(dtype)
    gradient = gradient_of(valid, dtype)
    got = qm.attention_entropy_vjp(gradient, a, mask=mask)
    assert got.dtype == dtype
    a = np.where(allowed_pairs(valid), a, 0).astype(np.float64)
    total = np.maximum(a.sum(-1, keepdims=True), 1e-300)
    log_p = np.log(np.where(a > 0, a / total, 1))
    entropy = -(a / total * log_p).sum(-1, keepdims=True)
    g = np.where(valid, gradient, 0).astype(np.float64)[..., None]
    wanted = np.where(a > 0, -g * (log_p + entropy) / total, 0)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    share = max(tolerance.stored, tolerance.computed)
    size = np.where(a > 0, abs(g) * (abs(log_p) + entropy) / total, 0)
    assert (abs(got.astype(np.float64) - wanted) <= share * size + 1e-7).all()
    assert not got[a == 0].any()
