"""Linear algebra."""

from typing import Any

import numpy as np

from cupy._array import ndarray
from cupy._compute import compute

__all__ = ["norm", "solve"]


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> ndarray:
    return compute(lambda x: np.linalg.norm(x, ord, axis, keepdims), x, order="C")


def solve(a: Any, b: Any) -> ndarray:
    return compute(np.linalg.solve, a, b)
