import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..settings import finite_checked
from .libraries import is_cuda, may_share_memory

_INT32 = 2**31 - 1  # the most of anything that kernels count


def check_finite_values(name: str, x: NDArray[Any]) -> None:
    """Refuse NaN and Inf, saying where the first one is."""
    if not _values_checked(x):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum()):  # one cheap pass; only an overflow looks closer
            return
    wrong = np.argwhere(~np.isfinite(x))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        raise ValueError(f"`{name}` must be finite, got {x[place]} at index {place}")


def _values_checked(x: NDArray[Any]) -> bool:
    return finite_checked() and not is_cuda(x)


def check_is_array(name: str, x: Any) -> None:
    """Refuse None and numbers in the place of an array."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(x).__name__}")


def check_floating(name: str, x: NDArray[Any]) -> None:
    """Refuse all but float16, bfloat16, float32 and float64."""
    check_is_array(name, x)
    usual = x.dtype.kind == "f" and x.dtype.itemsize <= 8
    if not usual and x.dtype.name != "bfloat16":
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )


def check_values(name: str, x: NDArray[Any], *layouts: str) -> None:
    """Refuse what is not a finite, non-empty float array with axes as in a layout."""
    check_floating(name, x)
    check_axes(name, x.shape, *layouts)
    check_finite_values(name, x)


def check_axes(name: str, shape: tuple[int, ...], *layouts: str) -> None:
    """Refuse a shape whose axes are not those of a layout, or are empty but for B."""
    if len(shape) not in [len(layout) for layout in layouts]:
        wanted = any_of([f"({', '.join(layout)})" for layout in layouts])
        raise ValueError(f"`{name}` must have shape {wanted}, got {shape}")
    layout = layouts[[len(layout) for layout in layouts].index(len(shape))]
    empty = [axis for axis, size in zip(layout, shape, strict=True) if size == 0]
    if set(empty) - {"B"}:  # an empty batch is a batch; an empty sequence is a mistake
        raise ValueError(f"`{name}` must not be empty, got shape {shape}")


def check_tokens(tokens: NDArray[Any], name: str = "tokens") -> None:
    """Refuse what is not (N, D) or (B, N, D) floating and finite."""
    check_values(name, tokens, "ND", "BND")


def check_shape(name: str, x: NDArray[Any], axes: str, wanted: tuple[int, ...]) -> None:
    """Refuse another shape than the wanted one, whose last axes `axes` name."""
    if x.shape != wanted:
        letters = ", ".join(axes[len(axes) - len(wanted) :])
        raise ValueError(
            f"`{name}` must have shape ({letters}) = {wanted}, got {tuple(x.shape)}"
        )


def check_gradient(
    gradient: Any,
    wanted: tuple[int, ...],
    axes: str,
    inputs: NDArray[Any] | None = None,
    name: str = "gradient",
    mask: NDArray[np.bool_] | None = None,
) -> Any:
    """Return the gradient of a result of the wanted shape, beside the inputs.

    It may be a number where that shape is (); where a mask is False, anything.
    """
    if wanted == () and not hasattr(gradient, "__dlpack__"):
        number = np.zeros((), np.float64, like=inputs)
        number[...] = check_number(name, gradient, -np.inf, np.inf, "()")
        return number
    check_floating(name, gradient)
    check_shape(name, gradient, axes, wanted)
    seen = gradient
    if mask is not None and _values_checked(gradient):
        seen = np.where(mask, gradient, gradient.dtype.type(0))
    check_finite_values(name, seen)
    return gradient


def check_mask(mask: NDArray[Any] | None, wanted: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean (B, N) or leaves a sequence without tokens."""
    if mask is None:
        return
    check_is_array("mask", mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"`mask` must be boolean (True = token), got {mask.dtype}")
    check_shape("mask", mask, "BN", wanted)
    if is_cuda(mask):
        return
    empty = np.argwhere(~mask.any(axis=-1))
    if len(empty):
        where = f"sequence {tuple(map(int, empty[0]))}" if mask.ndim > 1 else "it"
        raise ValueError(f"`mask` must leave at least one token, but {where} has none")


def check_mass(
    mass: NDArray[Any] | None, wanted: tuple[int, ...], name: str = "mass"
) -> None:
    """Refuse weights that are not finite, non-negative and of shape (B, N)."""
    if mass is None:
        return
    check_floating(name, mass)
    check_shape(name, mass, "BN", wanted)
    check_finite_values(name, mass)
    check_not_negative(name, mass)


def check_not_negative(name: str, x: NDArray[Any]) -> None:
    """Refuse negative entries."""
    if _values_checked(x) and x.size and x.min() < 0:
        place = tuple(map(int, np.unravel_index(x.argmin(), x.shape)))
        raise ValueError(f"`{name}` must be ≥ 0, got {x[place]} at index {place}")


def check_scores(largest: float) -> None:
    """Refuse values whose products leave float64."""
    if largest >= 1e300:
        raise ValueError("the values are too large: their attention scores overflow")


def check_num_groups(
    num_groups: Any,
    batch: tuple[int, ...],
    most: Any = None,
    name: str = "num_groups",
) -> NDArray[np.int64]:
    """Return K of every sequence (shape `batch`), each within 1..`most`."""
    unlimited = most is None or is_cuda(most)  # of a mask on a GPU: not looked at
    if is_per_sequence(num_groups):
        if num_groups.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must be integers, got {num_groups.dtype}")
        check_shape(name, num_groups, "B", batch)
        counts = num_groups.astype(np.int64)
    else:
        count = check_integer(name, num_groups)
        counts = np.full(batch, count, dtype=np.int64)
        limit = _INT32 if unlimited else most
        if not isinstance(limit, int):
            limit = int(np.min(limit, initial=_INT32))
        if 1 <= count <= limit:
            return counts
    limits = np.asarray(_INT32 if unlimited else most)
    wrong = (counts < 1) | (counts > limits)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        limit = np.broadcast_to(limits, counts.shape)
        where = f" for sequence {int(at[0])}" if at and limits.ndim else ""
        top = ".." if unlimited else f"..{limit[at]} (its tokens)"
        raise ValueError(f"`{name}` must lie in 1{top}{where}, got {counts[at]}")
    return counts


