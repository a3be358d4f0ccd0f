"""`unmerge_tokens_vjp`: finite differences, torch, dtypes, padding and checks.

Every token gets the value of its group, so the gradient of a group is the sum of the
gradients of its members.
"""

import numpy as np
import pytest
from differences import assert_slope

import qm_cupy as qm

# Labels (2, 9) of K = 5 groups. Groups 2 and 4 are empty in the first sequence, groups
# 3 and 4 in the second one. -1 is padding.
LABELS = np.array([[0, 1, 1, 3, 1, -1, 3, 1, -1], [2, 0, 0, 1, 2, 2, 0, 1, -1]])


@pytest.fixture
def problem(rng):
    """Return merged tokens (2, 5, 3), gradient (2, 9, 3) and mass (2, 9)."""
    mass = rng.random((2, 9)) + 0.1
    mass[1, 0] = 0  # the other members of this group have a mass above 0
    return rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 9, 3)), mass


class TestUnmergeTokensVjp:
    def test_matches_finite_differences(self, problem):
        merged, gradient, _ = problem
        got = qm.unmerge_tokens_vjp(gradient, LABELS, 5)
        assert_slope(
            got, lambda x: (gradient * qm.unmerge_tokens(x, LABELS)).sum(), merged
        )

    def test_matches_the_autograd_of_torch(self, problem):
        torch = pytest.importorskip("torch")
        merged, gradient, _ = problem
        x = torch.tensor(merged, requires_grad=True)
        index = torch.tensor(np.maximum(LABELS, 0))[..., None].expand(gradient.shape)
        # Padding reads group 0 and is multiplied by 0.
        is_token = torch.tensor(LABELS >= 0)[..., None]  # (B, N, 1)
        (x.gather(1, index) * is_token).backward(torch.tensor(gradient))
        got = qm.unmerge_tokens_vjp(gradient, LABELS, 5)
        np.testing.assert_allclose(got, x.grad, rtol=1e-12)

    def test_float16_gradients_are_summed_in_float32(self):
        # In float16 the next number after 16384 is 16400. A sum of eights would stop at
        # 16384, because 16384 + 8 is rounded to 16384.
        gradient = np.full((3000, 1), 8, np.float16)
        got = qm.unmerge_tokens_vjp(gradient, np.zeros(3000, int), 1)
        assert got.dtype == np.float16
        assert got[0, 0] == 24000

    def test_padding_is_not_read(self, problem):
        _, gradient, _ = problem
        wanted = qm.unmerge_tokens_vjp(gradient, LABELS, 5)
        gradient[LABELS < 0] = np.nan
        got = qm.unmerge_tokens_vjp(gradient, LABELS, 5)
        np.testing.assert_array_equal(got, wanted)
        # The gradient of the other tokens is checked.
        gradient[0, 1, 2] = np.inf
        with pytest.raises(ValueError, match=r"`gradient` must be finite, got inf at"):
            qm.unmerge_tokens_vjp(gradient, LABELS, 5)

    def test_wrong_arguments_are_refused(self, problem):
        _, gradient, _ = problem
        with pytest.raises(ValueError, match="`labels` must have shape"):
            qm.unmerge_tokens_vjp(gradient, LABELS[:, :8], 5)
        with pytest.raises(ValueError, match=r"`labels` must lie in -1..2"):
            qm.unmerge_tokens_vjp(gradient, LABELS, 3)
        with pytest.raises(TypeError, match="`gradient` must be float16"):
            qm.unmerge_tokens_vjp(gradient.astype(int), LABELS, 5)
