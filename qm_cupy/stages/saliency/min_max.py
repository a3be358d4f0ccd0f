"""Min–max scaling of rows, and its vector–Jacobian product.

A row x has N values, one for each token; padding does not count. `low` is the smallest
value, `high` is the largest value, and w = high - low. The result is y = (x - low) / w.
The vector–Jacobian product is the gradient of a loss ℒ with respect to x.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def scale_min_max(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Scale each row of (..., N) to [0, 1]; constant rows and padding become 0."""
    valid: Any = True if mask is None else mask  # (..., N)
    # NumPy needs initial values for `where`. Any token replaces them; `check_mask`
    # refuses a row without tokens.
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=valid)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=valid)
    # A constant row has w = 0 and x - low = 0. With the divisor 1, y is 0 there.
    width = np.where(high > low, high - low, 1)  # w, (..., 1)
    # The quotient of padding may overflow, so do not multiply it by the mask.
    return np.where(valid, x - low, 0) / width  # y, (..., N)


def scale_min_max_vjp(
    gradient: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return ∂ℒ/∂x (..., N) of the rows x, from the gradient ∂ℒ/∂y of the scaled rows.

    `gradient` must be 0 for padding.
    """
    # Repeat the steps of `scale_min_max`.
    valid: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=valid)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=valid)
    width = np.where(high > low, high - low, 1)  # w, (..., 1)
    scaled = np.where(valid, (x - low) / width, 0)  # y, (..., N)
    # ∂y/∂x = 1/w, ∂y/∂low = (y - 1)/w and ∂y/∂high = -y/w. `result` is w ∂ℒ/∂x; the
    # last line divides it by w.
    result = gradient.astype(x.dtype)
    for extreme, weight in ((low, 1 - scaled), (high, scaled)):
        # The gradient of an extreme goes to the tokens that have this value. If n
        # tokens tie, each token gets 1/n of the gradient.
        tied = (x == extreme) & valid
        total = (gradient * weight).sum(axis=-1, keepdims=True)  # -w ∂ℒ/∂extreme
        result = result - tied * (total / np.maximum(tied.sum(-1, keepdims=True), 1))
    # The gradient of a constant row is 0. For a tiny w the quotient may overflow; then
    # inf is the right result.
    with np.errstate(over="ignore"):
        return np.where((high > low) & valid, result / width, 0)
