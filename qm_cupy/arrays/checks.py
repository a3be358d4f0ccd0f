"""Checks of arguments. Each raises an error that says what is wrong.

A wrong dtype or type raises TypeError, and a wrong shape or value raises ValueError.
Values of CUDA arrays are not checked, because the CPU would have to wait for the GPU.

Axes: there are B sequences of N tokens of width D. K is the number of groups that a
sequence is merged to. ``wanted`` is the shape that an array must have.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import finite_checked
from .libraries import is_cuda

_ENTRIES = 1 << 20  # of a large array, so many entries are checked at once


def check_finite_values(
    name: str, x: NDArray[Any], *masks: NDArray[np.bool_] | None
) -> None:
    """Raise if there is a NaN or Inf; the message has the index of the first one.

    Entries where one of the masks, broadcast to x, is False may have any value.
    """
    if not _values_checked(x):
        return
    # A NaN or Inf makes the sum NaN or Inf. If the sum is finite, one pass without a
    # temporary array is therefore enough. A sum of finite entries can overflow, so
    # otherwise every entry is checked.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum()):
            return
    wrong = _first_wrong(x, lambda part: ~np.isfinite(part), masks)
    if wrong is not None:
        raise ValueError(f"`{name}` must be finite, got {x[wrong]} at index {wrong}")


def _first_wrong(
    x: NDArray[Any],
    is_wrong: Callable[[NDArray[Any]], NDArray[np.bool_]],
    masks: Iterable[NDArray[np.bool_] | None],
) -> tuple[int, ...] | None:
    """Return the index of the first entry that is wrong where no mask is False.

    `is_wrong` returns booleans for a part of `x`. A large array is checked in parts, so
    that the booleans need little memory.
    """
    full = [np.broadcast_to(mask, x.shape) for mask in masks if mask is not None]
    if x.size <= _ENTRIES or x.ndim < 2:
        wrong = is_wrong(x)
        for mask in full:
            wrong &= mask
        index = np.argwhere(wrong)
        return tuple(map(int, index[0])) if len(index) else None
    step = max(1, _ENTRIES // x[0].size)
    for start in range(0, len(x), step):
        # One row of x may be large too, so it is checked in parts of its own.
        part = start if step == 1 else slice(start, start + step)
        first = _first_wrong(x[part], is_wrong, [mask[part] for mask in full])
        if first is not None and step == 1:
            return start, *first
        if first is not None:
            return start + first[0], *first[1:]
    return None


def _values_checked(x: NDArray[Any]) -> bool:
    """Return whether values are checked: on the CPU, if `check_finite` is on."""
    return finite_checked() and not is_cuda(x)


def check_is_array(name: str, x: Any) -> None:
    """Raise if the argument has no dtype, such as None or a Python number."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(x).__name__}")


def check_floating(name: str, x: NDArray[Any]) -> None:
    """Raise unless the dtype is float16, bfloat16, float32 or float64."""
    check_is_array(name, x)
    # By name: ml_dtypes gives bfloat16 the kind "V", and float8_e5m2 the kind "f".
    if x.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )


def check_values(name: str, x: NDArray[Any], *layouts: str) -> None:
    """Raise unless the array is floating, finite and has one of the layouts.

    A layout has one letter per axis, such as "BND". Only the axis B may be empty.
    """
    check_layout(name, x, *layouts)
    check_finite_values(name, x)


def check_layout(name: str, x: NDArray[Any], *layouts: str) -> None:
    """Raise unless the array is floating and has one of the layouts."""
    check_floating(name, x)
    check_axes(name, x.shape, *layouts)


def check_axes(name: str, shape: tuple[int, ...], *layouts: str) -> None:
    """Raise if no layout has this number of axes, or an axis other than B is empty."""
    # No two layouts have the same length, so the number of axes identifies the layout.
    if len(shape) not in [len(layout) for layout in layouts]:
        wanted = any_of([f"({', '.join(layout)})" for layout in layouts])
        raise ValueError(f"`{name}` must have shape {wanted}, got {shape}")
    layout = layouts[[len(layout) for layout in layouts].index(len(shape))]
    empty = [axis for axis, size in zip(layout, shape, strict=True) if size == 0]
    if set(empty) - {"B"}:  # an empty batch is valid; an empty sequence is a mistake
        raise ValueError(f"`{name}` must not be empty, got shape {shape}")


def check_tokens(
    tokens: NDArray[Any], name: str = "tokens", mask: NDArray[Any] | None = None
) -> NDArray[np.bool_] | None:
    """Raise unless the tokens are (N, D) or (B, N, D), floating and finite.

    Check the mask too, and return it as `check_mask` does. Padding may be NaN.
    """
    check_layout(name, tokens, "ND", "BND")
    mask = check_mask(mask, tokens.shape[:-1])
    check_finite_values(name, tokens, None if mask is None else mask[..., None])
    return mask


