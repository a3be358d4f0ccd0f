"""All layers of a cache as one layer, whose heads have a common budget.

A cache has L layers of H key heads, for B sequences.
"""

from typing import Any

import numpy as np


def fold_layers(x: Any) -> Any:
    """Return an array (L, B, H, ...) as (B, L · H, ...), or None for None."""
    if x is None:
        return None
    moved = np.moveaxis(x, 0, 1)  # (B, L, H, ...)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def unfold_layers(x: Any, num_layers: int) -> Any:
    """Return an array (B, L · H, ...) as (L, B, H, ...)."""
    apart = x.reshape(x.shape[0], num_layers, -1, *x.shape[2:])
    return np.moveaxis(apart, 1, 0).copy()
