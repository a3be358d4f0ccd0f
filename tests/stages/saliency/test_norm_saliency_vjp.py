"""`norm_saliency_vjp`: hand-worked values and properties.

n is the norm of a token x, w the greatest minus the least norm of a sequence, y the
scaled norms, and g the gradient of a loss ℒ with respect to y.
"""

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestNormSaliencyVjp:
    def test_a_norm_of_zero_has_gradient_zero(self):
        # The norms are 0, 5, 10, so w = 10 and y = 0, ½, 1. g = 1 of token 1 gives
        # ∂ℒ/∂n = 1/10 for token 1 and -½/10 for token 2, the maximum. Both are
        # multiplied by the unit vector (0.6, 0.8). Token 0 has norm 0, so its gradient
        # is 0.
        tokens = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        got = qm.norm_saliency_vjp(np.array([7.0, 1.0, 0.0]), tokens)
        assert_close(got, [[0, 0], [0.06, 0.08], [-0.03, -0.04]])
        assert not qm.norm_saliency_vjp(np.ones(3), np.zeros((3, 2))).any()

    def test_gradient_is_parallel_to_the_token(self, rng):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        got = qm.norm_saliency_vjp(gradient, tokens)
        # The norm changes only along the token: ∂n/∂x = x / n.
        norms = np.linalg.norm(tokens, axis=-1)
        norm_gradient = qm.saliency_vjp(gradient, norms, salient="high")
        assert_close(got, norm_gradient[:, None] * tokens / norms[:, None])

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_tokens_with_very_large_or_small_entries(self, rng, size):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        # The square of 1e30 is inf in float32, and that of 1e-30 is 0. The saliency
        # does not change with the size of the tokens, so the gradient is divided by
        # this size.
        wanted = qm.norm_saliency_vjp(gradient, tokens) / size
        got = qm.norm_saliency_vjp(gradient, (tokens * size).astype(np.float32))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
