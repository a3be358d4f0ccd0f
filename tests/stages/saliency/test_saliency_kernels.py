"""The kernels of `saliency` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are from float64 loops and formulas
(oracle.py, oracle_arrays.py).
"""

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close
from entropy_vjp_cases import gradient_of, vjp_sizes
from kernel_cases import dtypes, mask_of, masked, random, sizes, valid_of
from oracle_arrays import saliency_vjp
from saliency_cases import saliency_of

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_saliency(dtype, num_tokens, masked):
    layers, batch, heads = 3, 2, 2
    mask = mask_of(batch, num_tokens, masked)
    entropy = abs(random((layers, batch, heads, num_tokens), dtype))
    entropy[1] = 2  # a constant layer normalises to 0
    valid = valid_of(mask, (batch, num_tokens))
    for salient in ("low", "high"):
        got = qm.saliency(entropy, salient=salient, mask=mask)
        assert_close(got, saliency_of(entropy, valid, salient), dtype)


@dtypes
@vjp_sizes
@masked
def test_saliency_vjp(dtype, num_tokens, masked):
    layers, batch, heads = 3, 2, 2
    mask = mask_of(batch, num_tokens, masked)
    # Multiples of 1/16 have exact means, so that some tokens tie at the least and at
    # the greatest entropy.
    entropy = np.random.default_rng(2).integers(
        0, 8, (layers, batch, heads, num_tokens)
    )
    entropy = (entropy / 16).astype(dtype)
    entropy[1] = 2  # a constant layer has gradient 0
    valid = valid_of(mask, (batch, num_tokens))
    gradient = gradient_of(valid, np.float32)
    # `gradient` is NaN for padding; the formula needs 0 there.
    g = np.where(valid, gradient, 0).astype(np.float64)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    limit = max(tolerance.stored, tolerance.computed)
    for salient in ("low", "high"):
        options = {"salient": salient, "mask": mask}
        got = qm.saliency_vjp(gradient, entropy, **options)
        assert got.dtype == dtype
        wanted = saliency_vjp(g, entropy, valid, salient)
        np.testing.assert_allclose(
            got.astype(np.float64), wanted, rtol=limit, atol=limit * abs(wanted).max()
        )
