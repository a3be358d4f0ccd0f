"""The kernels of `gumbel_softmax` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). With `@optimized`, it runs a test with optimized kernels only.
s is the saliency, g the Gumbel noise, z = s + g, τ the temperature, π = softmax(z / τ),
and ε the weight of background tokens in the mass m = π s + (1 - π) ε. A bar is the
gradient of a loss with respect to the quantity.
"""

import numpy as np
import oracle
import pytest
from conftest import TOLERANCE, assert_close
from kernel_cases import (
    dtypes,
    mask_of,
    masked,
    optimized,
    random,
    sizes,
    valid_of,
)
from oracle_arrays import softmax
from seam import cuda
from vjp_cases import assert_gradient, vjp_sizes, wide

import qm_cupy as qm
from qm_cupy.stages.selection.gumbel_softmax import softmax_mass_cuda

pytestmark = pytest.mark.usefixtures("kernels")

# Largest number of tokens of a sequence that a block can keep in registers
MAX_IN_REGISTERS = cuda.THREAD_TOKENS * cuda.SELECTION_THREADS


def noise_of(valid, seed, first=0):
    """Return the noise (B, N): the n-th valid token of a sequence gets draw n.

    `first` is the number of the first sequence.
    """
    out = np.zeros(valid.shape)
    for b, row in enumerate(valid):
        out[b, row] = oracle.gumbel_noise(row.sum(), seed, first + b)
    return out


@dtypes
@sizes
@masked
@pytest.mark.parametrize("seed", [None, 7])
def test_gumbel_softmax_and_mass(dtype, num_tokens, masked, seed, kernels):
    batch, first = 3, 2**32 - 2  # the number of the third sequence has 33 bits
    mask = mask_of(batch, num_tokens, masked)
    s = abs(random((batch, num_tokens), dtype))
    valid = valid_of(mask, s.shape)
    options = {"seed": seed, "mask": mask, "sequence_offset": first}
    got = qm.gumbel_softmax(s, temperature=0.1, **options)
    z = s.astype(np.float64)  # without noise, z = s
    if seed is not None:
        noise = [noise_of(valid[b : b + 1], seed, first + b) for b in range(batch)]
        z = z + np.concatenate(noise)
    wanted = softmax(z, valid, 0.1)  # over the tokens that are not padding
    assert_close(got, wanted, dtype)
    mass = qm.saliency_mass(s.astype(got.dtype), got, epsilon=0.01)
    p = got.astype(np.float64)
    assert_close(mass, p * s.astype(np.float64) + (1 - p) * 0.01, dtype)
    if kernels == "optimized":
        # One launch can compute both π and the mass.
        probabilities, fused_mass = softmax_mass_cuda(s, 0.1, (seed, first), 0.01, mask)
        np.testing.assert_array_equal(probabilities, got)
        np.testing.assert_allclose(fused_mass, np.where(valid, mass, 0), rtol=1e-6)


@dtypes
def test_padding_draws_no_noise(dtype):
    """A sequence with padding anywhere has the results of the sequence without it."""
    unpadded = abs(random((2, 300), dtype))
    scattered = np.sort(np.random.default_rng(1).permutation(700)[:300])
    # Positions of the 300 tokens among 400 of padding: after it, and between it
    for positions in (np.arange(300) + 400, scattered):
        # The padding has a score of 9, which would be the highest if it were read.
        padded, mask = np.full((2, 700), 9, dtype), np.zeros((2, 700), np.bool_)
        padded[:, positions], mask[:, positions] = unpadded, True
        for options in ({"temperature": 0.5}, {"hard": np.array([7, 299])}):
            wanted = qm.gumbel_softmax(unpadded, seed=3, **options)
            got = qm.gumbel_softmax(padded, seed=3, mask=mask, **options)
            # The sums have another order, so the last bits may differ.
            tolerance = 1e-5 if dtype != np.float64 else 1e-13
            np.testing.assert_allclose(got[:, positions], wanted, rtol=tolerance)
            assert not got[~mask].any()


