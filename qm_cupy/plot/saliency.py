"""A plot of saliency by token and layer, or on the patches of a picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import on_callers_stream
from ..results import Merged
from .drawing import (
    axes_or_new,
    check_grid,
    check_names,
    draw_values,
    field_of,
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
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw saliency or entropy by token and layer, or on the patches of a picture.

    Parameters
    ----------
    saliency : ndarray of shape (N,) or (L, N), or Merged
        A value for each of N tokens (in each of L layers); float16, bfloat16, float32
        or float64. Of a `Merged` of one sequence, the weights are drawn, the field
        ``mass``.
    grid : tuple of two int, optional
        Rows and columns of the patches of a picture, for values of shape (N,) in raster
        order. Without `grid`, layers are rows, counted from 1, and tokens are columns.
    words : sequence of str, optional
        Without `grid`: a name for each token.
    limits : tuple of two float, optional
        The values at the dark and the light end of the colour bar; by default the
        smallest and the largest value.
    label : str, optional
        Label of the colour bar: the quantity and its unit. The default is "weight" for
        a `Merged`, and otherwise "saliency".
    ax : matplotlib.axes.Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with one image and a colour bar.

    Raises
    ------
    TypeError
        If `saliency` is not floating or `ax` is not matplotlib axes.
    ValueError
        If a shape is wrong, an entry is not finite, both `words` and `grid` are given,
        or a `Merged` has several sequences.

    Examples
    --------
    >>> import numpy as np
    >>> ax = plot_saliency(np.array([[0.0, 1.0, 0.2], [0.3, 0.9, 0.0]]))
    >>> ax.images[0].get_array().shape, ax.get_ylabel()
    ((2, 3), 'layer')
    """
    if label is None:
        label = "weight" if isinstance(saliency, Merged) else "saliency"
    values = to_host("saliency", field_of("saliency", saliency, "mass"))
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
        values = values.reshape(rows, columns)  # patches in raster order
    num_rows, num_columns = values.shape
    if grid is not None:
        ax = axes_or_new(ax, 5 * num_columns / num_rows + 0.8, 5)
        ax.set(xticks=[], yticks=[])
        image = draw_values(ax, values, label, limits)
        # In units of patches, like the outlines of `plot_groups` on the same axes.
        image.set_extent((0, num_columns, num_rows, 0))
        return ax
    ax = axes_or_new(ax, figure_width(num_columns), 1.5 + 0.2 * num_rows)
    image = draw_values(ax, values, label, limits)
    # Centres of tokens at 0, 1, ... and of layers at 1, 2, ...
    image.set_extent((-0.5, num_columns - 0.5, num_rows + 0.5, 0.5))
    ax.set_aspect("auto")  # cells fill the axes; they need not be squares
    name_tokens(ax.xaxis, words)
    if num_rows == 1:  # a single layer needs no number
        ax.set_yticks([])
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("layer")
    return ax
