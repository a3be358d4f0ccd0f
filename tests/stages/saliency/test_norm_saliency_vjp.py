import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestNormSaliency:
    def test_a_norm_of_zero_has_gradient_zero(self):
        # Norms 0, 5, 10, so w = 10 and y = 0, ½, 1. Token 1 gets 1/10 of its unit
        # vector (0.6, 0.8), token 2 gets -½/10 of the same.
        tokens = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        got = qm.norm_saliency_vjp(np.array([7.0, 1.0, 0.0]), tokens)
        assert_close(got, [[0, 0], [0.06, 0.08], [-0.03, -0.04]])
        assert not qm.norm_saliency_vjp(np.ones(3), np.zeros((3, 2))).any()

    def test_the_gradient_is_along_the_token(self, rng):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        got = qm.norm_saliency_vjp(gradient, tokens)
        # The norm changes only along the token: ∂n/∂x = x / n.
        norms = np.linalg.norm(tokens, axis=-1)
        slope = qm.saliency_vjp(gradient, norms, salient="high")
        assert_close(got, slope[:, None] * tokens / norms[:, None])

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_no_square_overflows(self, rng, size):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        # 1e±30 squared is inf or 0 in float32. The saliency does not change with the
        # size, so the gradient is 1 / size as large.
        wanted = qm.norm_saliency_vjp(gradient, tokens) / size
        got = qm.norm_saliency_vjp(gradient, (tokens * size).astype(np.float32))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