def check_shape(name: str, x: NDArray[Any], axes: str, wanted: tuple[int, ...]) -> None:
    """Raise unless the shape is the wanted one; `axes` are letters for the error."""
    if x.shape != wanted:
        # For a single sequence the shape has fewer axes, so drop the leading letters:
        # "BN" becomes "N".
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
    """Return the gradient of a result as an array of the wanted shape, or raise.

    If the wanted shape is (), a number is allowed. It becomes an array of the library
    and on the device of `inputs`. Where `mask` is False, the gradient may have any
    value.
    """
    if wanted == () and not hasattr(gradient, "__dlpack__"):
        number = np.zeros((), np.float64, like=inputs)
        number[...] = check_number(name, gradient, -np.inf, np.inf, "()")
        return number
    check_floating(name, gradient)
    check_shape(name, gradient, axes, wanted)
    # The gradient of padding has no effect on the gradients of the inputs, so it may be
    # NaN.
    check_finite_values(name, gradient, mask)
    return gradient


def check_mask(
    mask: NDArray[Any] | None, wanted: tuple[int, ...]
) -> NDArray[np.bool_] | None:
    """Return a mask as booleans of the wanted shape (B, N); None stays None.

    The mask may also contain the integers 0 and 1. A mask (N,) is that of every
    sequence. Raise for other masks, and if a sequence has no tokens.
    """
    if mask is None:
        return None
    check_is_array("mask", mask)
    if mask.dtype != np.bool_ and mask.dtype.kind not in "iu":
        raise wrong_mask_dtype(mask.dtype)
    check_batch_shape("mask", mask, wanted)
    if mask.dtype != np.bool_:
        mask = _as_booleans(mask)
    if not is_cuda(mask):  # otherwise the CPU would have to wait for the values
        empty = np.argwhere(~mask.any(axis=-1))
        if len(empty):
            where = f"sequence {tuple(map(int, empty[0]))}" if mask.ndim > 1 else "it"
            raise ValueError(
                f"`mask` must leave at least one token, but {where} has none (True or "
                "1 = token)"
            )
    return mask if mask.shape == wanted else np.broadcast_to(mask, wanted)


def wrong_mask_dtype(dtype: Any) -> TypeError:
    """Return the error for a mask that is neither boolean nor integer."""
    return TypeError(
        "`mask` must be boolean or contain the integers 0 and 1 (True or 1 = token), "
        f"got {dtype}"
    )


