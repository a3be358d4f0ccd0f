"""`attention_entropy_vjp` compared with hand-worked values and a float64 formula.

For a row of attention A with P = A / Σ A, the entropy H = -Σ P log P and the gradient g
of a loss with respect to H, the gradient of entry A_j is -g (log P_j + H) / Σ A.
"""

import numpy as np
import pytest
from conftest import assert_close
from oracle_arrays import attention_entropy_vjp, softmax

import qm_cupy as qm


class TestAttentionEntropyVjp:
    def test_hand_worked_values(self):
        # Both rows have the sum 1, so the gradient is -g (log P + H). In the second row
        # log P = log ½ = -H, so its gradient is 0.
        attention = np.array([[0.2, 0.8], [0.5, 0.5]])
        got = qm.attention_entropy_vjp(np.array([2.0, 3.0]), attention)
        entropy = -0.2 * np.log(0.2) - 0.8 * np.log(0.8)
        wanted = [-2 * (np.log(0.2) + entropy), -2 * (np.log(0.8) + entropy)]
        assert_close(got, [wanted, [0, 0]])

    def test_zero_entries_and_empty_rows_have_gradient_zero(self, rng):
        attention = np.array([[0.0, 0.3, 0.7], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        got = qm.attention_entropy_vjp(rng.standard_normal(3), attention)
        assert not got[attention == 0].any()
        assert not got[1].any()
        assert got[2, 2] == 0  # one entry: the entropy is 0 for any of its values
        # The other two entries of the first row have the gradient of a row without the
        # zero. Matrices are square, so this row occurs twice.
        row = np.array([[0.3, 0.7]])
        square = np.concatenate([row, row])
        wanted = qm.attention_entropy_vjp(np.ones(2), square)[0]
        got = qm.attention_entropy_vjp(np.ones(3), attention)
        assert_close(got[0, 1:], wanted)

    def test_several_blocks_of_rows(self, rng, dtype):
        attention = softmax(2 * rng.standard_normal((300, 300))).astype(dtype)
        gradient = rng.standard_normal(300)
        got = qm.attention_entropy_vjp(gradient, attention)
        assert got.dtype == dtype
        wanted, _ = attention_entropy_vjp(gradient, attention)
        # The reference processes 256 rows at a time; 300 rows are two blocks.
        np.testing.assert_allclose(
            got, wanted, rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-3
        )

    def test_gradient_is_exact_where_one_entry_dominates(self):
        """log P + H of the largest entry is 2e-9.

        In float32 the logarithm of P ≈ 1 is 0, so the plain formula would lose it.
        """
        attention = np.array([[1, 1e-10]] * 2)
        got = qm.attention_entropy_vjp(np.ones(2), attention.astype(np.float32))
        wanted = qm.attention_entropy_vjp(np.ones(2), attention)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
        assert abs(wanted[0, 0]) < 1e-8

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_gradient_is_inversely_proportional_to_the_sum_of_a_row(self, rng, size):
        # H(c A) = H(A), so the gradient with respect to c A is 1/c times as large.
        attention = softmax(rng.standard_normal((4, 4)))
        wanted = qm.attention_entropy_vjp(np.ones(4), attention) / size
        got = qm.attention_entropy_vjp(np.ones(4), (size * attention).astype("f4"))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

    def test_gradient_beyond_float16_is_infinite(self):
        # The gradient is about 1 / ΣA ≈ 4e6; float16 ends at 65504.
        attention = np.array([[2e-7, 6e-8], [0.5, 0.5]], np.float16)
        got = qm.attention_entropy_vjp(np.ones(2), attention)
        np.testing.assert_array_equal(got, [[-np.inf, np.inf], [0, 0]])


def test_a_zero_probability_gets_zero_even_if_the_gradient_overflows():
    # ΣA is about 1e-36, so g / ΣA is 1e39, which is infinite in float32.
    attention = np.array([[1e-36, 3e-38, 0], [1, 1, 0], [1, 1, 0]], np.float32)
    got = qm.attention_entropy_vjp(np.full(3, 1e3, np.float32), attention)
    np.testing.assert_array_equal(got[0], [-np.inf, np.inf, 0])
    np.testing.assert_array_equal(got[1:, 2], 0)
