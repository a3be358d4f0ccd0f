"""Windows of similar tokens, so that a long cache is clustered in linear time.

There are S sequences of N tokens, of which some are free to merge. A window holds at
most n of them. The tokens of a sequence are halved again and again: at each level, the
windows are cut at the median of their first principal component. So a window holds
tokens that are similar, wherever they are in the sequence. (A window of neighbours
would separate similar tokens that are far apart.) P is the number of windows of a
sequence.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device

_SAMPLE = 256  # tokens of a window that determine its principal component, at least
_POWER_STEPS = 8


def windows_of_similar(
    vectors: Any, free: Any, num_free: NDArray[np.int64], max_size: int
) -> Any:
    """Return the tokens of each window (S, P, n): indices, ascending, then N.

    `vectors` (S, N, d) and `free` (S, N), booleans, are NumPy or CuPy arrays.
    `num_free` (S,) is the number of free tokens. An index N fills windows that
    are not full.
    """
    num_tokens = vectors.shape[1]
    # Sequences of different lengths are divided apart: the windows of a sequence must
    # not depend on the others.
    parts = []
    for count in np.unique(num_free).tolist():
        rows = np.flatnonzero(num_free == count)
        if len(rows) == len(num_free):
            return _windows(vectors, free, count, max_size)
        part = to_device_like(rows, vectors)
        parts.append((rows, _windows(vectors[part], free[part], count, max_size)))
    windows, size = (max(x.shape[axis] for _, x in parts) for axis in (1, 2))
    out = np.zeros((len(num_free), windows, size), np.int64, like=vectors)
    out += num_tokens
    for rows, index in parts:
        part = to_device_like(rows, vectors)
        out[part, : index.shape[1], : index.shape[2]] = index
    return out


def _windows(vectors: Any, free: Any, num_free: int, max_size: int) -> Any:
    """Return the windows (S, P, n) of sequences with equally many free tokens."""
    sequences, num_tokens, _ = vectors.shape
    levels = max(0, math.ceil(math.log2(max(num_free, 1) / max_size)))
    size = -(-max(num_free, 1) // 2**levels)
    # The free tokens come first.
    index = np.argsort(~free, axis=-1, kind="stable")[:, :num_free]
    # Fill the last window.
    shape = sequences, size * 2**levels - num_free
    index = np.concatenate(
        (index, np.zeros(shape, index.dtype, like=free) + num_tokens), axis=-1
    )
    if levels:
        index = _halved(vectors, index, levels)
    return np.sort(index.reshape(sequences, 2**levels, size), axis=-1)


def _halved(vectors: Any, index: Any, levels: int) -> Any:
    """Return the indices (S, P · n), sorted so that windows have similar tokens."""
    sequences, num_tokens, dim = vectors.shape
    dtype = accumulation_dtype(vectors.dtype)
    for level in range(levels):
        halves = index.reshape(sequences, 2**level, -1)
        real = halves < num_tokens
        inside = np.where(real, halves, 0).reshape(sequences, -1, 1)
        x = np.take_along_axis(vectors, inside, 1).astype(dtype)
        x = x.reshape(*halves.shape, dim)
        values = (x @ _first_component(x, real)[..., None])[..., 0]
        # What fills a window stays at its end.
        values = np.where(real, values, dtype.type(np.inf))
        order = np.argsort(values, axis=-1, kind="stable")
        index = np.take_along_axis(halves, order, -1)
    return index


def _first_component(x: Any, real: Any) -> Any:
    """Return about the first principal component (S, P, d) of windows (S, P, n, d).

    It only decides which tokens are compared, so some tokens and some steps of the
    power iteration are enough.
    """
    step = max(1, x.shape[-2] // _SAMPLE)
    x, real = x[..., ::step, :], real[..., ::step, None]
    x = np.where(real, x, x.dtype.type(0))
    peak = np.abs(x).max(axis=(-2, -1), keepdims=True)
    x = x / np.where(peak > 0, peak, x.dtype.type(1))
    count = np.maximum(real.sum(axis=-2, keepdims=True), 1).astype(x.dtype)
    x = x - x.sum(axis=-2, keepdims=True) / count
    x = np.where(real, x, x.dtype.type(0))
    # Start with the token that is farthest from the mean.
    farthest = (x * x).sum(axis=-1).argmax(axis=-1)[..., None, None]
    v = np.take_along_axis(x, farthest, -2).swapaxes(-1, -2)  # (S, P, d, 1)
    for _ in range(_POWER_STEPS):
        v = x.swapaxes(-1, -2) @ (x @ v)
        size = np.abs(v).max(axis=-2, keepdims=True)
        v = v / np.where(size > 0, size, x.dtype.type(1))
    return v[..., 0]


def to_device_like(x: NDArray[Any], like: Any) -> Any:
    """Return a small NumPy array on the device of another array."""
    return to_device(x) if is_cuda(like) else x
