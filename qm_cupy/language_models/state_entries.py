"""The keys and values that a language model has read, with free slots for more.

A model has L layers of H heads of keys of width d, and reads B sequences at once. A
token, or several merged ones, have one slot; `capacity` is the number of slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from .llama_weights import Settings

_MIN_CAPACITY = 16


@dataclass
class Entries:
    """Entries that states with the same past have in common."""

    keys: Any  # (L, B, H, capacity, d), rotated
    values: Any  # (L, B, H, capacity, d)
    bias: Any  # (L, B, H, capacity)
    positions: Any  # (L, B, H, capacity) int64: those by which keys were rotated
    length: int  # slots in use; the others are not initialised

    @classmethod
    def empty(cls, x: Any, settings: Settings, capacity: int) -> "Entries":
        """Return no entries for tokens x (B, T, D)."""
        make = empty if is_cuda(x) else np.empty
        capacity = max(capacity, _MIN_CAPACITY)
        shape = settings.num_layers, len(x), settings.num_key_heads, capacity
        wide = *shape, settings.head_dim
        keys, values = make(wide, x.dtype), make(wide, x.dtype)
        return cls(keys, values, make(shape, x.dtype), make(shape, np.int64), 0)

    def with_room(self, count: int, num_new: int) -> "Entries":
        """Return the first `count` entries, followed by free slots for new ones.

        They are copied only if there are too few slots, or the slots are in use: then
        another state has continued from these entries already.
        """
        capacity = self.bias.shape[-1]
        if count == self.length and count + num_new <= capacity:
            return self
        # The capacity doubles, so the copies of n steps move O(n) entries, not O(n²).
        capacity = max(2 * count, count + num_new, _MIN_CAPACITY)
        make = empty if is_cuda(self.keys) else np.empty

        def grown(x: Any) -> Any:
            larger = make((*x.shape[:3], capacity, *x.shape[4:]), x.dtype)
            larger[:, :, :, :count] = x[:, :, :, :count]
            return larger

        keys, values = grown(self.keys), grown(self.values)
        return Entries(keys, values, grown(self.bias), grown(self.positions), count)
