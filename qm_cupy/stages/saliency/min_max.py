"""Min–max scaling of rows, and its vector–Jacobian product.

A row x has N values, one for each token; padding does not count. `low` is the smallest
value, `high` is the largest value, and w = high - low. The result is y = (x - low) / w.
The vector–Jacobian product is the gradient of a loss ℒ with respect to x.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.finite import of_finite_gradient
from ...arrays.shapes import sum_of_tokens


def scale_min_max(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Scale each row of (..., N) to [0, 1]; constant rows and padding become 0."""
    return _scaled(x, mask)[0]


def scale_min_max_vjp(
    gradient: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return ∂ℒ/∂x (..., N) of the rows x, from the gradient ∂ℒ/∂y of the scaled rows.

    `gradient` must be 0 for padding.
    """
    valid: Any = True if mask is None else mask
    scaled, low, high, width = _scaled(x, mask)
    # An infinite w stands for 2 (high/2 - low/2).
    wide = np.isinf(width)
    half = np.where(wide, high / 2 - low / 2, 1) if wide.any() else None

    def vjp(gradient: NDArray[Any]) -> NDArray[Any]:
        # ∂y/∂x = 1/w, ∂y/∂low = (y - 1)/w and ∂y/∂high = -y/w. `result` is w ∂ℒ/∂x; the
        # last lines divide it by w.
        result = gradient
        for extreme, weight in ((low, 1 - scaled), (high, scaled)):
            # The gradient of an extreme goes to the tokens that have this value. If n
            # tokens tie, each token gets 1/n of the gradient.
            tied = (x == extreme) & valid
            total = sum_of_tokens(gradient * weight, mask)  # -w ∂ℒ/∂extreme
            count = np.maximum(tied.sum(-1, keepdims=True), 1)
            result = result - tied * (total / count)
        slope = result / width
        if half is not None:
            slope = np.where(wide, result / 2 / half, slope)
        # The gradient of a constant row is 0.
        return np.where((high > low) & valid, slope, 0)

    # For a tiny w the quotient may be out of range; then inf is the right result.
    return of_finite_gradient(vjp, gradient.astype(x.dtype))


def _scaled(
    x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return y (..., N), and `low`, `high` and w (..., 1), of the rows x.

    w is infinite if high - low overflows; y is right in this case too.
    """
    valid: Any = True if mask is None else mask  # (..., N)
    # NumPy needs initial values for `where`. Any token replaces them; `check_mask`
    # refuses a row without tokens.
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=valid)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=valid)
    # A constant row has w = 0 and x - low = 0. With the divisor 1, y is 0 there.
    with np.errstate(over="ignore"):  # w may be infinite
        width = np.where(high > low, high - low, 1)
        gap = x - low
        # The quotient of padding could overflow, so padding becomes 0 before the
        # division.
        gap = gap if mask is None else np.where(mask, gap, 0)
    wide = np.isinf(width)
    if not wide.any():
        return gap / width, low, high, width
    # high - low is above the largest number of the dtype, but y is the same for x / 2.
    half_gap = np.where(valid & wide, x / 2 - low / 2, 0)
    half_width = np.where(wide, high / 2 - low / 2, 1)
    scaled = np.where(wide, half_gap / half_width, np.where(wide, 0, gap) / width)
    return scaled, low, high, width
