"""Pictures of what was merged and of what it cost; they take matplotlib.

Every function draws on matplotlib's axes and returns them, and shows nothing. Colours
are Okabe and Ito's, or cividis, and never speak alone: lines differ in dashes and
markers too, and cividis grows lighter with the value, so that grey prints say the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import enter, on_callers_stream
from ._checks import (
    check_dendrogram,
    check_finite_values,
    check_floating,
    check_given,
    check_integer,
    check_labels,
    check_not_negative,
    check_num_groups,
    check_number,
    check_shape,
    check_values,
)
from ._libraries import on_host
from .clustering import cut_linkage

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import LineCollection
    from matplotlib.image import AxesImage
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
except ImportError as error:
    _message = 'qm_cupy.plot needs matplotlib: pip install "qm-cupy[demo]"'
    raise ImportError(_message) from error

__all__ = [
    "plot_budget",
    "plot_dendrogram",
    "plot_groups",
    "plot_saliency",
    "plot_similarity",
]

# Okabe and Ito's, but for their yellow, which vanishes on white.
_COLOURS = (
    "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
_DASHES = "-", "--", "-.", ":"  # as many as share no factor with the colours
_MARKERS = "osD^vXP*"
_OUTLINE = "#b3001b"  # darker than any paled picture
_MOST_NUMBERS = 20  # of groups along an axis


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
    labels = _on_host("labels", labels)
    if grid is None:
        if picture is not None:
            raise ValueError("`picture` needs the `grid` of its patches")
        _check_labels(labels, None if words is None else len(words))
        return _draw_arcs(labels, words, linewidth, ax)
    if words is not None:
        raise ValueError("give `grid` or `words`, not both")
    rows, columns = _check_grid(grid)
    _check_labels(labels, rows * columns)
    if picture is not None:
        picture = _paled(_on_host("picture", picture))
    return _draw_outlines(labels.reshape(rows, columns), picture, linewidth, ax)


def _draw_outlines(
    labels: NDArray[Any], picture: Any, linewidth: float, ax: Axes | None
) -> Axes:
    rows, columns = labels.shape
    ax = _axes(ax, 5 * columns / rows, 5)
    whole = 0, columns, rows, 0
    if picture is not None:
        ax.imshow(picture, extent=whole, cmap="gray", vmin=0, vmax=1)
    line: dict[str, Any] = {"color": _OUTLINE, "linewidth": linewidth}
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
    ax = _axes(ax, _width(len(labels)), 3)
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
            color=_COLOURS[count % len(_COLOURS)],
            linestyle=_DASHES[count % len(_DASHES)],
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
    _name_tokens(ax.xaxis, words)
    return ax


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
    values = _on_host("saliency", saliency)
    if grid is None:
        check_values("saliency", values, "N", "LN")
        values = values.reshape(-1, values.shape[-1])  # (L, N)
        _check_names("words", words, values.shape[-1], "tokens")
    else:
        if words is not None:
            raise ValueError("give `grid` or `words`, not both")
        rows, columns = _check_grid(grid)
        check_values("saliency", values, "N")
        check_shape("saliency", values, "N", (rows * columns,))
        values = values.reshape(rows, columns)
    num_rows, num_columns = values.shape
    if grid is not None:
        ax = _axes(ax, 5 * num_columns / num_rows + 0.8, 5)
        ax.set(xticks=[], yticks=[])
        image = _draw_values(ax, values, label, limits)
        image.set_extent((0, num_columns, num_rows, 0))
        return ax
    ax = _axes(ax, _width(num_columns), 1.5 + 0.2 * num_rows)
    image = _draw_values(ax, values, label, limits)
    image.set_extent((-0.5, num_columns - 0.5, num_rows + 0.5, 0.5))
    ax.set_aspect("auto")
    _name_tokens(ax.xaxis, words)
    if num_rows == 1:
        ax.set_yticks([])
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("layer")
    return ax


@on_callers_stream
def plot_dendrogram(
    dendrogram: Any,
    *,
    num_groups: int | None = None,
    mask: Any = None,
    words: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the dendrogram of one sequence, and the cut that leaves K groups.

    Branches stand in the order of their first tokens. Merges that the cut undoes are
    dashed, and where it crosses a branch stands the number of the group below.

    Parameters
    ----------
    dendrogram : ndarray of shape (N - 1, 4)
        As `linkage` gives it.
    num_groups : int, optional
        K; no cut by default. The line is drawn half-way between the last merge below
        it and the first above.
    mask : ndarray of shape (N,), optional
        The mask the dendrogram was made with.
    words : sequence of str, optional
        A name for each of the N tokens; their positions by default.
    ax : matplotlib.axes.Axes, optional
        Where to draw; in a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the merges in one line collection, in the order of their rows, and the cut
        as its only line.

    Raises
    ------
    TypeError
        If a dtype does not fit or `ax` are no axes.
    ValueError
        If the dendrogram is not one, or not of this mask, or K is outside 1..N.

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
    dendrogram = _on_host("dendrogram", dendrogram)
    mask = None if mask is None else _on_host("mask", mask)
    check_dendrogram(dendrogram, mask)
    if dendrogram.ndim != 2:
        raise ValueError(
            f"`dendrogram` must have shape (N - 1, 4), got {dendrogram.shape}"
        )
    num_tokens = len(dendrogram) + 1
    _check_names("words", words, num_tokens, "tokens")
    keep = np.ones(num_tokens, np.bool_) if mask is None else mask
    tree = dendrogram[: np.count_nonzero(keep) - 1].astype(np.float64)
    labels, merges = None, len(tree)
    if num_groups is not None:
        labels = cut_linkage(dendrogram, num_groups=num_groups, mask=mask)
        merges = len(tree) - int(labels.max())
    leaves, place, height = _layout(tree, num_tokens, np.flatnonzero(keep))
    ax = _axes(ax, _width(len(leaves)), 3.5)
    top = height.max() or 1.0
    _draw_branches(ax, tree, place, height, merges)
    if labels is not None:
        _draw_cut(ax, tree, place, labels, merges)
    ax.set(xlim=(-0.8, len(leaves) - 0.2), ylim=(0, 1.08 * top), ylabel="distance")
    ax.spines[["right", "top"]].set_visible(False)
    names = map(str, leaves) if words is None else (words[leaf] for leaf in leaves)
    _name_tokens(ax.xaxis, list(names))
    return ax


def _layout(
    tree: NDArray[Any], num_tokens: int, tokens: NDArray[np.intp]
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return the tokens from left to right, and x and height of every node."""
    members = {int(token): [int(token)] for token in tokens}
    for row, (a, b) in enumerate(tree[:, :2].astype(int), num_tokens):
        first, second = sorted((members.pop(a), members.pop(b)))
        members[row] = first + second
    (leaves,) = members.values()
    place = np.zeros(2 * num_tokens - 1)
    height = np.zeros(2 * num_tokens - 1)
    place[leaves] = np.arange(len(leaves))
    for row, (a, b) in enumerate(tree[:, :2].astype(int), num_tokens):
        place[row] = (place[a] + place[b]) / 2
    height[num_tokens : num_tokens + len(tree)] = tree[:, 2]
    return leaves, place, height


