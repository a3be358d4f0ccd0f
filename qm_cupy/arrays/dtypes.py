"""Dtypes: of sums, and how to round to what came in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def accumulation_dtype(dtype: Any) -> np.dtype[Any]:
    """Return `acc_t`: float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def narrow(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round to the dtype that came in, infinite where that does not reach."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def copyable(x: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 as int16: CuPy's `where` has no loop for it and widens it."""
    return x.view(np.int16) if x.dtype.name == "bfloat16" else x
