"""How a function of arrays becomes work in a stream, and how the CPU waits for it."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupy import _array, _runtime, _streams

_SCALARS = (bool, int, float, np.generic)


def wait() -> None:
    """Wait for the current stream, as every read by the CPU does."""
    _runtime.check()
    _streams.get_current_stream().synchronize()


def operand(x: Any) -> Any:
    """Return what CuPy's functions take: an array's values or a number."""
    if isinstance(x, _array.ndarray):
        return x._numpy
    if isinstance(x, _SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def compute(
    function: Callable[..., Any], *operands: Any, out: Any = None, order: str = "K"
) -> Any:
    """Return a function of arrays, whose values come when the stream has come there.

    It runs once now, for the shape and dtype of its result, on whatever is in memory.
    """
    values = [operand(x) for x in operands]
    now = _streams.idle()  # first: it does what the stream has waited for
    with np.errstate(all="ignore"):
        result = np.asarray(function(*values))
    if out is None:
        by_columns = result.flags.f_contiguous and not result.flags.c_contiguous
        layout = "F" if order == "F" or (order in "KA" and by_columns) else "C"
        out = _array.ndarray(result.shape, result.dtype, order=layout)
    target = out._numpy
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
