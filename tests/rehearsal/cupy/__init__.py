"""A stand-in for CuPy on a machine without a GPU; it interprets the kernels.

If ``tests/rehearsal`` is first in ``PYTHONPATH``, ``import cupy`` imports this package.
It has the functions that the library, the GPU tests and the benchmarks use, under
CuPy's names. It keeps those rules of CuPy 14.2 that code can break: a NumPy array is
not accepted as an operand, a read by the CPU fails while a stream captures, and `where`
turns bfloat16 into float32. Any other function raises an error that names it. The
stand-in cannot show races between streams that depend on timing, misalignment, or
speed.
"""

# ruff: noqa: F401  (the imports are the public names of the package)

from typing import Any as _Any

import ml_dtypes as _ml_dtypes  # adds bfloat16 to NumPy, as importing CuPy does
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

__version__ = "14.2.0"  # the version whose rules and names it has

# CuPy has these as attributes of the module; here they are generated from their names.
globals().update({name: _f.Ufunc(name) for name in _f.UFUNCS})
globals().update(_f.REDUCTIONS)
amax, amin = _f.REDUCTIONS["max"], _f.REDUCTIONS["min"]
newaxis, inf, nan = None, _np.inf, _np.nan  # plain values, as in CuPy


def is_available() -> bool:
    return cuda.is_available()


# Python calls this for names that the module does not have.
def __getattr__(name: str) -> _Any:
    raise AttributeError(f"the stand-in for CuPy has no cupy.{name}")
