"""Budgets: the number K of groups from an integer, a ratio or a norm mass.

N is the number of tokens of a sequence. The norm mass is the sum of the L2 norms of
tokens. The oracle (oracle.py) computes `norm_budget` with plain loops in float64.
"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import oracle
import pytest
from conftest import to_library

import qm_cupy as qm


def test_ratio_is_rounded_down_to_at_least_one_token():
    assert qm.token_budget(0.2, 104) == 20  # ⌊20.8⌋
    assert qm.token_budget(0.001, 104) == 1  # ⌊0.104⌋ = 0, but K is at least 1
    assert qm.token_budget(1.0, 104) == 104


@pytest.mark.parametrize("percent", range(1, 101))
def test_ratio_of_100_tokens_is_its_percentage(percent):
    # 0.29 · 100 is 28.999… in binary: a plain floor would give 28.
    assert qm.token_budget(percent / 100, 100) == percent


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ratio_of_any_float_dtype_is_its_decimal(dtype):
    # A narrow float differs from the decimal that its caller wrote: float16 0.7 is
    # 0.7001953125. K must come from 0.7.
    assert qm.token_budget(dtype(0.29), 100) == 29
    assert qm.token_budget(dtype(0.7), 1000) == 700


def test_num_tokens_of_each_sequence_give_k_of_each_sequence():
    sizes = np.array([10, 3])
    # A ratio, one K for all sequences, and one K for each sequence.
    np.testing.assert_array_equal(qm.token_budget(0.5, sizes), [5, 1])
    np.testing.assert_array_equal(qm.token_budget(2, sizes), [2, 2])
    np.testing.assert_array_equal(qm.token_budget(np.array([4, 1]), sizes), [4, 1])


@pytest.mark.parametrize("budget", [0, -1, 11, 0.0, -0.5, 1.01, float("nan")])
def test_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="`budget` must lie in"):
        qm.token_budget(budget, 10)


# True is an int in Python, but not a number of groups.
@pytest.mark.parametrize("budget", ["0.2", None, [3], True, np.array([1.5])])
def test_budget_of_another_type_is_refused(budget):
    with pytest.raises(TypeError, match="`budget` must be"):
        qm.token_budget(budget, np.array([10]))


@pytest.mark.parametrize("budget", [0.2, 2, np.array([1, 1])])
def test_num_tokens_of_each_sequence_out_of_range_are_refused(budget):
    with pytest.raises(ValueError, match="`num_tokens` must lie in"):
        qm.token_budget(budget, np.array([0, 20]))
    with pytest.raises(ValueError, match="`num_tokens` must lie in"):
        qm.token_budget(budget, np.array([20, -1]))
    with pytest.raises(TypeError, match="`num_tokens` must be"):
        qm.token_budget(budget, np.array([20.0, 20.0]))


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_one_num_tokens_out_of_range_is_refused(num_tokens):
    with pytest.raises(ValueError, match="`num_tokens` must lie in"):
        qm.token_budget(0.2, num_tokens)


def test_budget_and_num_tokens_must_have_the_same_length():
    with pytest.raises(ValueError, match=r"`budget` must have shape \(B\) = \(3,\)"):
        qm.token_budget(np.array([1, 2]), np.array([4, 5, 6]))
    # One N for all sequences fits a budget of any length.
    np.testing.assert_array_equal(qm.token_budget(np.array([1, 2]), 4), [1, 2])


@pytest.mark.parametrize("gamma", [0.01, 0.3, 0.5, 0.8, 0.999, 1.0])
def test_norm_budget_matches_the_oracle(rng, dtype, gamma):
    tokens = rng.standard_normal((3, 11, 4)).astype(dtype)
    got = qm.norm_budget(tokens, gamma)
    assert got.dtype == np.int32
    assert list(got) == [oracle.norm_budget(x, gamma) for x in tokens]


def test_norm_budget_is_the_least_k_that_is_enough(rng):
    tokens = rng.standard_normal((40, 4))
    num_kept = int(qm.norm_budget(tokens, 0.7))
    # The K largest norms have 0.7 of the norm mass, and the K - 1 largest have less.
    assert qm.norm_mass(tokens, num_kept) >= 0.7 > qm.norm_mass(tokens, num_kept - 1)


@pytest.mark.parametrize("percent", range(1, 101))
def test_gamma_of_100_equal_tokens_is_its_percentage(percent):
    """The comparison allows for rounding: 0.07 · 100 > 7 in binary."""
    assert qm.norm_budget(np.ones((100, 1)), percent / 100) == percent


def test_norm_budget_of_zeros_and_of_padding():
    # Without any norm mass one token is enough.
    assert qm.norm_budget(np.zeros((5, 2)), 0.8) == 1
    # Padding has no norm mass: γ = 1 needs the two tokens only.
    mask = np.array([True, True, False, False])
    assert qm.norm_budget(np.ones((4, 1)), 1.0, mask=mask) == 2


@pytest.mark.parametrize("gamma", [0, 1.5, -1])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"`gamma` must lie in \(0, 1\]"):
        qm.norm_budget(np.ones((3, 2)), gamma)


class TestRatios:
    """A ratio r of N tokens is ⌊N · r⌋ for the r that was written."""

    @pytest.mark.slow("45,000 calls")
    def test_k_over_n_gives_back_k(self):
        for n in range(1, 300):
            ratios = np.arange(1, n + 1, dtype=np.float32) / np.float32(n)
            assert [qm.token_budget(r, n) for r in ratios] == [*range(1, n + 1)]

    def test_one_ninth(self):
        assert qm.token_budget(np.float32(1) / 9, 18) == 2
        # Of 17 tokens, one ninth is 1.9 tokens.
        assert qm.token_budget(np.float32(1) / 9, 17) == 1

    def test_differences(self):
        # 1 - 0.9 is 0.09999999999999998.
        assert [qm.token_budget(1 - r, 100) for r in (0.9, 0.99, 0.71)] == [10, 1, 29]

    def test_floats_that_are_no_simple_fraction_are_rounded_down(self):
        assert qm.token_budget(0.29999, 10) == 2
        assert qm.token_budget(0.30001, 10) == 3
        assert qm.token_budget(np.float32(0.29999), 10) == 2

    def test_every_type_of_a_real_number(self, library):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        third = Fraction(1, 3)
        for ratio in (third, Decimal(1) / 3, ml_dtypes.bfloat16(1) / 3, 1 / 3):
            assert qm.token_budget(ratio, 10) == 3
        assert qm.token_budget(third, 9) == qm.token_budget(
            ml_dtypes.bfloat16(1) / 3, 9
        )
        assert qm.token_budget(Decimal("0.29"), 100) == 29
        tokens = to_library(library, np.ones((2, 12, 3), np.float32))
        for value, wanted in (
            (np.float32(1) / 3, 4),
            (0.25, 3),
            (5, 5),
            (np.int8(5), 5),
        ):
            for budget in (
                value,
                np.array(value),
                to_library(library, np.array(value)),
            ):
                assert qm.token_budget(budget, 12) == wanted
                assert qm.quickmerge(tokens, budget).tokens.shape == (2, wanted, 3)

    @pytest.mark.parametrize(
        ("budget", "error", "message"),
        [
            (16.0, ValueError, r"in \(0, 1\] .* got 16.0: pass 16 for 16 groups"),
            (1.5, ValueError, "if it is a fraction of the tokens, got 1.5$"),
            (float("inf"), ValueError, "got inf"),
            (Fraction(-1, 3), ValueError, "got -1/3"),
            ("25%", TypeError, r"an integer K, a fraction .* such as 0.25, .* got str"),
            (None, TypeError, "got NoneType"),
            (1j, TypeError, "got complex"),
            ([3], TypeError, "got list"),
        ],
    )
    def test_errors(self, budget, error, message):
        with pytest.raises(error, match=message):
            qm.token_budget(budget, 20)
        if budget is not None:  # otherwise `quickmerge` expects a limit
            with pytest.raises(error, match=message):
                qm.quickmerge(np.ones((20, 3)), budget)
