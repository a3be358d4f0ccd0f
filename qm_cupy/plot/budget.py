"""A plot of the error against the number of groups K."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter
from numpy.typing import NDArray

from ..arrays.checks import (
    check_is_array,
    check_not_negative,
    check_number,
    check_shape,
    check_values,
)
from ..arrays.conversion import on_callers_stream
from ..arrays.counts import check_num_groups
from .drawing import COLOURS, DASHES, OUTLINE, axes_or_new, check_names, to_host

_MARKERS = "osD^vXP*"


@on_callers_stream
def plot_budget(
    budgets: Any,
    errors: Any,
    *,
    names: Sequence[str] | None = None,
    max_error: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the error against the number of groups K, and mark an error bound.

    A second call on the same axes adds curves with other colours, dashes and markers.

    Parameters
    ----------
    budgets : ndarray of int of shape (M,)
        Values of K, in any order.
    errors : ndarray of shape (M,) or (C, M)
        The error at each K, for each of C curves; for example the results of
        `reconstruction_error`. float16, bfloat16, float32 or float64, ≥ 0.
    names : sequence of C str, optional
        Names of the curves.
    max_error : float, optional
        A bound of the error, drawn as a line. For each curve, a ring marks the smallest
        K with an error within the bound, and the legend gives this K.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with one line for each curve; the axis of K is logarithmic.

    Raises
    ------
    TypeError
        If a dtype is wrong or `ax` is not matplotlib axes.
    ValueError
        If a shape is wrong, an entry is not finite, K is below 1 or an error is below
        0.

    Examples
    --------
    >>> import numpy as np
    >>> budgets, errors = np.array([8, 4, 2]), np.array([0.01, 0.06, 0.3])
    >>> ax = plot_budget(budgets, errors, max_error=0.1)
    >>> ax.lines[0].get_xdata(), ax.lines[0].get_label()
    (array([2, 4, 8]), 'K = 4')
    """
    budgets, errors = to_host("budgets", budgets), to_host("errors", errors)
    check_is_array("budgets", budgets)
    # `budgets` must have one axis of any length. For a number, `shape[-1:]` is (), and
    # equal to its shape. With `or (1,)` the wanted shape is (1,), and the check fails.
    check_shape("budgets", budgets, "M", budgets.shape[-1:] or (1,))
    check_num_groups(budgets, budgets.shape, name="budgets")
    check_values("errors", errors, "M", "CM")
    check_shape("errors", errors, "CM", (*errors.shape[:-1], len(budgets)))
    check_not_negative("errors", errors)
    curves = errors.reshape(-1, len(budgets))  # (C, M)
    check_names("names", names, len(curves), "curves")
    if max_error is not None:
        max_error = check_number("max_error", max_error, 0, np.inf, "[)")
    ax = axes_or_new(ax, 5.5, 4)
    order = np.argsort(budgets, kind="stable")  # from the smallest K to the largest
    for number, curve in enumerate(curves[:, order]):
        label = [] if names is None else [names[number]]
        if max_error is not None:
            label += _ring_first_within(ax, budgets[order], curve, max_error)
        # Count the lines on the axes, so that a later call continues with other styles.
        index = len(ax.lines)
        ax.plot(
            budgets[order],
            curve,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            label=", ".join(label) or None,
        )
    if max_error is not None:
        _draw_limit(ax, max_error)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())  # 8 instead of 2³
    ax.xaxis.set_minor_locator(NullLocator())
    ax.autoscale(axis="y")  # includes the curves of earlier calls
    ax.set_ylim(bottom=0)
    ax.set(xlabel="groups K", ylabel="error")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return ax


def _ring_first_within(
    ax: Axes, budgets: NDArray[Any], curve: NDArray[Any], max_error: float
) -> list[str]:
    """Draw a ring at the smallest K within the bound, and return its label.

    If no K is within the bound, nothing is drawn and the list is empty.
    """
    within = np.flatnonzero(curve <= max_error)[:1]  # `budgets` is ascending
    ring: dict[str, Any] = {"facecolor": "none", "edgecolor": OUTLINE, "zorder": 3}
    ax.scatter(budgets[within], curve[within], s=120, **ring)
    return [f"K = {least}" for least in budgets[within]]


def _draw_limit(ax: Axes, max_error: float) -> None:
    """Draw the bound of the error as a horizontal line with a text."""
    # x is a fraction of the width of the axes, and y is an error.
    across = ax.get_yaxis_transform()
    style: dict[str, Any] = {"color": OUTLINE, "linewidth": 1, "zorder": 1}
    # `hlines` adds a collection, so that `ax.lines` contains the curves only.
    ax.hlines(max_error, 0, 1, transform=across, **style)
    text: dict[str, Any] = {"size": "small", "color": OUTLINE, "va": "bottom"}
    ax.text(0.01, max_error, f"error {max_error:g}", transform=across, **text)
