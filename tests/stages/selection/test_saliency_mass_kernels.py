"""The kernels of the gradient of `saliency_mass`.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). s is the saliency, π the selection probabilities, ε the weight
of background tokens, m = π s + (1 - π) ε the mass, and a bar the gradient of a loss
with respect to the quantity.
"""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
from vjp_cases import assert_gradient, vjp_sizes, wide

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@vjp_sizes
def test_saliency_mass_vjp(dtype, num_tokens):
    gradient, saliency = (random((2, num_tokens), dtype, seed) for seed in (1, 2))
    # Here s and m̄ have the dtype of the test, and π has float32.
    p = random((2, num_tokens), np.float32, 3)
    # s̄ = m̄ π in the dtype of s, and π̄ = m̄ (s - ε) in float32, the dtype of π
    got = qm.saliency_mass_vjp(gradient, saliency, p, epsilon=0.3)
    assert_gradient(got[0], wide(gradient) * wide(p), dtype)
    p_gradient = wide(gradient) * (wide(saliency) - 0.3)
    assert got[1].dtype == np.float32
    assert_close(got[1], p_gradient, np.float32)
