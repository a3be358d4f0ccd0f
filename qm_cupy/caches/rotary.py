"""Rotation of keys by their positions (RoPE), and back.

Pair i of a vector is rotated by the angle p f_i for the position p and the frequency
f_i. The first r elements of a vector form r / 2 pairs. Half-split: elements i and
i + r/2 are a pair. Interleaved: elements 2i and 2i + 1.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype, narrow
from ..arrays.libraries import is_cuda
from ..cuda.device import empty, to_device
from ..cuda.launch import contiguous, launch


def rotate(
    x: Any,
    positions: Any,
    inv_freq: NDArray[np.float64],
    interleaved: bool = False,
    scaling: float = 1.0,
    *,
    inverse: bool = False,
) -> Any:
    """Return vectors (..., N, d) rotated by their positions, in the dtype of x.

    `positions` are integers (N,) or (..., N), and `inv_freq` (r / 2,) has the angles f
    in radians. Rotated elements are multiplied by `scaling`. `inverse` turns back and
    divides by `scaling`.
    """
    turns = inv_freq / (2 * np.pi)
    if inverse:
        turns, scaling = -turns, 1 / scaling
    if is_cuda(x):
        return _rotate_cuda(x, positions, turns, interleaved, scaling)
    return _rotate_reference(x, positions, turns, interleaved, scaling)


def _rotate_reference(
    x: NDArray[Any],
    positions: NDArray[Any],
    turns: NDArray[np.float64],
    interleaved: bool,
    scaling: float,
) -> NDArray[Any]:
    dtype = accumulation_dtype(x.dtype)
    # Whole turns do not change the rotation. Without them, the angle keeps its digits.
    angle = 2 * np.pi * (positions[..., None] * turns % 1)  # (..., N, r / 2)
    cosine, sine = (scaling * f(angle) for f in (np.cos, np.sin))
    cosine, sine = cosine.astype(dtype), sine.astype(dtype)
    pairs = len(turns)
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    # Pair (a, b) becomes (a cos θ - b sin θ, b cos θ + a sin θ).
    a, b = x[..., first].astype(dtype), x[..., second].astype(dtype)
    out = np.array(x, order="C")
    with np.errstate(over="ignore"):
        out[..., first] = narrow(a * cosine - b * sine, x.dtype)
        out[..., second] = narrow(b * cosine + a * sine, x.dtype)
    return out


def _rotate_cuda(
    x: Any,
    positions: Any,
    turns: NDArray[np.float64],
    interleaved: bool,
    scaling: float,
) -> Any:
    *leading, num_entries, dim = x.shape
    out = empty(x.shape, x.dtype)
    positions = np.broadcast_to(positions.astype(np.int64), x.shape[:-1])
    arrays = contiguous(x), contiguous(positions), to_device(turns)
    sizes = math.prod(leading) * num_entries, dim, len(turns)
    args = (*arrays, *sizes, int(interleaved), float(scaling), out)
    # A thread for each pair of elements, and for each element that does not rotate.
    # The basic kernel has one for each element.
    kernel, threads = ("rotary", "rotate"), sizes[0] * (dim - len(turns))
    launch(*kernel, x.dtype, args, outputs=out.size, threads=threads)
    return out
