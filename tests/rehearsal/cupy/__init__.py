"""A stand-in for CuPy on a machine without a GPU: kernels are interpreted.

Put ``tests/rehearsal`` in front of ``PYTHONPATH``, and ``import cupy`` finds this. It
has what the library, the tests of a GPU and the benchmarks use, under CuPy's names, by
CuPy 14.2's rules where code can go wrong by them: no NumPy array is taken for an
operand, a read by the CPU fails while a stream captures, `where` turns bfloat16 into
float32. It refuses all else by name. It does not know races between streams that only
timing shows, alignment, or speed.
"""

# ruff: noqa: F401  (the imports are what the package offers)

from typing import Any as _Any

import ml_dtypes as _ml_dtypes  # NumPy then knows bfloat16 by name, as after CuPy
import numpy as _np
from numpy import bool_, float16, float32, float64, int32, int64, uint8, uint64

from . import _functions as _f
from . import cuda, linalg, random
from ._array import ndarray
from ._functions import (
    arange,
    argsort,
    array,
    asarray,
    ascontiguousarray,
    bincount,
    broadcast_to,
    clip,
    concatenate,
    copy,
    copyto,
    diagonal,
    empty,
    empty_like,
    eye,
    from_dlpack,
    full,
    matmul,
    may_share_memory,
    ndim,
    ones,
    ones_like,
    pad,
    result_type,
    shape,
    sort,
    stack,
    take_along_axis,
    where,
    zeros,
    zeros_like,
)
from ._kernels import RawKernel, RawModule
from ._memory import get_default_memory_pool

__version__ = "14.2.0"

globals().update({name: _f.Ufunc(name) for name in _f.UFUNCS})
globals().update(_f.REDUCTIONS)
amax, amin = _f.REDUCTIONS["max"], _f.REDUCTIONS["min"]
newaxis, inf, nan = None, _np.inf, _np.nan


def is_available() -> bool:
    return cuda.is_available()


def __getattr__(name: str) -> _Any:
    raise AttributeError(f"the stand-in for CuPy has no cupy.{name}")
