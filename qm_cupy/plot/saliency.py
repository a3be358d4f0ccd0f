"""Saliency by token and layer, or on a picture's patches."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import on_callers_stream
from .drawing import (
    axes_or_new,
    check_grid,
    check_names,
    draw_values,
    figure_width,
    name_tokens,
    to_host,
)


@on_callers_stream
def plot_saliency(
    saliency: Any,
    *,
    grid: tuple[int, int] | None = None,
    words: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    label: str = "saliency",
    ax: Axes | None = None,
) -> Axes:
    """Draw saliency, or entropy, by token and layer, or on a picture's patches.

    Parameters
    ----------
    saliency : ndarray of shape (N,) or (L, N)
        A value for each token (in each layer); float16, bfloat16, float32 or float64.
    grid : tuple of two int, optional
        Rows and columns of a picture's patches, for values of shape (N,) in raster
        order. Without it layers are rows, counted from 1, and tokens are columns.
    words : sequence of str, optional
        Without `grid`: a name for each token.
    limits : tuple of two float, optional
        The values at the dark and the light end of the scale, the least and the
        greatest by default.
    label : str, default "saliency"
        What the values are, and their unit.
    ax : matplotlib.axes.Axes, optional
        Where to draw; in a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With one image, and a scale beside it.

    Raises
    ------
    TypeError
        If `saliency` is not floating or `ax` are no axes.
    ValueError
        If a shape does not fit, an entry is not finite or words come with a grid.

    Examples
    --------
    >>> import numpy as np
    >>> ax = plot_saliency(np.array([[0.0, 1.0, 0.2], [0.3, 0.9, 0.0]]))
    >>> ax.images[0].get_array().shape, ax.get_ylabel()
    ((2, 3), 'layer')
    """
    values = to_host("saliency", saliency)
    if grid is None:
        check_values("saliency", values, "N", "LN")
        values = values.reshape(-1, values.shape[-1])  # (L, N)
        check_names("words", words, values.shape[-1], "tokens")
    else:
        if words is not None:
            raise ValueError("give `grid` or `words`, not both")
        rows, columns = check_grid(grid)
        check_values("saliency", values, "N")
        check_shape("saliency", values, "N", (rows * columns,))
        values = values.reshape(rows, columns)
    num_rows, num_columns = values.shape
    if grid is not None:
        ax = axes_or_new(ax, 5 * num_columns / num_rows + 0.8, 5)
        ax.set(xticks=[], yticks=[])
        image = draw_values(ax, values, label, limits)
        image.set_extent((0, num_columns, num_rows, 0))
        return ax
    ax = axes_or_new(ax, figure_width(num_columns), 1.5 + 0.2 * num_rows)
    image = draw_values(ax, values, label, limits)
    image.set_extent((-0.5, num_columns - 0.5, num_rows + 0.5, 0.5))
    ax.set_aspect("auto")
    name_tokens(ax.xaxis, words)
    if num_rows == 1:
        ax.set_yticks([])
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("layer")
    return ax
