"""`gumbel_softmax_vjp`: finite differences, torch, extreme values, padding, checks.

s is the saliency, π = softmax((s + noise) / τ) the probabilities with the temperature
τ, and a bar the gradient of a loss: the function returns s̄ from π̄.
"""

import numpy as np
import pytest
from conftest import assert_close
from differences import assert_slope

import qm_cupy as qm

# A sequence without padding, and one with padding on the left, inside and on the right.
MASK = np.array([[True] * 9, [False, True, True, False, True] + [False] * 4])


@pytest.fixture
def inputs(rng):
    """Gradient π̄ and saliency s, each (2, 9)."""
    return rng.standard_normal((2, 9)), rng.random((2, 9))


class TestGumbelSoftmaxVjp:
    @pytest.mark.parametrize("seed", [None, 3])
    @pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
    @pytest.mark.parametrize("temperature", [0.1, 2.0])
    def test_matches_finite_differences(self, inputs, seed, mask, temperature):
        gradient, saliency = inputs
        options = {
            "temperature": temperature,
            "seed": seed,
            "mask": mask,
            "sequence_offset": 5,
        }
        got = qm.gumbel_softmax_vjp(gradient, saliency, **options)
        # The same seed draws the same noise in every call, so noise is a constant here.
        assert_slope(
            got,
            lambda s: (gradient * qm.gumbel_softmax(s, **options)).sum(),
            saliency,
            step=1e-6,
        )
        if mask is not None:
            assert not got[~mask].any()

    def test_matches_the_autograd_of_torch(self, inputs):
        torch = pytest.importorskip("torch")
        gradient, saliency = (x.astype(np.float32) for x in inputs)
        s = torch.tensor(saliency, requires_grad=True)
        # torch computes the gradient of the softmax; the noise is a constant.
        noise = torch.tensor(qm.gumbel_noise(saliency.shape, seed=3))
        torch.softmax((s + noise) / 0.1, dim=-1).backward(torch.tensor(gradient))
        got = qm.gumbel_softmax_vjp(gradient, saliency, seed=3)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, s.grad, rtol=1e-5, atol=1e-5)

    def test_token_with_nearly_all_the_probability(self):
        """s̄ is π (1 - π) / τ = 10 e⁻³⁰, but 1 - π in float32 would be 0."""
        s = np.array([3.0, 0.0], np.float32)
        gradient = np.array([1.0, 0.0])
        got = qm.gumbel_softmax_vjp(gradient, s, temperature=0.1, seed=None)
        np.testing.assert_allclose(got, 10 * np.exp([-30, -30]) * [1, -1], rtol=1e-5)

    def test_one_token_has_gradient_zero(self):
        # The probability of a single token is always 1.
        assert qm.gumbel_softmax_vjp(np.array([5.0]), np.array([0.3])) == 0

    @pytest.mark.parametrize("temperature", [1e-320, 1e300])
    def test_extreme_temperatures_have_gradient_zero(self, inputs, temperature):
        # In the limits τ → 0 and τ → ∞, π does not depend on s.
        got = qm.gumbel_softmax_vjp(*inputs, temperature=temperature)
        assert_close(got, np.zeros((2, 9)))

    def test_padding_is_not_read(self, inputs):
        gradient, saliency = inputs
        wanted = qm.gumbel_softmax_vjp(gradient, saliency, mask=MASK)
        gradient = np.where(MASK, gradient, np.nan)
        got = qm.gumbel_softmax_vjp(gradient, saliency, mask=MASK)
        np.testing.assert_array_equal(got, wanted)

    def test_wrong_arguments_are_refused(self, inputs):
        gradient, saliency = inputs
        with pytest.raises(
            ValueError, match=r"`gradient` must have shape \(B, N\) = \(2, 9\)"
        ):
            qm.gumbel_softmax_vjp(gradient[:, :8], saliency)
        with pytest.raises(TypeError, match="`gradient` must be float16, bfloat16"):
            qm.gumbel_softmax_vjp(gradient.astype(int), saliency)
        with pytest.raises(TypeError, match="`gradient` must be an array, got float"):
            qm.gumbel_softmax_vjp(1.0, saliency)
        with pytest.raises(ValueError, match="`gradient` must be finite, got nan"):
            qm.gumbel_softmax_vjp(gradient * np.nan, saliency)
        with pytest.raises(ValueError, match="`temperature` must lie in"):
            qm.gumbel_softmax_vjp(gradient, saliency, temperature=0)


def test_empty_batch_has_an_empty_gradient():
    empty = np.ones((0, 4))
    assert qm.gumbel_softmax_vjp(empty, empty).shape == (0, 4)
    assert [x.shape for x in qm.saliency_mass_vjp(empty, empty, empty)] == [(0, 4)] * 2
