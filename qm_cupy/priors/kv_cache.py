"""Cache of keys and values of the tokens that a transformer prior has read."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from .configuration import Configuration

_MIN_CAPACITY = 16  # tokens for which a new cache has memory


@dataclass
class KVCache:
    """Keys and values of the tokens so far, with memory for more tokens."""

    keys: Any  # (L, B, H, capacity, d), after the rotation of rotary positions
    values: Any  # (L, B, H, capacity, d)
    sizes: Any  # (B, capacity): tokens that each merged token stands for
    length: int = 0  # tokens written so far; the rest of the memory is not initialised

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

    def after(self, count: int) -> "KVCache":
        """Return a cache of the first `count` tokens with memory for one more token.

        Return the cache itself, unless it is full or already has a token at `count`.
        """
        capacity = self.sizes.shape[-1]
        # If another step already continued from this state, slot `count` is taken. A
        # copy keeps both continuations apart.
        if count == self.length < capacity:
            return self
        make = empty if is_cuda(self.sizes) else np.empty
        # Doubling makes the copies of n steps O(n) in all, instead of O(n²).
        capacity = max(2 * count, _MIN_CAPACITY)

        def grown(x: Any, axis: int) -> Any:  # axis counts from the last, -1 or -2
            shape = list(x.shape)
            shape[axis] = capacity
            larger = make(tuple(shape), x.dtype)
            kept: Any = (..., slice(count), *[slice(None)] * (-1 - axis))
            larger[kept] = x[kept]
            return larger

        return KVCache(
            grown(self.keys, -2), grown(self.values, -2), grown(self.sizes, -1), count
        )
