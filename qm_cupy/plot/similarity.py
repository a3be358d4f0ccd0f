"""Similarities of tokens, group beside group."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import on_callers_stream
from .drawing import axes_or_new, check_group_labels, draw_values, to_host

_MOST_NUMBERS = 20  # of groups along an axis


@on_callers_stream
def plot_similarity(similarity: Any, labels: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the similarities of tokens, group beside group, each in a frame.

    Parameters
    ----------
    similarity : ndarray of shape (N, N)
        As `cosine_similarity` gives it; float16, bfloat16, float32 or float64.
    labels : ndarray of shape (N,)
        Group of each token; those of -1 are left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; in a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With one image, a scale beside it, and a frame for each group.

    Raises
    ------
    TypeError
        If a dtype does not fit or `ax` are no axes.
    ValueError
        If a shape does not fit, an entry is not finite, a label is below -1 or all
        are.

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
    labels = to_host("labels", labels)
    check_values("similarity", similarity, "NN")
    num_tokens = len(similarity)
    check_shape("similarity", similarity, "NN", (num_tokens, num_tokens))
    check_group_labels(labels, num_tokens)
    numbers, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if not len(numbers):
        raise ValueError("`labels` must put at least one token into a group")
    order = np.argsort(labels, kind="stable")[num_tokens - sizes.sum() :]
    ax = axes_or_new(ax, 5.8, 5)
    draw_values(ax, similarity[np.ix_(order, order)], "cosine similarity", None)
    start = np.cumsum(sizes) - sizes - 0.5
    halo = withStroke(linewidth=3, foreground="white")
    for corner, size in zip(start, sizes, strict=True):
        frame = Rectangle((corner, corner), size, size, fill=False, path_effects=[halo])
        ax.add_patch(frame)
    some = slice(None, None, -(-len(numbers) // _MOST_NUMBERS))
    centre = start + sizes / 2
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(centre[some], numbers[some], size="x-small")
    ax.set(xlabel="group", ylabel="group")
    return ax
