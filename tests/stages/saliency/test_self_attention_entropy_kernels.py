"""The kernels of `self_attention_entropy` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 formulas
(oracle_arrays.py). s are the scores of the tokens X (N, D) with themselves, c = 1/√D
their scale, and G the gradient of the loss with respect to the scores.
"""

import numpy as np
import pytest
from conftest import assert_close
from entropy_vjp_cases import WIDTHS, check_product, gradient_of, transposed, vjp_sizes
from kernel_cases import allowed_of, dtypes, mask_of, masked, random, sizes, valid_of
from oracle_arrays import softmax_entropy, softmax_entropy_vjp

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_self_attention_entropy(dtype, num_tokens, masked):
    # A width D of whole steps of a tile, an odd one, and one of whole 16-byte vectors
    batch, dim = 2, (32, 37, 40)[num_tokens % 3]
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    got = qm.self_attention_entropy(tokens, mask=mask)
    x = tokens.astype(np.float64)
    scores = x @ np.swapaxes(x, -1, -2) / np.sqrt(dim)
    allowed = allowed_of(valid_of(mask, (batch, num_tokens)))
    assert_close(got, softmax_entropy(scores, allowed), dtype)


@dtypes
def test_self_attention_entropy_where_one_score_dominates(dtype):
    tokens = random((1, 1, 129, 1024), dtype)  # a head of one sequence
    got = qm.self_attention_entropy(tokens)
    x = tokens.astype(np.float64)
    scores = x @ np.swapaxes(x, -1, -2) / 32  # √1024
    wanted = softmax_entropy(scores, np.ones(scores.shape, dtype=bool))
    assert wanted.max() < 1e-7
    # The scores are about 32. So e^(s - m) has 32 times the relative rounding error of
    # s.
    tolerance = 1e-9 if dtype == np.float64 else 2e-4
    np.testing.assert_allclose(got, wanted, rtol=tolerance)


@dtypes
@vjp_sizes
@masked
def test_self_attention_entropy_vjp(dtype, num_tokens, masked):
    dim = WIDTHS[num_tokens]
    mask = mask_of(2, num_tokens, masked)
    valid = valid_of(mask, (2, num_tokens))
    tokens = random((2, num_tokens, dim), dtype, scale=0.9)
    tokens[~valid] = np.nan  # padding must not be read
    gradient = gradient_of(valid, np.float32)
    got = qm.self_attention_entropy_vjp(gradient, tokens, mask=mask)
    x = np.where(valid[..., None], tokens, 0).astype(np.float64)
    scale = dim**-0.5
    # G, and the magnitudes of the terms of its entries
    parts = softmax_entropy_vjp(gradient, x @ transposed(x) * scale, allowed_of(valid))
    # c (G + Gᵀ), because a token is a query and a key
    matrix, terms = (scale * (y + transposed(y)) for y in parts)
    check_product(got, matrix, terms, x, dtype)


@dtypes
def test_self_attention_entropy_vjp_where_one_score_dominates(dtype):
    """Wide tokens attend almost only to themselves, so the gradient is tiny."""
    tokens = random((1, 1, 130, 256), dtype, scale=1.2)  # a head of one sequence
    gradient = random((1, 1, 130), np.float32, 3)
    got = qm.self_attention_entropy_vjp(gradient, tokens)
    x = tokens.astype(np.float64)
    allowed = np.ones((130, 130), np.bool_)
    g, _ = softmax_entropy_vjp(gradient, x @ transposed(x) / 16, allowed)  # √256 = 16
    wanted = (g + transposed(g)) @ x / 16
    size = np.linalg.norm(wanted, axis=-1)
    assert size.max() < 1e-3
    error = np.linalg.norm(got.astype(np.float64) - wanted, axis=-1)
    tolerances = {2: 1e-2, 4: 5e-4, 8: 1e-9}  # by bytes of the dtype
    absolute = 1e-6 if dtype == np.float16 else 0  # float16 has few bits below 1e-6
    relative = tolerances[np.dtype(dtype).itemsize]
    assert (error <= relative * size.max() + absolute).all()
