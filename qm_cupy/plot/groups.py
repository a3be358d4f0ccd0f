"""Groups of tokens: outlines on a picture, or arcs along a text."""

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
    labels : ndarray of shape (N,)
        Group of each token, -1 for padding and for tokens that were dropped.
    grid : tuple of two int, optional
        Rows and columns of a picture's patches, which are the tokens in raster order:
        lines are drawn between patches of different groups. Without it tokens stand in
        a row, and an arc leads from each to the next of its group. A full dot is the
        last of its group, where the merged token stands; a cross belongs to none.
    picture : ndarray of shape (H, W) or (H, W, 3), optional
        With `grid`: what the lines are drawn on, paled. uint8, or floating within
        [0, 1].
    words : sequence of str, optional
        Without `grid`: a name for each token.
    linewidth : float, default 0.8
        In points.
    ax : matplotlib.axes.Axes, optional
        Where to draw; in a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the lines in one collection, or the arcs in one for each group of several.

    Raises
    ------
    TypeError
        If a dtype does not fit or `ax` are no axes.
    ValueError
        If a shape does not fit, a label is below -1, a picture comes without a grid or
        words come with one.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.array([3, 4, 1, 2, 3, 4])
    >>> ax = plot_groups(labels, words=["to", "be", "or", "not", "to", "be"])
    >>> [arcs.get_label() for arcs in ax.collections[:2]]
    ['group 3', 'group 4']
    """
    labels = to_host("labels", labels)
    if grid is None:
        if picture is not None:
            raise ValueError("`picture` needs the `grid` of its patches")
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
    rows, columns = labels.shape
    ax = axes_or_new(ax, 5 * columns / rows, 5)
    whole = 0, columns, rows, 0
    if picture is not None:
        ax.imshow(picture, extent=whole, cmap="gray", vmin=0, vmax=1)
    line: dict[str, Any] = {"color": OUTLINE, "linewidth": linewidth}
    ax.add_collection(LineCollection(_outline(labels), label="groups", **line))
    ax.set(xlim=whole[:2], ylim=whole[2:], xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set(**line)  # which close the groups at the border
    return ax


def _outline(labels: NDArray[Any]) -> list[tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """Return the edges, as ((x, y), (x, y)), between patches of different groups."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = [((i + 1, j), (i + 1, j + 1)) for i, j in zip(x, y, strict=True)]
    y, x = np.nonzero(labels[1:] != labels[:-1])
    return upright + [((i, j + 1), (i + 1, j + 1)) for i, j in zip(x, y, strict=True)]


def _draw_arcs(
    labels: NDArray[Any],
    words: Sequence[str] | None,
    linewidth: float,
    ax: Axes | None,
) -> Axes:
    ax = axes_or_new(ax, figure_width(len(labels)), 3)
    turn = np.linspace(0, np.pi, 33)
    last, count, top = [], 0, 1.0
    for group in np.unique(labels[labels >= 0]):
        place = np.flatnonzero(labels == group)
        last.append(place[-1])
        if len(place) == 1:
            continue
        span = np.diff(place)[:, None]
        x = place[:-1, None] + span * (1 - np.cos(turn)) / 2
        y = np.sqrt(span) * np.sin(turn)  # or short arcs would lie flat
        arcs = LineCollection(
            list(np.stack([x, y], axis=-1)),
            label=f"group {group}",
            color=COLOURS[count % len(COLOURS)],
            linestyle=DASHES[count % len(DASHES)],
            linewidth=linewidth,
        )
        ax.add_collection(arcs)
        count, top = count + 1, max(top, y.max())
    merged = np.setdiff1d(np.flatnonzero(labels >= 0), last)
    dots: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (last, "last of its group", {"color": "black"}),
        (merged, "merged into a later one", {"fc": "white", "ec": "black"}),
        (np.flatnonzero(labels < 0), "in no group", {"color": "0.4", "marker": "x"}),
    )
    shown = [
        ax.scatter(place, np.zeros(len(place)), s=16, zorder=3, label=label, **style)
        for place, label, style in dots
        if len(place)
    ]
    ax.set(xlim=(-0.8, len(labels) - 0.2), ylim=(-0.08 * top, 1.3 * top), yticks=[])
    style = {"ncols": 3, "frameon": False, "fontsize": "small"}
    ax.legend(handles=shown, loc="upper left", **style).set_in_layout(False)
    ax.spines[["left", "right", "top"]].set_visible(False)
    name_tokens(ax.xaxis, words)
    return ax


def _paled(picture: NDArray[Any]) -> NDArray[Any]:
    """Return a picture half-way to white, on which every dark line is seen."""
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
        wanted = "(H, W) or (H, W, 3)"
        raise ValueError(f"`picture` must have shape {wanted}, got {picture.shape}")
    if picture.dtype == np.uint8:
        picture = picture / np.float32(255)
    check_floating("picture", picture)
    check_finite_values("picture", picture)
    return 0.5 + 0.5 * picture.astype(np.float32).clip(0, 1)
