"""The kernels of `attention_mass` and of its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx).
"""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
from vjp_cases import assert_gradient, vjp_sizes, wide

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")
leading = pytest.mark.parametrize("leading", [(2,), (2, 3), (3, 2, 4)])


def inputs_of(shape, dtype):
    return abs(random(shape, dtype, 1)), abs(random(shape, dtype, 2))


def means_of(x):
    """Return the mean (B, N) over layers and heads."""
    x = wide(x)
    x = x.mean(axis=-2) if x.ndim > 2 else x
    return x.mean(axis=0) if x.ndim > 2 else x


@dtypes
@leading
@vjp_sizes
def test_attention_mass(dtype, leading, num_tokens):
    received, entropy = inputs_of((*leading, num_tokens), dtype)
    mask = np.random.default_rng(4).random((2, num_tokens)) < 0.7
    wanted = means_of(received) * np.exp(-means_of(entropy))
    for options, count in (
        ({}, 1),
        ({"causal": True}, np.arange(1, num_tokens + 1)),
        ({"causal": True, "mask": mask}, mask.cumsum(axis=-1) * mask),
        ({"mask": mask}, mask),
    ):
        got = qm.attention_mass(received, entropy, **options)
        assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
        scale = np.maximum(count, 1)
        assert_close(got / scale, wanted * count / scale, dtype)


@dtypes
@leading
@vjp_sizes
def test_attention_mass_vjp(dtype, leading, num_tokens):
    shape = (*leading, num_tokens)
    received, entropy = inputs_of(shape, dtype)
    gradient = random((2, num_tokens), dtype, 3)
    got = qm.attention_mass_vjp(gradient, received, entropy)
    causal = qm.attention_mass_vjp(gradient, received, entropy, causal=True)
    visible = np.arange(1, num_tokens + 1)
    for x, y in zip(causal, got, strict=True):
        tolerance = {np.float64: 1e-13, np.float32: 1e-6}.get(dtype, 2e-2)
        np.testing.assert_allclose(
            wide(x) / visible, wide(y), rtol=tolerance, atol=tolerance / 10
        )
    count = received.size // (2 * num_tokens)  # L · H
    by_received = wide(gradient) * np.exp(-means_of(entropy)) / count
    by_entropy = -by_received * means_of(received)
    for x, wanted in zip(got, (by_received, by_entropy), strict=True):
        copies = wanted if len(leading) == 1 else wanted[:, None]
        assert_gradient(x, np.broadcast_to(copies, shape), dtype)
