"""Whether float32 may be multiplied as TF32; off, unless the user allows it."""

import functools
from typing import Any

import numpy as np

from . import settings

TF32 = "tf32"  # float32 to all but the multiplication: a kernel's dtype, not an array's


def kernel_dtype(file: str, dtype: Any) -> str:
    """Return the dtype that a file's kernels are compiled for: TF32 for float32?"""
    name = _name(np.dtype(dtype))
    if name != "float32" or not file.startswith("optimized/"):
        return name
    return TF32 if settings.tf32_allowed() else name


@functools.lru_cache(maxsize=16)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which NumPy composes anew, at the price of a launch
