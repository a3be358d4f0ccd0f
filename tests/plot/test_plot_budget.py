"""Curves of the error over K, and their rings, read from matplotlib's artists."""

import numpy as np
import pytest
from artists import LABELS, WORDS, closed  # noqa: F401
from matplotlib import pyplot as plt

from qm_cupy.plot import plot_budget

ONES = np.ones(6)


def test_budget_curves():
    """A ring marks the least K of a curve whose error is within the bound."""
    budgets = np.array([8, 2, 4])  # not sorted
    errors = np.array([[0.1, 0.4, 0.2], [0.05, 0.3, 0.15]])
    ax = plot_budget(budgets, errors, names=["average", "ward"], max_error=0.15)
    # Curves are drawn in the order K = 2, 4, 8.
    for line, curve in zip(ax.lines, errors[:, [1, 2, 0]], strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [2, 4, 8])
        np.testing.assert_array_equal(line.get_ydata(), curve)
    legend = [text.get_text() for text in ax.get_legend().texts]
    assert legend == ["average, K = 8", "ward, K = 4"]
    # At 0.15, "average" needs K = 8 (0.1) and "ward" needs K = 4 (0.15).
    rings = [tuple(c.get_offsets()[0]) for c in ax.collections if c.get_offsets().any()]
    assert rings == [(8, 0.1), (4, 0.15)]
    assert [text.get_text() for text in ax.texts] == ["error 0.15"]
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[0] == 0  # the height shows the ratio of two errors


def test_a_second_call_on_the_same_axes_has_other_styles():
    budgets, errors = np.array([2, 4]), np.array([0.2, 0.1])
    ax = plot_budget(budgets, errors, names=["a"], max_error=0.15)
    plot_budget(budgets + 1, 50 * errors, names=["b"], ax=ax)
    first, second = ax.lines
    for part in ("color", "linestyle", "marker"):
        assert getattr(first, f"get_{part}")() != getattr(second, f"get_{part}")()
    assert ax.get_ylim()[1] > 5  # room for 50 * 0.2 = 10
    assert len(ax.get_legend().texts) == 2


def test_no_error_is_small_enough():
    """Without a ring there is no legend, but the line of the bound is there."""
    ax = plot_budget(np.array([2, 4]), np.array([0.2, 0.1]), max_error=0.05)
    assert [text.get_text() for text in ax.texts] == ["error 0.05"]
    assert ax.get_legend() is None


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([LABELS - 1, ONES], {}, "`budgets` must lie in 1"),
        ([LABELS, np.ones((2, 5))], {}, r"\(C, M\) = \(2, 6\)"),
        ([LABELS, -ONES], {}, "`errors` must be ≥ 0"),
        ([LABELS, ONES], {"names": WORDS}, "must have length 1, the number"),
        ([LABELS, ONES], {"max_error": -1}, "`max_error` must lie in"),
    ],
)
def test_wrong_values(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        plot_budget(*arrays, **options)
    assert not plt.get_fignums()  # the check comes before the drawing


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([ONES, ONES], {}, "`budgets` must be integers"),
        ([LABELS, ONES], {"max_error": "low"}, "must be a number"),
    ],
)
def test_wrong_types(arrays, options, message):
    with pytest.raises(TypeError, match=message):
        plot_budget(*arrays, **options)
    assert not plt.get_fignums()
