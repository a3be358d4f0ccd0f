"""Sums and means that stay finite for finite values.

The sum of finite values can overflow where their mean does not. The functions of this
file compute as usual first, and compute again with scaled values only where a result is
not finite. So the results of usual values keep their bits.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray


def overflow_raises() -> np.errstate:
    """Return a context in which an overflow raises FloatingPointError.

    The processor notices overflows, so this costs no pass over an array.
    """
    return np.errstate(over="raise", invalid="raise")


def all_finite(x: NDArray[Any]) -> bool:
    """Return whether all entries are finite, in one pass in most cases."""
    flat = x.ravel(order="K")
    # A NaN or inf makes this sum NaN or inf. A sum of finite entries can overflow, so
    # otherwise every entry is checked. BLAS computes a dot product fastest.
    with np.errstate(over="ignore", invalid="ignore"):
        usual = np.dot(flat, flat) if x.dtype.char in "fd" else flat.sum()
        return bool(np.isfinite(usual) or np.isfinite(flat).all())


def finite_mean(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the mean along an axis, which never exceeds the largest value."""
    mean: NDArray[Any]
    with suppress(FloatingPointError), overflow_raises():
        mean = x.mean(axis=axis)
        return mean
    with np.errstate(over="ignore", invalid="ignore"):
        mean = x.mean(axis=axis)
        # Divide before the sum. The quotients are rounded, so the sum can still exceed
        # the largest value by a few units in the last place.
        parts = (x / x.shape[axis]).sum(axis=axis)
    parts = np.clip(parts, x.min(axis=axis), x.max(axis=axis))
    return np.where(np.isfinite(mean), mean, parts)


def of_finite_gradient(
    vjp: Callable[[NDArray[Any]], NDArray[Any]], gradient: NDArray[Any]
) -> NDArray[Any]:
    """Return vjp(gradient); it is infinite only where the result is out of range.

    A vector–Jacobian product is linear, so the gradient may be divided by any number,
    and the result multiplied by it. `vjp` ignores padding, and `gradient` is 0 there.
    """
    with suppress(FloatingPointError), overflow_raises():
        return vjp(gradient)
    with np.errstate(over="ignore", invalid="ignore"):
        result = vjp(gradient)
        # The square of this power of two is just above the range of the dtype, so no
        # entry is above 1 below. Divisions by powers of two change no digits.
        unit = gradient.dtype.type(2.0 ** (np.finfo(gradient.dtype).maxexp // 2))
        scaled = vjp(gradient / unit / unit) * unit * unit
    return np.where(np.isfinite(result), result, finite_or_infinite(scaled))


def finite_or_infinite(x: NDArray[Any]) -> NDArray[Any]:
    """Return a gradient that is ±inf where it is out of range, but never NaN.

    NaN is the product of 0 with an infinite factor, and becomes 0.
    """
    return np.where(np.isnan(x), x.dtype.type(0), x)


def finite_gap(
    x: NDArray[np.float64], y: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and x - y, or the halves of both if the difference overflows."""
    with suppress(FloatingPointError), overflow_raises():
        return x, x - y
    return x / 2, x / 2 - y / 2
