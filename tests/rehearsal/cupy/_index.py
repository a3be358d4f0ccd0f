"""Read and write parts of an array, by CuPy's rules.

With a boolean mask the CPU waits for the number of True values, also in an assignment.
Integers out of bounds wrap around and do not raise an error.
"""

import functools
from typing import Any

import numpy as np

from cupy import _array, _compute, _streams


def get(x: Any, key: Any) -> Any:
    """Return ``x[key]``: a view, or a copy for arrays of indices."""
    entries, arrays, has_mask = _parts(key)
    if not arrays:
        return _view(x, entries)
    if has_mask:
        _compute.wait()  # the shape of the result depends on the values of the mask
    return _compute.compute(
        lambda values, *indices: values[_wrapped(entries, indices, values.shape)],
        x,
        *arrays,
        order="C",
    )


def put(x: Any, key: Any, value: Any) -> None:
    """Do ``x[key] = value``, where the value is a CuPy array or a number."""
    entries, arrays, has_mask = _parts(key)
    if not arrays and not isinstance(value, _array.ndarray):
        _view(x, entries).fill(value)
        return
    if has_mask:
        _compute.wait()
    if not isinstance(value, _array.ndarray) and not np.isscalar(value):
        raise NotImplementedError(
            f"the stand-in assigns arrays and numbers, got {type(value).__name__}"
        )
    # Check the shapes now, as CuPy does; the stream assigns later.
    new = _compute.operand(value)
    indices = [index._numpy for index in arrays]
    work = functools.partial(_assign, x._numpy, entries, indices, new)
    shape = x._numpy[_wrapped(entries, indices, x.shape)].shape
    np.broadcast_shapes(shape, np.shape(new))
    if np.broadcast_shapes(shape, np.shape(new)) != shape:
        raise ValueError(f"shape {np.shape(new)} does not broadcast to {shape}")
    _streams.submit(work)


def _view(x: Any, entries: tuple[Any, ...]) -> Any:
    whole = any(entry is Ellipsis for entry in entries)
    # With "...", NumPy returns a single element as an array without axes, like CuPy.
    return _array.view_of(x, x._numpy[entries if whole else (*entries, ...)])


def _assign(x: np.ndarray, entries: Any, indices: Any, value: Any) -> None:
    with np.errstate(all="ignore"):
        x[_wrapped(entries, indices, x.shape)] = np.asarray(value).astype(x.dtype)


def _parts(key: Any) -> tuple[tuple[Any, ...], list[Any], bool]:
    """Return the key with a slot for each array, the arrays, and if one is a mask."""
    import cupy

    entries, arrays, has_mask = [], [], False
    for entry in key if isinstance(key, tuple) else (key,):
        if isinstance(
            entry, list | np.ndarray
        ):  # CuPy accepts NumPy's arrays as indices
            entry = cupy.asarray(entry)
        if isinstance(entry, _array.ndarray):
            has_mask |= entry.dtype == np.bool_
            arrays.append(entry)
            entry = _SLOT
        entries.append(entry)
    return tuple(entries), arrays, has_mask


_SLOT = object()  # stands for an array in a key


def _wrapped(entries: Any, indices: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return NumPy's key: indices in their slots, modulo the length of their axis."""
    # The number of axes that each entry indexes: a mask as many as it has, None and
    # "..." none, and any other entry one.
    left = list(indices)
    taken = [0 if e is None or e is Ellipsis else 1 for e in entries]
    for position, entry in enumerate(entries):
        if entry is _SLOT:
            index = left.pop(0)
            taken[position] = index.ndim if index.dtype == np.bool_ else 1
    # Then fill the slots, and count the axes to know the length of each.
    left, key, axis = list(indices), [], 0
    for position, entry in enumerate(entries):
        if entry is Ellipsis:  # it covers all axes that no other entry indexes
            axis += len(shape) - sum(taken)
        elif entry is _SLOT:
            entry = left.pop(0)
            if entry.dtype != np.bool_:
                entry = entry % max(shape[axis], 1)
        key.append(entry)
        axis += taken[position]
    return tuple(key)
