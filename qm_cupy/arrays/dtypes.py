"""Dtypes of sums, and rounding to the dtype of the input."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def accumulation_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype of sums: float64 for float64, float32 for narrower dtypes.

    In the kernels, `acc_t` is the same type. Some sums are in float64 for every dtype,
    for example those of `cut_linkage`.
    """
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def narrow(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round to a narrower dtype; a value beyond its range becomes infinite."""
    with np.errstate(over="ignore"):  # no warning, because infinity is intended
        return x.astype(dtype)


def zero_where_absent(x: Any, present: Any) -> Any:
    """Return a copy that is 0 where `present`, which broadcasts to x, is False.

    Padding may be NaN, and NaN times 0 is NaN.
    """
    bits = bfloat16_as_int16(x)  # the bits of 0 are those of the integer 0
    return np.where(present, bits, bits.dtype.type(0)).view(x.dtype)


def bfloat16_as_int16(x: NDArray[Any]) -> NDArray[Any]:
    """Return a bfloat16 array as int16, for functions that only copy elements.

    Other arrays are returned unchanged. CuPy's `where` has no loop for bfloat16 and
    would convert it to a wider dtype.
    """
    return x.view(np.int16) if x.dtype.name == "bfloat16" else x
