"""Cache of keys and values of the tokens that a transformer prior has read.

A prior is a model that predicts a merged token from the tokens before it. It has L
layers of H attention heads of width d, and reads B sequences at once. A token has one
slot in the cache; `capacity` is the number of slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from .configuration import Configuration

_MIN_CAPACITY = 16  # slots of a new cache, unless the caller sets their number


@dataclass
class KVCache:
    """Keys and values of the tokens so far, with free slots for more tokens."""

    keys: Any  # (L, B, H, capacity, d), after the rotation of rotary positions
    values: Any  # (L, B, H, capacity, d)
    sizes: Any  # (B, capacity), the number of tokens that each merged token stands for
    length: int = 0  # tokens written so far; the other slots are not initialised

    @classmethod
    def empty(
        cls,
        tokens: Any,
        settings: Configuration,
        capacity: int = _MIN_CAPACITY,
        layers: int | None = None,
    ) -> "KVCache":
        """Return an empty cache for tokens (B, T, D), by default for all layers."""
        heads = settings.num_heads
        width = settings.hidden_dim // heads  # d
        shape = (layers or settings.num_layers, len(tokens), heads, capacity, width)
        acc_dtype = accumulation_dtype(tokens.dtype)
        make = empty if is_cuda(tokens) else np.empty
        return cls(
            make(shape, acc_dtype),
            make(shape, acc_dtype),
            make(shape[1:4:2], acc_dtype),  # (B, capacity)
        )

    def with_free_slot(self, count: int) -> "KVCache":
        """Return a cache of the first `count` tokens in which slot `count` is free.

        Return the cache itself, unless it is full or its slot `count` is in use.
        """
        capacity = self.sizes.shape[-1]
        # If another step has already continued from these tokens, slot `count` is in
        # use. A copy keeps the two continuations separate.
        if count == self.length < capacity:
            return self
        make = empty if is_cuda(self.sizes) else np.empty
        # The capacity of a full cache doubles. So if only full caches are copied, the
        # copies in n steps move O(n) tokens, not O(n²).
        capacity = max(2 * count, _MIN_CAPACITY)

        # `axis` is the axis of the slots, counted from the end: -1 or -2.
        def grown(x: Any, axis: int) -> Any:
            shape = list(x.shape)
            shape[axis] = capacity
            larger = make(tuple(shape), x.dtype)
            kept: Any = (..., slice(count), *[slice(None)] * (-1 - axis))
            larger[kept] = x[kept]
            return larger

        return KVCache(
            grown(self.keys, -2), grown(self.values, -2), grown(self.sizes, -1), count
        )
