"""A plot of the similarities of tokens, ordered by group."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import on_callers_stream
from .drawing import axes_or_new, check_group_labels, draw_values, field_of, to_host

_MAX_NUMBERS = 20  # at most this many group numbers along an axis are legible


@on_callers_stream
def plot_similarity(similarity: Any, labels: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the similarities of tokens ordered by group, with a frame for each group.

    Parameters
    ----------
    similarity : ndarray of shape (N, N)
        The result of `cosine_similarity` for N tokens; float16, bfloat16, float32 or
        float64.
    labels : ndarray of shape (N,), or Merged
        Group of each token, or the `Merged` of one sequence. Tokens with label -1 are
        not drawn.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with one image, a colour bar, and a frame for each group.

    Raises
    ------
    TypeError
        If a dtype is wrong or `ax` is not matplotlib axes.
    ValueError
        If a shape is wrong, an entry is not finite, a label is below -1, no token has
        a group, or a `Merged` has several sequences.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import cosine_similarity
    >>> tokens = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> ax = plot_similarity(cosine_similarity(tokens), np.array([1, 0, 1]))
    >>> ax.images[0].get_array().data
    array([[1., 0., 0.],
           [0., 1., 1.],
           [0., 1., 1.]])
    """
    similarity = to_host("similarity", similarity)
    labels = to_host("labels", field_of("labels", labels, "labels"))
    check_values("similarity", similarity, "NN")
    num_tokens = len(similarity)
    check_shape("similarity", similarity, "NN", (num_tokens, num_tokens))
    check_group_labels(labels, num_tokens)
    numbers, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if not len(numbers):
        raise ValueError("`labels` must put at least one token into a group")
    # Sort tokens by group, and within a group by position. Leave out the labels of -1,
    # which come first.
    order = np.argsort(labels, kind="stable")[num_tokens - sizes.sum() :]
    ax = axes_or_new(ax, 5.8, 5)
    draw_values(ax, similarity[np.ix_(order, order)], "cosine similarity", None)
    start = np.cumsum(sizes) - sizes - 0.5  # pixel i covers i - 0.5 to i + 0.5
    # A white border, so that the black frame is visible on dark cells.
    halo = withStroke(linewidth=3, foreground="white")
    for corner, size in zip(start, sizes, strict=True):
        frame = Rectangle((corner, corner), size, size, fill=False, path_effects=[halo])
        ax.add_patch(frame)
    # Show every n-th number, so that at most _MAX_NUMBERS are shown.
    shown = slice(None, None, -(-len(numbers) // _MAX_NUMBERS))
    centre = start + sizes / 2
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(centre[shown], numbers[shown], size="x-small")
    ax.set(xlabel="group", ylabel="group")
    return ax