def _draw_branches(
    ax: Axes,
    tree: NDArray[Any],
    place: NDArray[np.float64],
    height: NDArray[np.float64],
    merges: int,
) -> None:
    """Draw every merge as a bracket over its two branches; dashed from `merges` on."""
    child = tree[:, :2].astype(np.intp)
    x = place[child].repeat(2, axis=1)  # left, left, right, right
    y = height[child][:, [0, 0, 1, 1]]
    y[:, 1:3] = tree[:, 2:3]
    ax.add_collection(
        LineCollection(
            list(np.stack([x, y], axis=-1)),
            colors=["black"] * merges + ["0.45"] * (len(tree) - merges),
            linestyles=["-"] * merges + ["--"] * (len(tree) - merges),
            linewidths=1,
        )
    )


def _draw_cut(
    ax: Axes,
    tree: NDArray[Any],
    place: NDArray[np.float64],
    labels: NDArray[Any],
    merges: int,
) -> None:
    """Draw the cut above the first `merges` rows, and the groups' numbers on it."""
    below = tree[merges - 1, 2] if merges else 0.0
    above = tree[merges, 2] if merges < len(tree) else 1.1 * below
    cut = (below + above) / 2
    ax.axhline(cut, color=_OUTLINE, linewidth=1)
    group = np.full(len(place), -1)
    group[: len(labels)] = labels
    child = tree[:, :2].astype(np.intp)
    rows = len(labels) + np.arange(merges)
    for row, pair in zip(rows, child[:merges], strict=True):
        group[row] = group[pair[0]]
        group[pair] = -1
    for node in np.flatnonzero(group >= 0):
        ax.text(
            place[node],
            cut,
            str(group[node]),
            size="x-small",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle", "fc": "white", "ec": _OUTLINE},
        )


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
    similarity = _on_host("similarity", similarity)
    labels = _on_host("labels", labels)
    check_values("similarity", similarity, "NN")
    num_tokens = len(similarity)
    check_shape("similarity", similarity, "NN", (num_tokens, num_tokens))
    _check_labels(labels, num_tokens)
    numbers, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if not len(numbers):
        raise ValueError("`labels` must put at least one token into a group")
    order = np.argsort(labels, kind="stable")[num_tokens - sizes.sum() :]
    ax = _axes(ax, 5.8, 5)
    _draw_values(ax, similarity[np.ix_(order, order)], "cosine similarity", None)
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
    budgets, errors = _on_host("budgets", budgets), _on_host("errors", errors)
    check_given("budgets", budgets)
    check_shape("budgets", budgets, "M", budgets.shape[-1:] or (1,))
    check_num_groups(budgets, budgets.shape, name="budgets")
    check_values("errors", errors, "M", "CM")
    check_shape("errors", errors, "CM", (*errors.shape[:-1], len(budgets)))
    check_not_negative("errors", errors)
    curves = errors.reshape(-1, len(budgets))
    _check_names("names", names, len(curves), "curves")
    if max_error is not None:
        max_error = check_number("max_error", max_error, 0, np.inf, "[)")
    ax = _axes(ax, 5.5, 4)
    order = np.argsort(budgets, kind="stable")
    for number, curve in enumerate(curves[:, order]):
        label = [] if names is None else [names[number]]
        if max_error is not None:
            label += _ring_first_within(ax, budgets[order], curve, max_error)
        index = len(ax.lines)
        ax.plot(
            budgets[order],
            curve,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index % len(_DASHES)],
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
    ring: dict[str, Any] = {"facecolor": "none", "edgecolor": _OUTLINE, "zorder": 3}
    ax.scatter(budgets[within], curve[within], s=120, **ring)
    return [f"K = {least}" for least in budgets[within]]


