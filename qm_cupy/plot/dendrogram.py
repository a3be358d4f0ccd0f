"""A plot of the dendrogram of one sequence, and of the cut into K groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

from ..arrays.conversion import on_callers_stream
from ..stages.clustering.checks import check_dendrogram
from ..stages.clustering.cut_linkage import cut_linkage
from .drawing import (
    OUTLINE,
    axes_or_new,
    check_names,
    figure_width,
    name_tokens,
    to_host,
)


@on_callers_stream
def plot_dendrogram(
    dendrogram: Any,
    *,
    num_groups: int | None = None,
    mask: Any = None,
    words: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the dendrogram of one sequence of N tokens, and the cut into K groups.

    Branches are in the order of their first tokens. Merges above the cut are dashed.
    Where the cut crosses a branch, a number says which group is below.

    Parameters
    ----------
    dendrogram : ndarray of shape (N - 1, 4)
        The result of `linkage`.
    num_groups : int, optional
        Number of groups K; no cut is drawn by default. The line of the cut is half-way
        between the last merge below it, or 0, and the first merge above it. For K = 1
        it is a little above the last merge.
    mask : ndarray of shape (N,), optional
        The mask that `linkage` was called with.
    words : sequence of str, optional
        A name for each of the N tokens; their positions by default.
    ax : matplotlib.axes.Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Axes with the merges in one line collection, in the order of the rows, and the
        cut as the only line.

    Raises
    ------
    TypeError
        If a dtype is wrong or `ax` is not matplotlib axes.
    ValueError
        If the array is not a dendrogram, does not belong to this mask, or K is below 1
        or above the number of tokens that are not padding.

    See Also
    --------
    scipy.cluster.hierarchy.dendrogram : More ways to draw one.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import linkage
    >>> tree = linkage(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    >>> ax = plot_dendrogram(tree, num_groups=2, words=["here", "there", "here"])
    >>> [word.get_text() for word in ax.get_xticklabels()]
    ['here', 'here', 'there']
    >>> float(ax.lines[0].get_ydata()[0])
    0.5
    """
    dendrogram = to_host("dendrogram", dendrogram)
    mask = None if mask is None else to_host("mask", mask)
    check_dendrogram(dendrogram, mask)
    if dendrogram.ndim != 2:
        raise ValueError(
            f"`dendrogram` must have shape (N - 1, 4), got {dendrogram.shape}"
        )
    num_tokens = len(dendrogram) + 1
    check_names("words", words, num_tokens, "tokens")
    keep = np.ones(num_tokens, np.bool_) if mask is None else mask
    # With n tokens that are not padding, the first n - 1 rows are merges.
    tree = dendrogram[: np.count_nonzero(keep) - 1].astype(np.float64)
    labels, num_below = None, len(tree)
    if num_groups is not None:
        labels = cut_linkage(dendrogram, num_groups=num_groups, mask=mask)  # (N,)
        num_below = len(tree) - int(labels.max())  # rows below the cut: n - K
    leaves, x_of_node, height = _layout(tree, num_tokens, np.flatnonzero(keep))
    ax = axes_or_new(ax, figure_width(len(leaves)), 3.5)
    # The height is 0 if all distances are 0, or if there is only one token.
    top = height.max() or 1.0
    _draw_branches(ax, tree, x_of_node, height, num_below)
    if labels is not None:
        _draw_cut(ax, tree, x_of_node, labels, num_below)
    ax.set(xlim=(-0.8, len(leaves) - 0.2), ylim=(0, 1.08 * top), ylabel="distance")
    ax.spines[["right", "top"]].set_visible(False)
    names = map(str, leaves) if words is None else (words[leaf] for leaf in leaves)
    name_tokens(ax.xaxis, list(names))
    return ax


def _layout(
    tree: NDArray[Any], num_tokens: int, tokens: NDArray[np.intp]
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return the tokens from left to right, and x and height of every node.

    As in SciPy, nodes 0..N-1 are tokens, and node N + i is the result of row i.
    """
    members = {int(token): [int(token)] for token in tokens}
    for row, (a, b) in enumerate(tree[:, :2].astype(int), num_tokens):
        # Python compares lists by their first entries, so the branch whose first token
        # is earlier is on the left.
        first, second = sorted((members.pop(a), members.pop(b)))
        members[row] = first + second
    (leaves,) = members.values()  # the last merge contains all tokens
    x_of_node = np.zeros(2 * num_tokens - 1)
    height = np.zeros(2 * num_tokens - 1)  # 0 for tokens
    x_of_node[leaves] = np.arange(len(leaves))
    for row, (a, b) in enumerate(tree[:, :2].astype(int), num_tokens):
        x_of_node[row] = (x_of_node[a] + x_of_node[b]) / 2  # between its two branches
    height[num_tokens : num_tokens + len(tree)] = tree[:, 2]
    return leaves, x_of_node, height


def _draw_branches(
    ax: Axes,
    tree: NDArray[Any],
    x_of_node: NDArray[np.float64],
    height: NDArray[np.float64],
    num_below: int,
) -> None:
    """Draw each merge as a bracket over its two branches.

    Merges from row `num_below` on are above the cut and dashed.
    """
    child = tree[:, :2].astype(np.intp)
    # Four points of each bracket: up from the left child, across, down to the right.
    x = x_of_node[child].repeat(2, axis=1)  # left, left, right, right
    y = height[child][:, [0, 0, 1, 1]]
    y[:, 1:3] = tree[:, 2:3]  # the two upper points are at the height of the merge
    ax.add_collection(
        LineCollection(
            list(np.stack([x, y], axis=-1)),
            colors=["black"] * num_below + ["0.45"] * (len(tree) - num_below),
            linestyles=["-"] * num_below + ["--"] * (len(tree) - num_below),
            linewidths=1,
        )
    )


def _draw_cut(
    ax: Axes,
    tree: NDArray[Any],
    x_of_node: NDArray[np.float64],
    labels: NDArray[Any],
    num_below: int,
) -> None:
    """Draw the cut above the first `num_below` rows, and the numbers of the groups."""
    below = tree[num_below - 1, 2] if num_below else 0.0
    # With one group there is no merge above the cut. Draw it a little above the last
    # merge.
    above = tree[num_below, 2] if num_below < len(tree) else 1.1 * below
    cut = (below + above) / 2
    ax.axhline(cut, color=OUTLINE, linewidth=1)
    # The number of the group of each node below the cut, or -1. A merge moves the
    # number from its two children to its own node. In the end, only the highest node of
    # each group has a number.
    group = np.full(len(x_of_node), -1)
    group[: len(labels)] = labels
    child = tree[:, :2].astype(np.intp)
    rows = len(labels) + np.arange(num_below)  # nodes of the merges below the cut
    for row, pair in zip(rows, child[:num_below], strict=True):
        group[row] = group[pair[0]]
        group[pair] = -1
    for node in np.flatnonzero(group >= 0):
        ax.text(
            x_of_node[node],
            cut,
            str(group[node]),
            size="x-small",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle", "fc": "white", "ec": OUTLINE},
        )
