"""Min–max scaling of rows, and its vector–Jacobian product.

With lo and hi the extremes of a row and w = hi - lo, the result is y = (x - lo) / w.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def scale_min_max(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Scale each row to [0, 1] over its tokens; constant rows and padding get 0."""
    token: Any = True if mask is None else mask
    # Padding does not count for the extremes.
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = (x - low) / span  # (..., N)
    return scaled if mask is None else scaled * mask


def scale_min_max_vjp(
    gradient: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return the gradient with respect to the rows `x` before they were scaled.

    `gradient` is with respect to the scaled rows and must be 0 for padding.
    """
    token: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = np.where(token, (x - low) / span, 0)
    slope = gradient.astype(x.dtype)
    # ∂y/∂x = 1/w, ∂y/∂lo = (y - 1)/w and ∂y/∂hi = -y/w. The gradients of lo and hi go
    # to the tokens at the extreme; n tied tokens get 1/n each.
    for extreme, weight in ((low, 1 - scaled), (high, scaled)):
        tied = (x == extreme) & token
        pull = (gradient * weight).sum(axis=-1, keepdims=True)  # (..., 1)
        slope = slope - tied * (pull / np.maximum(tied.sum(-1, keepdims=True), 1))
    # A constant row has no slope. A tiny w may give inf, which is then the result.
    with np.errstate(over="ignore"):
        return np.where((high > low) & token, slope / span, 0)
