"""Sums and means that stay finite for finite values.

The sum of finite values can overflow where their mean does not. The functions of this
file compute as usual first, and compute again with scaled values only where a result is
not finite. So the results of usual values keep their bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def all_finite(x: NDArray[Any]) -> bool:
    """Return whether all entries are finite, in one pass in most cases."""
    # A NaN or inf makes the sum NaN or inf. A sum of finite entries can overflow, so
    # otherwise every entry is checked.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(x.sum()) or np.isfinite(x).all())


def finite_mean(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the mean along an axis, which never exceeds the largest value."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean: NDArray[Any] = x.mean(axis=axis)
        if all_finite(mean):
            return mean
        # Divide before the sum. The quotients are rounded, so the sum can still exceed
        # the largest value by a few units in the last place.
        parts = (x / x.shape[axis]).sum(axis=axis)
    parts = np.clip(parts, x.min(axis=axis), x.max(axis=axis))
    return np.where(np.isfinite(mean), mean, parts)
