"""`saliency_vjp`: hand-worked values and properties.

y are the entropies of a sequence, scaled to [0, 1], w the greatest minus the least
entropy, and g the gradient of a loss with respect to the saliency. Without a factor for
layers and with "high", token i gets g_i / w; the least entropy also gets
-Σ g (1 - y) / w and the greatest one -Σ g y / w. "low" changes all signs.
"""

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestSaliencyVjp:
    def test_hand_worked_values(self):
        """Entropies 1, 5, 2 have w = 4 and y = (0, 1, ¼).

        With g = 8 for token 2, this token gets 8/4 = 2, the least entropy
        -8 · ¾ / 4 = -1.5, and the greatest one -8 · ¼ / 4 = -0.5.
        """
        gradient, entropy = np.array([0.0, 0.0, 8.0]), np.array([1.0, 5.0, 2.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-1.5, -0.5, 2])
        assert_close(qm.saliency_vjp(gradient, entropy), [1.5, 0.5, -2])

    def test_tied_tokens_get_equal_parts(self):
        # The entropies of the test above, with two tokens at each extreme: each of them
        # gets half of -1.5 or half of -0.5.
        gradient = np.array([0.0, 0.0, 0.0, 8.0, 0.0])
        entropy = np.array([1.0, 1.0, 5.0, 2.0, 5.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-0.75, -0.75, -0.25, 2, -0.25])

    def test_sum_of_two_tied_tokens_matches_a_difference(self, rng):
        """If both tied tokens change by the same step, the saliency is differentiable.

        Its derivative is the sum of the gradients of the two tokens.
        """
        entropy, gradient = np.array([1.0, 4, 1, 2, 3]), rng.standard_normal(5)
        got = qm.saliency_vjp(gradient, entropy)
        step = np.array([1e-6, 0, 1e-6, 0, 0])
        ends = [gradient @ qm.saliency(entropy + s) for s in (step, -step)]
        assert got[0] + got[2] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
        # Each token has its own part -g_i / w, with w = 3. The rest, the part of the
        # least entropy, must be the same for both.
        own = -gradient / 3
        assert got[0] - own[0] == pytest.approx(got[2] - own[2])

    def test_a_constant_row_has_gradient_zero(self, rng):
        entropy = np.stack([np.full(4, 2.0), rng.random(4)])[:, None, None]
        got = qm.saliency_vjp(np.array([[1.0, 2, 3, 4]]), entropy)
        assert not got[0].any()
        assert got[1].any()

    def test_gradient_is_orthogonal_to_a_shift_and_to_a_scaling(self, rng):
        """Min–max scaling removes the offset and the scale of a row.

        So the gradient is orthogonal to (1, …, 1) and to the row itself.
        """
        entropy, gradient = rng.random((3, 2, 4, 7)), rng.standard_normal((2, 7))
        got = qm.saliency_vjp(gradient, entropy)
        np.testing.assert_allclose(got.sum(-1), 0, atol=1e-12)
        # Heads have equal gradients, and their mean is scaled.
        np.testing.assert_allclose((got * entropy).sum((-2, -1)), 0, atol=1e-12)

    def test_padding_does_not_count_for_the_range(self):
        # The three tokens have y = (1, 0, ¼) and w = 4. With g = 1 for token 2 and
        # "low", this token gets -1/4, the greatest entropy ¼/4 and the least one ¾/4.
        # -9 is padding, so it is not the least entropy.
        entropy = np.array([[5.0, 1.0, 2.0, -9.0]])
        mask = np.array([[True, True, True, False]])
        got = qm.saliency_vjp(np.array([[0, 0, 1.0, 0]]), entropy, mask=mask)
        assert_close(got, [[0.0625, 0.1875, -0.25, 0]])

    def test_padding_of_any_size_has_gradient_zero(self):
        # Padding of 1e30 divided by w = 1e-30 would overflow, with a warning.
        entropy = np.array([1e-30, 2e-30, 1e30], np.float32)
        mask = np.array([True, True, False])
        got = qm.saliency_vjp(np.zeros(3, np.float32), entropy, mask=mask)
        np.testing.assert_array_equal(got, 0)

    def test_unknown_salient_is_refused(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency_vjp(np.ones(3), np.ones(3), salient="mid")