def _as_booleans(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask of integers as booleans; raise for other integers than 0 and 1."""
    boolean: NDArray[np.bool_] = mask != 0
    if not is_cuda(mask):
        wrong = np.argwhere(boolean & (mask != 1))
        if len(wrong):
            index = tuple(map(int, wrong[0]))
            raise ValueError(
                "`mask` must be boolean or contain only 0 and 1 (1 = token), got "
                f"{mask[index]} at index {index}"
            )
    return boolean


def check_batch_shape(name: str, x: Any, wanted: tuple[int, ...]) -> None:
    """Raise unless the shape is the wanted one (B, N), or (N,) for every sequence."""
    if tuple(x.shape) not in (wanted, wanted[-1:]):
        batched = f" or (B, N) = {wanted}" if len(wanted) > 1 else ""
        raise ValueError(
            f"`{name}` must have shape (N) = {wanted[-1:]}{batched}, got "
            f"{tuple(x.shape)}"
        )


def check_labelled_tokens(
    tokens: NDArray[Any],
    labels: NDArray[Any] | None,
    *,
    mass: NDArray[Any] | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> None:
    """Raise if tokens or their masses are not valid.

    A label of -1 or the mask marks padding, which may have any value.
    """
    labelled = None
    if labels is not None and _values_checked(tokens):
        labelled = labels >= 0
    masks = (x[..., None] for x in (labelled, mask) if x is not None)
    check_finite_values("tokens", tokens, *masks)
    check_mass(mass, tokens.shape[:-1], mask=labelled)


def check_mass(
    mass: NDArray[Any] | None,
    wanted: tuple[int, ...],
    name: str = "mass",
    mask: NDArray[np.bool_] | None = None,
) -> None:
    """Raise unless weights are finite, non-negative and of shape (B, N).

    Where a mask is False, they may have any value.
    """
    if mass is None:
        return
    check_floating(name, mass)
    check_shape(name, mass, "BN", wanted)
    check_finite_values(name, mass, mask)
    check_not_negative(name, mass, mask)


def check_not_negative(
    name: str, x: NDArray[Any], *masks: NDArray[np.bool_] | None
) -> None:
    """Raise if there is a negative entry; the message has the index of the first one.

    Entries where one of the masks, broadcast to x, is False may have any value.
    """
    if not _values_checked(x) or not x.size:
        return
    # The least entry is NaN if padding is NaN, so compare with >= and not with <.
    with np.errstate(invalid="ignore"):  # bfloat16 warns of NaN
        if x.min() >= 0:
            return
        wrong = _first_wrong(x, lambda part: part < 0, masks)
    if wrong is not None:
        raise ValueError(f"`{name}` must be ≥ 0, got {x[wrong]} at index {wrong}")


def check_integer(name: str, value: Any) -> int:
    """Return a Python integer; raise for a bool, a float or a NumPy array with axes."""
    # `operator.index` accepts True as 1, but a bool is probably a mistake.
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
        raise TypeError(f"`{name}` must be an integer, got a bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, got {type(value).__name__}"
        ) from None


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed within 0..2⁶⁴ - 1, the key of the generator Philox4x32-10."""
    value = check_integer(name, seed)
    if not 0 <= value < 2**64:
        raise ValueError(f"`{name}` must lie in 0..2**64 - 1, got {value}")
    return value


def check_number(name: str, value: Any, low: float, high: float, closed: str) -> float:
    """Return a float within an interval from `low` to `high`.

    `closed` has the brackets of the interval: "(]" excludes `low` and includes `high`.
    """
    # A NumPy array without axes is a number. A tensor is not: it may be on a GPU.
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    numbers = float | int | np.number | Fraction | Decimal
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    number = float(value)
    above = number >= low if closed[0] == "[" else number > low
    below = number <= high if closed[1] == "]" else number < high
    if not (above and below):  # NaN fails both comparisons
        interval = f"{closed[0]}{low:g}, {high:g}{closed[1]}"
        raise ValueError(f"`{name}` must lie in {interval}, got {value}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise if the value is not one of the choices."""
    if value not in choices:
        wanted = any_of([f'"{choice}"' for choice in choices])
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def check_labels(
    labels: NDArray[Any],
    wanted: tuple[int, ...] | None,
    counts: NDArray[np.int64] | int,
) -> None:
    """Raise unless labels are integers within -1..K-1 of the wanted shape (B, N).

    If `wanted` is None, any shape (N,) or (B, N) is allowed.
    """
    check_is_array("labels", labels)
    if labels.dtype.kind not in "iu":  # signed or unsigned, of any width
        raise TypeError(f"`labels` must be integers, got {labels.dtype}")
    if wanted is None and (labels.ndim not in (1, 2) or labels.shape[-1] == 0):
        raise ValueError(f"`labels` must have shape (N) or (B, N), got {labels.shape}")
    if wanted is not None:
        check_shape("labels", labels, "BN", wanted)
    if is_cuda(labels) or labels.size == 0:  # an empty array has no minimum
        return
    low, high = labels.min(axis=-1), labels.max(axis=-1)  # () or (B,)
    wrong = np.argwhere((low < -1) | (high >= counts))  # padding has the label -1
    if len(wrong):
        at = tuple(wrong[0])  # the first wrong sequence
        where = f" in sequence {int(at[0])}" if at else ""
        last = np.broadcast_to(counts, high.shape)[at] - 1
        got = f"{low[at]}..{high[at]}"
        raise ValueError(f"`labels` must lie in -1..{last}, got {got}{where}")


def check_out(
    out: NDArray[Any] | None,
    wanted: tuple[int, ...],
    dtype: np.dtype[Any],
    name: str = "out",
    axes: str = "BND",
) -> None:
    """Raise if `out` has a wrong shape or dtype, or is read-only.

    `convert_inputs` has checked that it does not overlap another array.
    """
    if out is None:
        return
    check_is_array(name, out)
    check_shape(name, out, axes, wanted)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype}, got {out.dtype}")
    # A kernel writes directly to `out`, so `out` must have the layout of a new array.
    # CuPy's flags have no `writeable`, because CuPy arrays can always be written.
    if not (out.flags.c_contiguous and getattr(out.flags, "writeable", True)):
        raise ValueError(f"`{name}` must be C-contiguous and writeable")


def any_of(words: Sequence[str]) -> str:
    """Return "a, b or c" for error messages."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def check_positions(
    name: str, positions: NDArray[Any] | None, wanted: tuple[int, ...], learned: int
) -> None:
    """Raise unless positions are integers (B, K) below `learned`.

    `learned` is the number of positions that a prior has learned; 0 means no limit.
    """
    if positions is None:
        return
    if positions.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got {positions.dtype}")
    check_shape(name, positions, "BK", wanted)
    if not learned or is_cuda(positions) or not positions.size:
        return
    # The prior has a learned vector for each position below `learned`, and no others.
    if positions.max() >= learned:
        raise ValueError(
            f"`{name}` must be below {learned}, the number of positions that the prior "
            f"has learned, got {positions.max()}"
        )


def check_sizes(name: str, sizes: NDArray[Any] | None, wanted: tuple[int, ...]) -> None:
    """Raise unless sizes, the numbers of tokens of groups, are (B, K) and ≥ 0."""
    if sizes is None:
        return
    if sizes.dtype.kind not in "iu":  # floating sizes are allowed if they are finite
        check_floating(name, sizes)
        check_finite_values(name, sizes)
    check_shape(name, sizes, "BK", wanted)
    check_not_negative(name, sizes)
