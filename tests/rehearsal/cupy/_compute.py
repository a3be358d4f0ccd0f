"""Turn a function of arrays into work in a stream, and let the CPU wait for it."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupy import _array, _runtime, _streams

_SCALARS = (bool, int, float, np.generic)


def wait() -> None:
    """Wait for the current stream. Every read by the CPU calls this."""
    _runtime.check()
    _streams.get_current_stream().synchronize()


def operand(x: Any) -> Any:
    """Return an operand of a function of CuPy: the values of an array, or a number."""
    if isinstance(x, _array.ndarray):
        return x._numpy
    if isinstance(x, _SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def compute(
    function: Callable[..., Any], *operands: Any, out: Any = None, order: str = "K"
) -> Any:
    """Return the result of a function of arrays, which the stream computes in order.

    The function runs once at once, for the shape and dtype of its result, on the values
    that memory has now. If the stream is busy or captures, it runs again later, and its
    values are written then.
    """
    values = [operand(x) for x in operands]
    # First, because this call does the work that the stream can do by now.
    now = _streams.idle()
    with np.errstate(all="ignore"):  # a GPU does not warn of overflow
        result = np.asarray(function(*values))
    if out is None:
        # CuPy's elementwise functions keep a column-major layout.
        by_columns = result.flags.f_contiguous and not result.flags.c_contiguous
        layout = "F" if order == "F" or (order in "KA" and by_columns) else "C"
        out = _array.ndarray(result.shape, result.dtype, order=layout)
    target = out._numpy
    # CuPy's checks of an `out` argument.
    if target.shape != np.broadcast_shapes(result.shape, target.shape):
        raise ValueError(f"Output shape {target.shape} does not fit {result.shape}")
    if not np.can_cast(result.dtype, target.dtype, "same_kind"):
        raise TypeError(f"output (typecode {result.dtype}) cannot be {target.dtype}")
    if now:
        target[...] = result
    else:
        _streams.submit(functools.partial(_run, function, values, target))
    return out


def _run(function: Callable[..., Any], values: list[Any], target: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        target[...] = function(*values)
