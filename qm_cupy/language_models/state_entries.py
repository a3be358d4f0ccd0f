"""The keys and values that a language model has read, with free slots for more.

A layer has H heads of keys of width d, and reads B sequences at once. A token, or
several merged ones, have one slot; `capacity` is the number of slots. After a merge,
layers may have different numbers of entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from .llama_weights import Settings

_MIN_CAPACITY = 16


@dataclass
class Entries:
    """Entries of a layer that states with the same past have in common."""

    keys: Any  # (B, H, capacity, d), rotated
    values: Any  # (B, H, capacity, d)
    bias: Any  # (B, H, capacity); -inf for padding of shorter heads
    positions: Any  # (B, H, capacity) int64: those by which keys were rotated
    length: int  # slots in use; the others are not initialised

    @classmethod
    def empty(cls, x: Any, settings: Settings, capacity: int) -> "Entries":
        """Return no entries for tokens x (B, T, D)."""
        make = empty if is_cuda(x) else np.empty
        capacity = max(capacity, _MIN_CAPACITY)
        shape = len(x), settings.num_key_heads, capacity
        wide = *shape, settings.head_dim
        keys, values = make(wide, x.dtype), make(wide, x.dtype)
        return cls(keys, values, make(shape, x.dtype), make(shape, np.int64), 0)

    @classmethod
    def first(
        cls, count: int, keys: Any, values: Any, bias: Any, positions: Any
    ) -> "Entries":
        """Return copies of the first entries of arrays, so that the rest is freed."""
        arrays = keys, values, bias, positions
        keys, values, bias, positions = (x[:, :, :count].copy() for x in arrays)
        return cls(keys, values, bias, positions, count)

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
            larger = make((*x.shape[:2], capacity, *x.shape[3:]), x.dtype)
            larger[:, :, :count] = x[:, :, :count]
            return larger

        keys, values = grown(self.keys), grown(self.values)
        return Entries(keys, values, grown(self.bias), grown(self.positions), count)


def padded(parts: Sequence[Any], fill: float = 0) -> Any:
    """Return arrays (B, H, N_l, ...) of L layers as one (L, B, H, N, ...), a copy.

    N is the largest N_l, and `fill` is the value of the padding.
    """
    longest = max(x.shape[2] for x in parts)
    first = parts[0]
    shape = len(parts), *first.shape[:2], longest, *first.shape[3:]
    result = np.zeros(shape, first.dtype, like=first)
    for row, part in zip(result, parts, strict=True):
        count = part.shape[2]
        row[:, :, :count] = part
        if fill and count < longest:
            row[:, :, count:] = fill
    return result
