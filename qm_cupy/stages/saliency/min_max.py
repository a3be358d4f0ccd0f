"""Min-max scaling of rows, and its vector–Jacobian product."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def scale_min_max(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Min–max scale the last axis over its tokens; a constant row and padding are 0."""
    token: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = (x - low) / span
    return scaled if mask is None else scaled * mask


def scale_min_max_vjp(
    gradient: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return the gradient of min–max scaled rows; `gradient` is 0 for padding."""
    token: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = np.where(token, (x - low) / span, 0)
    slope = gradient.astype(x.dtype)
    for extreme, share in ((low, 1 - scaled), (high, scaled)):
        there = (x == extreme) & token
        pull = (gradient * share).sum(axis=-1, keepdims=True)
        slope = slope - there * (pull / np.maximum(there.sum(-1, keepdims=True), 1))
    with np.errstate(over="ignore"):
        return np.where((high > low) & token, slope / span, 0)
