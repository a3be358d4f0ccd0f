"""Functions that several plots use: colours, axes, images, names of tokens, checks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..arrays.checks import check_integer, check_labels
from ..arrays.conversion import convert_inputs
from ..arrays.libraries import on_host
from ..results import Merged

# The colours of Okabe and Ito, without their yellow, which is hard to see on white.
COLOURS = (
    "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
# There are 7 colours and 4 dashes. They have no common factor, so 28 lines differ in
# colour or dashes.
DASHES = "-", "--", "-.", ":"
# The colour of outlines, which is darker than every colour of a lightened picture.
OUTLINE = "#b3001b"


def draw_values(
    ax: Axes, values: NDArray[Any], label: str, limits: tuple[float, float] | None
) -> AxesImage:
    """Draw values as an image, with a colour bar."""
    low, high = (None, None) if limits is None else limits
    values = values.astype(np.result_type(values.dtype, np.float32))  # bfloat16 too
    image = ax.imshow(values, "cividis", vmin=low, vmax=high, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02, fraction=0.05)
    return image


def name_tokens(axis: Axis, words: Sequence[str] | None) -> None:
    """Label an axis with the words, or with the positions of tokens."""
    if words is None:
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_label_text("token")
        return
    # A word may contain "$", which is text here and not the start of a formula.
    axis.set_ticks(np.arange(len(words)), words, rotation=90, parse_math=False)


def figure_width(num_tokens: int) -> float:
    """Return a width in inches: 0.2 for each token, but at least 6 and at most 16."""
    return min(max(6, 0.2 * num_tokens), 16)


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the axes of a new figure; width and height are in inches."""
    if ax is None:
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"`ax` must be matplotlib axes, got {type(ax).__name__}")
    return ax


def field_of(name: str, x: Any, field: str) -> Any:
    """Return `x`, or the field of the only sequence of a `Merged`: an array (N,)."""
    if not isinstance(x, Merged):
        return x
    values = getattr(x, field)
    if values.ndim == 1:
        return values
    batch = values.shape[0]
    if batch != 1:
        raise ValueError(
            f"`{name}` must be of one sequence, got a Merged of B = {batch}: pass "
            f"`merged.{field}[b]` for sequence b"
        )
    return values[0, :]


def to_host(name: str, x: Any) -> NDArray[Any]:
    """Return an array of any library as the NumPy array that matplotlib needs."""
    _, x = convert_inputs({name: x})
    return x if on_host(x) else x.get()


def check_grid(grid: Any) -> tuple[int, int]:
    """Return rows and columns as integers, or raise."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"`grid` must be two integers (rows, columns), got {grid!r}")
    rows, columns = (check_integer("grid", size) for size in grid)
    if min(rows, columns) < 1:
        raise ValueError(
            f"`grid` must be 1 or more in both rows and columns, got {grid}"
        )
    return rows, columns


def check_group_labels(labels: NDArray[Any], num_tokens: int | None) -> None:
    """Raise unless these are the labels (N,) of one sequence."""
    wanted = labels.shape[-1:] or (1,) if num_tokens is None else (num_tokens,)
    # The number of groups is unknown, so every label from -1 on is allowed.
    check_labels(labels, wanted, np.iinfo(np.int32).max)


def check_names(
    name: str, names: Sequence[str] | None, count: int, objects: str
) -> None:
    """Raise unless there is one name for each of the `count` objects."""
    if names is not None and len(names) != count:
        raise ValueError(
            f"`{name}` must have length {count}, the number of {objects}, "
            f"got {len(names)}"
        )
