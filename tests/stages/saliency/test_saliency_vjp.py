import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestSaliency:
    def test_hand_worked(self):
        """Entropies 1, 5, 2 have w = 4 and y = (0, 1, ¼).

        With g = 8 for token 2: it gets 8/4 = 2, the minimum -8 · ¾ / 4 = -1.5 and the
        maximum -8 · ¼ / 4 = -0.5.
        """
        gradient, entropy = np.array([0.0, 0.0, 8.0]), np.array([1.0, 5.0, 2.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-1.5, -0.5, 2])
        assert_close(qm.saliency_vjp(gradient, entropy), [1.5, 0.5, -2])

    def test_ties_get_equal_parts(self):
        # As above, with two tokens at each extreme: half of -1.5 and half of -0.5.
        gradient = np.array([0.0, 0.0, 0.0, 8.0, 0.0])
        entropy = np.array([1.0, 1.0, 5.0, 2.0, 5.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-0.75, -0.75, -0.25, 2, -0.25])

    def test_a_shared_extreme_is_the_mean_of_its_one_sided_slopes(self, rng):
        """Moving both tied tokens together is differentiable; each gets half of it."""
        entropy, gradient = np.array([1.0, 4, 1, 2, 3]), rng.standard_normal(5)
        got = qm.saliency_vjp(gradient, entropy)
        step = np.array([1e-6, 0, 1e-6, 0, 0])
        ends = [gradient @ qm.saliency(entropy + s) for s in (step, -step)]
        assert got[0] + got[2] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
        # Besides its part of the minimum, each token has the slope -g / w of its own y.
        own = -gradient / 3
        assert got[0] - own[0] == pytest.approx(got[2] - own[2])

    def test_a_constant_row_has_gradient_zero(self, rng):
        entropy = np.stack([np.full(4, 2.0), rng.random(4)])[:, None]  # (L, B, N)
        got = qm.saliency_vjp(np.array([[1.0, 2, 3, 4]]), entropy)
        assert not got[0].any()
        assert got[1].any()

    def test_shift_and_scale_have_no_gradient(self, rng):
        """Min–max scaling removes the offset and the scale of a row.

        So the gradient is orthogonal to (1, …, 1) and to the row itself.
        """
        entropy, gradient = rng.random((3, 2, 7)), rng.standard_normal((2, 7))
        got = qm.saliency_vjp(gradient, entropy)
        np.testing.assert_allclose(got.sum(-1), 0, atol=1e-12)
        np.testing.assert_allclose((got * entropy).sum(-1), 0, atol=1e-12)

    def test_padding_sets_no_extreme(self):
        # y = (1, 0, ¼) and w = 4: -1/4 for token 2, ¼/4 for the maximum, ¾/4 for the
        # minimum. The padded -9 is not the minimum.
        entropy = np.array([[5.0, 1.0, 2.0, -9.0]])
        mask = np.array([[True, True, True, False]])
        got = qm.saliency_vjp(np.array([[0, 0, 1.0, 0]]), entropy, mask=mask)
        assert_close(got, [[0.0625, 0.1875, -0.25, 0]])

    def test_unknown_word(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency_vjp(np.ones(3), np.ones(3), salient="mid")