def _draw_limit(ax: Axes, max_error: float) -> None:
    across = ax.get_yaxis_transform()
    style: dict[str, Any] = {"color": _OUTLINE, "linewidth": 1, "zorder": 1}
    ax.hlines(max_error, 0, 1, transform=across, **style)  # no curve: not in `ax.lines`
    text: dict[str, Any] = {"size": "small", "color": _OUTLINE, "va": "bottom"}
    ax.text(0.01, max_error, f"error {max_error:g}", transform=across, **text)


def _draw_values(
    ax: Axes, values: NDArray[Any], label: str, limits: tuple[float, float] | None
) -> AxesImage:
    """Draw an image and the scale of its values."""
    low, high = (None, None) if limits is None else limits
    values = values.astype(np.result_type(values.dtype, np.float32))
    image = ax.imshow(values, "cividis", vmin=low, vmax=high, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02, fraction=0.05)
    return image


def _name_tokens(axis: Axis, words: Sequence[str] | None) -> None:
    if words is None:
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_label_text("token")
        return
    axis.set_ticks(np.arange(len(words)), words, rotation=90, parse_math=False)


def _width(num_tokens: int) -> float:
    """Return the inches of a figure in which as many words can be read."""
    return min(max(6, 0.2 * num_tokens), 16)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes given, or those of a new figure of so many inches."""
    if ax is None:
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"`ax` must be matplotlib axes, got {type(ax).__name__}")
    return ax


def _on_host(name: str, x: Any) -> NDArray[Any]:
    _, x = enter(**{name: x})
    return x if on_host(x) else x.get()


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


def _check_grid(grid: Any) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"`grid` must be two integers (rows, columns), got {grid!r}")
    rows, columns = (check_integer("grid", size) for size in grid)
    if min(rows, columns) < 1:
        raise ValueError(f"`grid` must be 1 or more each way, got {grid}")
    return rows, columns


def _check_labels(labels: NDArray[Any], num_tokens: int | None) -> None:
    """Refuse what is not the labels (N,) of one sequence."""
    wanted = labels.shape[-1:] or (1,) if num_tokens is None else (num_tokens,)
    check_labels(labels, wanted, np.iinfo(np.int32).max)


def _check_names(
    name: str, names: Sequence[str] | None, count: int, things: str
) -> None:
    if names is not None and len(names) != count:
        raise ValueError(f"`{name}` must name {count} {things}, got {len(names)}")
