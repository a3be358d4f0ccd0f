"""The result of merging or evicting: a shorter key-value cache.

Axes: K entries are left of N, for each of H heads, B sequences and L layers. d and d_v
are the widths of keys and values.
"""

from typing import Any, Generic, NamedTuple

from ..arrays.conversion import Array, BoolArray, FloatArray, IntArray
from ..arrays.libraries import library


class KVCache(NamedTuple, Generic[Array]):
    """A shorter key-value cache, as arrays of the caller's library.

    Attention to it adds `bias` to the scores of the keys: pass it to `attend`, or as an
    additive mask to other kernels (`fold_bias` for kernels without one). Entries are in
    the order of their positions. Where heads have different numbers of entries, the
    shorter ones are padded with entries of bias -inf and size 0.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> keys = np.random.default_rng(0).standard_normal((2, 100, 8))
    >>> qm.merge_kv_cache(keys, keys, 40)
    KVCache(100 entries → 40, leading axes (2,), width 8, float64, numpy)
    """

    keys: Array
    """(..., K, d): merged keys, in the dtype of the input."""
    values: Array
    """(..., K, d_v): merged values."""
    bias: FloatArray
    """(..., K) float32 or float64: what attention adds to the scores."""
    labels: IntArray
    """(..., N) int32: the entry that holds each original one; -1 if there is none."""
    sizes: IntArray
    """(..., K) int32: number of original entries in each entry; 0 for padding."""
    positions: IntArray
    """(..., K) int32: index of the last original entry in each, -1 for padding."""

    def __repr__(self) -> str:
        """Return sizes, dtype and library in one line; no values are read."""
        try:
            *leading, num_groups, dim = self.keys.shape
            num_entries = self.labels.shape[-1]
            dtype = str(self.keys.dtype).rpartition(".")[2]  # not "torch.float32"
            name = library(self.keys).name
        except (AttributeError, TypeError, ValueError):
            # Frameworks also put other objects into the fields, such as placeholders.
            return f"KVCache{tuple(self)!r}"
        return (
            f"KVCache({num_entries} entries → {num_groups}, leading axes "
            f"{tuple(leading)}, width {dim}, {dtype}, {name})"
        )

    @property
    def valid(self) -> BoolArray:
        """(..., K) boolean: which entries exist. The others are padding, of size 0."""
        sizes: Any = self.sizes
        return sizes > 0