class GroupCounts(NamedTuple):
    """K of every sequence (B,), and the largest: of an empty batch too, if K is one."""

    counts: NDArray[np.int64]
    max_groups: int


def check_group_counts(
    num_groups: Any,
    batch: tuple[int, ...],
    limit: Any = None,
    name: str = "num_groups",
) -> GroupCounts:
    """Return K of every sequence as `check_num_groups` does, and the largest."""
    counts = check_num_groups(num_groups, batch, limit, name)
    several = is_per_sequence(num_groups)
    return GroupCounts(counts, int(counts.max(initial=0) if several else num_groups))


def is_per_sequence(count: Any) -> bool:
    """Whether a count is an array of one per sequence rather than one for all."""
    return isinstance(count, np.ndarray) and count.ndim > 0


def check_integer(name: str, value: Any) -> int:
    """Return a Python integer; bool, float and arrays of several are refused."""
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
        raise TypeError(f"`{name}` must be an integer, got a bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, got {type(value).__name__}"
        ) from None


def check_seed(seed: Any) -> int:
    """Return a seed within 0..2⁶⁴ - 1."""
    value = check_integer("seed", seed)
    if not 0 <= value < 2**64:
        raise ValueError(f"`seed` must lie in 0..2**64 - 1, got {value}")
    return value


def check_number(name: str, value: Any, low: float, high: float, closed: str) -> float:
    """Return a float within an interval; `closed` is its brackets, such as "(]"."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.number):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    number = float(value)
    above = number >= low if closed[0] == "[" else number > low
    below = number <= high if closed[1] == "]" else number < high
    if not (above and below):
        interval = f"{closed[0]}{low:g}, {high:g}{closed[1]}"
        raise ValueError(f"`{name}` must lie in {interval}, got {value}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a word that is not one of the choices."""
    if value not in choices:
        wanted = any_of([f'"{choice}"' for choice in choices])
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def check_labels(
    labels: NDArray[Any],
    wanted: tuple[int, ...] | None,
    counts: NDArray[np.int64] | int,
) -> None:
    """Refuse labels that are not integers within -1..K-1 of shape (B, N)."""
    check_is_array("labels", labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"`labels` must be integers, got {labels.dtype}")
    if wanted is None and (labels.ndim not in (1, 2) or labels.shape[-1] == 0):
        raise ValueError(f"`labels` must have shape (N) or (B, N), got {labels.shape}")
    if wanted is not None:
        check_shape("labels", labels, "BN", wanted)
    if is_cuda(labels) or labels.size == 0:
        return
    low, high = labels.min(axis=-1), labels.max(axis=-1)
    wrong = np.argwhere((low < -1) | (high >= counts))
    if len(wrong):
        at = tuple(wrong[0])
        where = f" in sequence {int(at[0])}" if at else ""
        most = np.broadcast_to(counts, high.shape)[at] - 1
        got = f"{low[at]}..{high[at]}"
        raise ValueError(f"`labels` must lie in -1..{most}, got {got}{where}")


def check_out(
    out: NDArray[Any] | None,
    wanted: tuple[int, ...],
    dtype: np.dtype[Any],
    *inputs: NDArray[Any] | None,
    name: str = "out",
    axes: str = "BND",
) -> None:
    """Refuse an `out` that does not fit, cannot be written or lies in an input."""
    if out is None:
        return
    check_is_array(name, out)
    check_shape(name, out, axes, wanted)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype}, got {out.dtype}")
    if not (out.flags.c_contiguous and getattr(out.flags, "writeable", True)):
        raise ValueError(f"`{name}` must be C-contiguous and writeable")
    on_host = isinstance(out, np.ndarray)
    overlap = np.may_share_memory if on_host else may_share_memory
    if any(x is not None and overlap(out, x) for x in inputs):
        raise ValueError(f"`{name}` must not share memory with an input")


def any_of(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def check_counts(tokens: NDArray[Any], num_groups: Any) -> NDArray[np.int64]:
    """Return how many of the tokens (..., K, D) of each sequence are no padding."""
    most = tokens.shape[-2]
    return check_num_groups(
        most if num_groups is None else num_groups, tokens.shape[:-2], most
    )


def check_positions(
    name: str, positions: NDArray[Any] | None, wanted: tuple[int, ...], learned: int
) -> None:
    """Refuse what is not integer (B, K), or beyond the `learned` ones, if any are."""
    if positions is None:
        return
    if positions.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got {positions.dtype}")
    check_shape(name, positions, "BK", wanted)
    if not learned or is_cuda(positions) or not positions.size:
        return
    if positions.max() >= learned:
        raise ValueError(
            f"`{name}` must be below the {learned} that the prior has learned, "
            f"got {positions.max()}"
        )


def check_sizes(name: str, sizes: NDArray[Any] | None, wanted: tuple[int, ...]) -> None:
    """Refuse what is not a number of tokens (B, K), at least 0."""
    if sizes is None:
        return
    if sizes.dtype.kind not in "iu":
        check_floating(name, sizes)
        check_finite_values(name, sizes)
    check_shape(name, sizes, "BK", wanted)
    check_not_negative(name, sizes)
