"""A plot of groups of tokens: outlines on a picture, or arcs along a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

from ..arrays.checks import check_finite_values, check_floating
from ..arrays.conversion import on_callers_stream
from .drawing import (
    COLOURS,
    DASHES,
    OUTLINE,
    axes_or_new,
    check_grid,
    check_group_labels,
    field_of,
    figure_width,
    name_tokens,
    to_host,
)


@on_callers_stream
def plot_groups(
    labels: Any,
    *,
    grid: tuple[int, int] | None = None,
    picture: Any = None,
    words: Sequence[str] | None = None,
    linewidth: float = 0.8,
    ax: Axes | None = None,
) -> Axes:
    """Draw groups: outlines on a picture, or arcs along a text.

    Parameters
    ----------
    labels : ndarray of shape (N,), or Merged
        Group of each token, or -1 for a token without a group, such as padding. Of a
        `Merged` of one sequence, the labels are drawn.
    grid : tuple of two int, optional
        Rows and columns of the patches of a picture. The tokens are the patches in
        raster order, and lines are drawn between patches of different groups. Without
        `grid`, tokens are in a row, and an arc connects each token to the next token of
        its group. A full dot is the last token of its group, which is the position of
        the merged token. A cross is a token without a group.
    picture : ndarray of shape (H, W) or (H, W, 3), optional
        With `grid`: the picture to draw on, with height H and width W in pixels. It is
        drawn in lighter colours. uint8, or floating within [0, 1].
    words : sequence of str, optional
        Without `grid`: a name for each token.
    linewidth : float, default 0.8
        Width of lines in points.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with the lines in one collection, or with one collection of arcs for each
        group of two or more tokens.

    Raises
    ------
    TypeError
        If a dtype is wrong or `ax` is not matplotlib axes.
    ValueError
        If a shape is wrong, a label is below -1, `picture` is passed without `grid`,
        `words` is passed with `grid`, or a `Merged` has several sequences.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.array([3, 4, 1, 2, 3, 4])
    >>> ax = plot_groups(labels, words=["to", "be", "or", "not", "to", "be"])
    >>> [arcs.get_label() for arcs in ax.collections[:2]]
    ['group 3', 'group 4']
    """
    labels = to_host("labels", field_of("labels", labels, "labels"))
    if grid is None:
        if picture is not None:
            raise ValueError(
                "`picture` needs the `grid` (rows, columns) of its patches"
            )
        check_group_labels(labels, None if words is None else len(words))
        return _draw_arcs(labels, words, linewidth, ax)
    if words is not None:
        raise ValueError("give `grid` or `words`, not both")
    rows, columns = check_grid(grid)
    check_group_labels(labels, rows * columns)
    if picture is not None:
        picture = _paled(to_host("picture", picture))
    return _draw_outlines(labels.reshape(rows, columns), picture, linewidth, ax)


def _draw_outlines(
    labels: NDArray[Any], picture: Any, linewidth: float, ax: Axes | None
) -> Axes:
    """Draw lines between patches of different groups; `labels` are (rows, columns)."""
    rows, columns = labels.shape
    ax = axes_or_new(ax, 5 * columns / rows, 5)
    whole = 0, columns, rows, 0  # in units of patches; y points down, as in pictures
    if picture is not None:
        ax.imshow(picture, extent=whole, cmap="gray", vmin=0, vmax=1)
    line: dict[str, Any] = {"color": OUTLINE, "linewidth": linewidth}
    ax.add_collection(LineCollection(_outline(labels), label="groups", **line))
    ax.set(xlim=whole[:2], ylim=whole[2:], xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set(**line)  # the frame closes the outlines at the border
    return ax


def _outline(labels: NDArray[Any]) -> list[tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """Return the edges, as ((x, y), (x, y)), between patches of different groups."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])  # left and right neighbours
    upright = [((i + 1, j), (i + 1, j + 1)) for i, j in zip(x, y, strict=True)]
    y, x = np.nonzero(labels[1:] != labels[:-1])  # upper and lower neighbours
    return upright + [((i, j + 1), (i + 1, j + 1)) for i, j in zip(x, y, strict=True)]


def _draw_arcs(
    labels: NDArray[Any],
    words: Sequence[str] | None,
    linewidth: float,
    ax: Axes | None,
) -> Axes:
    """Draw tokens in a row, and an arc from each token to the next of its group."""
    ax = axes_or_new(ax, figure_width(len(labels)), 3)
    angle = np.linspace(0, np.pi, 33)  # half a turn
    # The last token of each group, how many groups have arcs, and the height of the
    # highest arc.
    last, count, top = [], 0, 1.0
    for group in np.unique(labels[labels >= 0]):
        positions = np.flatnonzero(labels == group)
        last.append(positions[-1])
        if len(positions) == 1:
            continue
        span = np.diff(positions)[:, None]
        x = positions[:-1, None] + span * (1 - np.cos(angle)) / 2  # (arcs, 33)
        # The height grows with the square root of the width, so that short arcs are not
        # flat in comparison with long ones.
        y = np.sqrt(span) * np.sin(angle)
        arcs = LineCollection(
            list(np.stack([x, y], axis=-1)),
            label=f"group {group}",
            color=COLOURS[count % len(COLOURS)],
            linestyle=DASHES[count % len(DASHES)],
            linewidth=linewidth,
        )
        ax.add_collection(arcs)
        count, top = count + 1, max(top, y.max())
    # Three cases: the last token of a group, its other tokens, and tokens in no group.
    merged = np.setdiff1d(np.flatnonzero(labels >= 0), last)
    dots: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (last, "last of its group", {"color": "black"}),
        (merged, "merged into a later token", {"fc": "white", "ec": "black"}),
        (np.flatnonzero(labels < 0), "in no group", {"color": "0.4", "marker": "x"}),
    )
    shown = [
        ax.scatter(where, np.zeros(len(where)), s=16, zorder=3, label=label, **style)
        for where, label, style in dots
        if len(where)
    ]
    # Leave space for the legend above the highest arc.
    ax.set(xlim=(-0.8, len(labels) - 0.2), ylim=(-0.08 * top, 1.3 * top), yticks=[])
    style = {"ncols": 3, "frameon": False, "fontsize": "small"}
    # `set_in_layout(False)`: a wide legend must not shrink the axes.
    ax.legend(handles=shown, loc="upper left", **style).set_in_layout(False)
    ax.spines[["left", "right", "top"]].set_visible(False)
    name_tokens(ax.xaxis, words)
    return ax


def _paled(picture: NDArray[Any]) -> NDArray[Any]:
    """Return a picture in lighter colours, so that dark lines are visible on it."""
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
        wanted = "(H, W) or (H, W, 3)"
        raise ValueError(f"`picture` must have shape {wanted}, got {picture.shape}")
    if picture.dtype == np.uint8:  # 0..255, as image files have it
        picture = picture / np.float32(255)
    check_floating("picture", picture)
    check_finite_values("picture", picture)
    # The mean of each value and white: (1 + x) / 2, within 0.5..1.
    return 0.5 + 0.5 * picture.astype(np.float32).clip(0, 1)
