"""`merge_tokens_vjp`: finite differences, torch, masses, padding, dtypes and checks.

x̃_k is the merged token of group k, the mean of its members x_j with the masses m_j,
and W_k the sum of these masses. g_k is the gradient of a loss with respect to x̃_k.
x̄_j and m̄_j are the gradients with respect to x_j and m_j, which the function returns.
"""

import numpy as np
import pytest
from differences import assert_slope

import qm_cupy as qm

# Labels (2, 9) of K = 5 groups. Groups 2 and 4 are empty in the first sequence, groups
# 3 and 4 in the second one. Token 0 of the first sequence is alone in its group.
LABELS = np.array([[0, 1, 1, 3, 1, -1, 3, 1, -1], [2, 0, 0, 1, 2, 2, 0, 1, -1]])


@pytest.fixture
def problem(rng):
    """Return gradient (2, 5, 3), tokens (2, 9, 3) and mass (2, 9)."""
    mass = rng.random((2, 9)) + 0.1
    mass[1, 0] = 0  # the other members of this group have a mass above 0
    return rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 9, 3)), mass


class TestMergeTokensVjp:
    @pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
    def test_token_gradient_matches_finite_differences(self, problem, weighted):
        gradient, tokens, mass = problem
        weights = mass if weighted else None
        got = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=weights)
        assert_slope(
            got[0],
            lambda x: (gradient * qm.merge_tokens(x, LABELS, 5, mass=weights)).sum(),
            tokens,
        )
        assert not got[0][LABELS < 0].any()
        if not weighted:
            assert got[1] is None

    def test_mass_gradient_matches_finite_differences(self, problem):
        gradient, tokens, mass = problem
        mass[1, 0] = 0.2  # a difference would make a mass of 0 negative
        _, got = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        assert_slope(
            got,
            lambda m: (gradient * qm.merge_tokens(tokens, LABELS, 5, mass=m)).sum(),
            mass,
            step=1e-6,
        )
        assert got[0, 0] == 0  # alone in its group, so its mass cancels
        assert not got[LABELS < 0].any()

    @pytest.mark.parametrize("precision", [np.float32, np.float64])
    def test_matches_the_autograd_of_torch(self, problem, precision):
        torch = pytest.importorskip("torch")
        gradient, tokens, mass = (x.astype(precision) for x in problem)
        x, m = (torch.tensor(a, requires_grad=True) for a in (tokens, mass))
        is_member = torch.tensor(LABELS[:, None] == np.arange(5)[:, None])  # (B, K, N)
        weight = is_member * m[:, None]
        total = weight.sum(-1, keepdim=True)
        merged = weight @ x / torch.where(total > 0, total, 1)
        merged.backward(torch.tensor(gradient))
        got = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        for actual, wanted in zip(got, (x.grad, m.grad), strict=True):
            assert actual.dtype == precision
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)

    def test_group_of_mass_zero_has_the_gradient_of_the_plain_mean(self, problem):
        gradient, tokens, mass = problem
        mass[LABELS == 1] = 0
        # The plain mean does not depend on the masses, so they have gradient 0.
        x_bar, m_bar = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        plain, _ = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5)
        np.testing.assert_array_equal(x_bar[LABELS == 1], plain[LABELS == 1])
        assert not m_bar[LABELS == 1].any()
        assert m_bar[LABELS == 3].any()

    def test_mass_of_zero_among_other_masses_has_a_gradient(self, problem):
        gradient, tokens, mass = problem
        _, m_bar = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        merged = qm.merge_tokens(tokens, LABELS, 5, mass=mass)
        # m̄_j = g_k · (x_j - x̃_k) / W_k also holds for m_j = 0. Here j = 0 and k = 2.
        product = gradient[1, 2] @ (tokens[1, 0] - merged[1, 2])
        total = mass[1, LABELS[1] == 2].sum()  # W_k
        np.testing.assert_allclose(m_bar[1, 0], product / total)

    def test_groups_without_members_are_not_read(self, problem):
        gradient, tokens, mass = problem
        wanted = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        # The check for finite values would find this NaN, so it is off here.
        gradient[:, 4] = gradient[0, 2] = np.nan
        with qm.check_finite(False):
            got = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_k_of_each_sequence(self, problem):
        gradient, tokens, mass = problem
        counts = np.array([4, 3])
        # Sequence 1 has K = 3, so its row 3 is not a group and must not be read.
        gradient[1, 3] = np.nan
        got = qm.merge_tokens_vjp(gradient[:, :4], tokens, LABELS, counts, mass=mass)
        for b in range(2):
            # Each sequence without the other one, with its own K
            single = qm.merge_tokens_vjp(
                gradient[b, : counts[b]], tokens[b], LABELS[b], counts[b], mass=mass[b]
            )
            for x, y in zip(got, single, strict=True):
                np.testing.assert_array_equal(x[b], y)

    def test_one_token(self):
        # x̃ = x for any mass, so x̄ is g, and m̄ is 0.
        one = np.array([[2.0]])
        got = qm.merge_tokens_vjp(one, one, np.array([0]), 1, mass=np.array([0.3]))
        assert got[0] == 2
        assert got[1] == 0

    def test_float16_gives_the_float64_result_rounded_once(self, problem):
        gradient, tokens, mass = (x.astype(np.float16) for x in problem)
        got = qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=mass)
        # If intermediate results were rounded to float16 too, the last bit would
        # change.
        wide = (x.astype(np.float64) for x in (gradient, tokens))
        wanted = qm.merge_tokens_vjp(*wide, LABELS, 5, mass=mass.astype(np.float64))
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == np.float16
            np.testing.assert_array_equal(x, y.astype(np.float16))

    def test_each_gradient_has_the_dtype_of_its_argument(self, problem):
        gradient, tokens, mass = problem
        x_bar, m_bar = qm.merge_tokens_vjp(
            gradient, tokens.astype(np.float16), LABELS, 5, mass=mass.astype("f4")
        )
        assert x_bar.dtype == np.float16
        assert m_bar.dtype == np.float32

    def test_wrong_arguments_are_refused(self, problem):
        gradient, tokens, mass = problem
        with pytest.raises(
            ValueError, match=r"`gradient` must have shape \(B, K, D\) = \(2, 4, 3\)"
        ):
            qm.merge_tokens_vjp(gradient, tokens, LABELS, 4)
        with pytest.raises(ValueError, match=r"`labels` must lie in -1..4"):
            qm.merge_tokens_vjp(gradient, tokens, LABELS + 3, 5)
        with pytest.raises(ValueError, match="`mass` must be ≥ 0"):
            qm.merge_tokens_vjp(gradient, tokens, LABELS, 5, mass=-mass)
        with pytest.raises(TypeError, match="`gradient` must be float16"):
            qm.merge_tokens_vjp(gradient.astype(int), tokens, LABELS, 5)


def test_empty_batch_has_empty_gradients():
    tokens, labels, merged = (
        np.ones((0, 5, 3)),
        np.zeros((0, 5), int),
        np.ones((0, 2, 3)),
    )
    x_bar, m_bar = qm.merge_tokens_vjp(merged, tokens, labels, 2, mass=tokens[..., 0])
    assert (x_bar.shape, m_bar.shape) == ((0, 5, 3), (0, 5))
    assert qm.unmerge_tokens_vjp(tokens, labels, 2).shape == (0, 2, 3)
