"""Keys and values of the tokens that a transformer prior has read."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.device import empty
from .configuration import Configuration

_LEAST_CAPACITY = 16  # tokens of a new cache


@dataclass
class KVCache:
    """Keys and values of the tokens so far, with room for more."""

    keys: Any  # (L, B, H, capacity, d)
    values: Any
    sizes: Any  # (B, capacity)
    length: int = 0

    @classmethod
    def empty(
        cls,
        tokens: Any,
        settings: Configuration,
        capacity: int = _LEAST_CAPACITY,
        layers: int | None = None,
    ) -> "KVCache":
        """Return room for tokens like these, (B, T, D), in every layer."""
        heads = settings.num_heads
        width = settings.hidden_dim // heads
        shape = (layers or settings.num_layers, len(tokens), heads, capacity, width)
        acc_dtype = accumulation_dtype(tokens.dtype)
        make = empty if is_cuda(tokens) else np.empty
        return cls(
            make(shape, acc_dtype),
            make(shape, acc_dtype),
            make(shape[1:4:2], acc_dtype),
        )

    def after(self, count: int) -> "KVCache":
        """Return a cache of the first `count` tokens with room for another.

        Itself, unless it is full or has already gone on from there.
        """
        capacity = self.sizes.shape[-1]
        if count == self.length < capacity:
            return self
        make = empty if is_cuda(self.sizes) else np.empty
        capacity = max(2 * count, _LEAST_CAPACITY)

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
