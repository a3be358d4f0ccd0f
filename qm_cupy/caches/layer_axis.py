"""All layers of a cache as one layer, whose heads have a common budget.

A cache has L layers of H key heads, for B sequences.
"""

from typing import Any


def fold_layers(x: Any) -> Any:
    """Return an array (L, B, H, ...) as (B, L · H, ...), or None for None."""
    if x is None:
        return None
    moved = x.swapaxes(0, 1)  # (B, L, H, ...)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def unfold_layers(x: Any, num_layers: int) -> Any:
    """Return an array (B, L · H, ...) as (L, B, H, ...)."""
    apart = x.reshape(x.shape[0], num_layers, -1, *x.shape[2:])
    return apart.swapaxes(0, 1).copy()
