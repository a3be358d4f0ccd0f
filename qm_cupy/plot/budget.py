"""Error against the number of groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter
from numpy.typing import NDArray

from ..arrays.checks import (
    check_is_array,
    check_not_negative,
    check_num_groups,
    check_number,
    check_shape,
    check_values,
)
from ..arrays.conversion import on_callers_stream
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
    """Draw error against K, and the least K whose error is small enough.

    A second call on the same axes goes on with other colours, dashes and markers.

    Parameters
    ----------
    budgets : ndarray of int of shape (M,)
        The numbers of groups K, in any order.
    errors : ndarray of shape (M,) or (C, M)
        The error at each K (in each of C ways to merge), from `reconstruction_error`
        for example; float16, bfloat16, float32 or float64, ≥ 0.
    names : sequence of C str, optional
        What the curves are.
    max_error : float, optional
        An error to stay within: drawn as a line, with a ring around the least K of each
        curve that does, which the legend tells.
    ax : matplotlib.axes.Axes, optional
        Where to draw; in a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With one line for each curve; the axis of K is logarithmic.

    Raises
    ------
    TypeError
        If a dtype does not fit or `ax` are no axes.
    ValueError
        If a shape does not fit, an entry is not finite, K is below 1 or an error below
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
    check_shape("budgets", budgets, "M", budgets.shape[-1:] or (1,))
    check_num_groups(budgets, budgets.shape, name="budgets")
    check_values("errors", errors, "M", "CM")
    check_shape("errors", errors, "CM", (*errors.shape[:-1], len(budgets)))
    check_not_negative("errors", errors)
    curves = errors.reshape(-1, len(budgets))
    check_names("names", names, len(curves), "curves")
    if max_error is not None:
        max_error = check_number("max_error", max_error, 0, np.inf, "[)")
    ax = axes_or_new(ax, 5.5, 4)
    order = np.argsort(budgets, kind="stable")
    for number, curve in enumerate(curves[:, order]):
        label = [] if names is None else [names[number]]
        if max_error is not None:
            label += _ring_first_within(ax, budgets[order], curve, max_error)
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
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.autoscale(axis="y")  # over what an earlier call has drawn too
    ax.set_ylim(bottom=0)
    ax.set(xlabel="groups K", ylabel="error")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return ax


def _ring_first_within(
    ax: Axes, budgets: NDArray[Any], curve: NDArray[Any], max_error: float
) -> list[str]:
    """Ring the least K whose error is small enough, and say it, if there is one."""
    within = np.flatnonzero(curve <= max_error)[:1]
    ring: dict[str, Any] = {"facecolor": "none", "edgecolor": OUTLINE, "zorder": 3}
    ax.scatter(budgets[within], curve[within], s=120, **ring)
    return [f"K = {least}" for least in budgets[within]]


def _draw_limit(ax: Axes, max_error: float) -> None:
    across = ax.get_yaxis_transform()
    style: dict[str, Any] = {"color": OUTLINE, "linewidth": 1, "zorder": 1}
    ax.hlines(max_error, 0, 1, transform=across, **style)  # no curve: not in `ax.lines`
    text: dict[str, Any] = {"size": "small", "color": OUTLINE, "va": "bottom"}
    ax.text(0.01, max_error, f"error {max_error:g}", transform=across, **text)
