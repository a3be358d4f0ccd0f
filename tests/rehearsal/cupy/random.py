"""Random numbers. Their values differ from CuPy's."""

from typing import Any

import numpy as np

from cupy import _functions
from cupy._array import ndarray

__all__ = ["randint", "random", "random_sample", "seed", "standard_normal"]

_generator = [np.random.default_rng(0)]  # a list, so that `seed` can replace it


def seed(seed: int | None = None) -> None:
    _generator[0] = np.random.default_rng(seed)


def random_sample(size: Any = None, dtype: Any = float) -> ndarray:
    return _functions.made(_generator[0].random(size, dtype))


random = random_sample  # CuPy has both names


def standard_normal(size: Any = None, dtype: Any = float) -> ndarray:
    return _functions.made(_generator[0].standard_normal(size, dtype))


def randint(low: Any, high: Any = None, size: Any = None, dtype: Any = "l") -> ndarray:
    return _functions.made(_generator[0].integers(low, high, size, dtype))