@dtypes
@pytest.mark.parametrize("temperature", [1e-46, 1e-320, 1e-8, 1e30, 1e300])
def test_extreme_temperatures(dtype, temperature):
    s = np.array([[0.5, 0.25, 0.75, 0.125]], dtype)
    got = qm.gumbel_softmax(s, temperature=temperature, seed=None)
    # The limits τ → 0 and τ → ∞. 1e-46 would round to 0 in float32.
    one_hot, uniform = [[0, 0, 1, 0]], [[0.25] * 4]
    assert_close(got, one_hot if temperature < 1 else uniform, dtype)


@dtypes
@pytest.mark.parametrize(
    "num_tokens", [MAX_IN_REGISTERS, MAX_IN_REGISTERS + 1, 2 * MAX_IN_REGISTERS + 33]
)
@masked
@optimized
def test_softmax_of_rows_in_registers_and_in_memory(dtype, num_tokens, masked):
    batch = 2
    scores = random((batch, num_tokens), dtype)
    mask = mask_of(batch, num_tokens, masked)
    if masked:
        mask[-1, -5:] = True  # tokens after the first MAX_IN_REGISTERS ones
    noise = 11, 4  # seed, number of the first sequence
    p, m = softmax_mass_cuda(scores, 0.1, noise, 0.01, mask)
    noise_options = {"seed": 11, "sequence_offset": 4, "mask": mask}
    with qm.use_kernels("basic"):
        wanted = qm.gumbel_softmax(scores, temperature=0.1, **noise_options)
        mass = qm.saliency_mass(scores, wanted, epsilon=0.01)
    assert_close(p, wanted, dtype)
    valid = np.True_ if mask is None else mask
    assert_close(m, np.where(valid, mass, 0), dtype)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)


@dtypes
@vjp_sizes
@masked
@pytest.mark.parametrize("seed", [None, 7])
def test_gumbel_softmax_vjp(dtype, num_tokens, masked, seed):
    mask = mask_of(3, num_tokens, masked)
    saliency = abs(random((3, num_tokens), dtype))
    gradient = random((3, num_tokens), dtype, 1)
    valid = np.ones(saliency.shape, np.bool_) if mask is None else mask
    gradient[~valid] = np.nan  # padding must not be read
    options = {"temperature": 0.5, "seed": seed, "mask": mask, "sequence_offset": 4}
    got = qm.gumbel_softmax_vjp(gradient, saliency, **options)
    # π in float64, which other tests check
    p = qm.gumbel_softmax(wide(saliency), **options)
    g = np.where(valid, wide(gradient), 0)
    # s̄ = π (π̄ - Σ π̄ π) / τ, with τ = 0.5
    wanted = p * (g - (p * g).sum(-1, keepdims=True)) / 0.5
    assert_gradient(got, wanted, dtype)


@dtypes
def test_gumbel_softmax_vjp_of_a_token_with_nearly_all_the_probability(dtype):
    saliency = np.array([[3.0, 0.0], [0.0, 3.0]], dtype)
    gradient = np.array([[1.0, 0.0], [1.0, 0.0]], dtype)
    got = qm.gumbel_softmax_vjp(gradient, saliency, temperature=0.5, seed=None)
    # For two tokens s̄ = ±p (1 - p) / τ, with p = 1 / (1 + e⁻⁶) and τ = ½.
    wanted = 2 * np.exp(-6) / (1 + np.exp(-6)) ** 2
    tolerance = TOLERANCE[np.dtype(dtype).name]
    rtol = tolerance.stored if got.dtype.itemsize == 2 else tolerance.computed
    np.testing.assert_allclose(wide(got), [[wanted, -wanted]] * 2, rtol=rtol)


@dtypes
@pytest.mark.parametrize("temperature", [1e-46, 1e-320, 1e300])
def test_extreme_temperatures_vjp(dtype, temperature):
    saliency = np.array([[0.5, 0.25, 0.75, 0.125]], dtype)
    # In the limits τ → 0 and τ → ∞, π does not depend on s, so the gradient is 0.
    got = qm.gumbel_softmax_vjp(saliency, saliency, temperature=temperature, seed=None)
    assert_close(got, np.zeros((1, 4)), dtype)
