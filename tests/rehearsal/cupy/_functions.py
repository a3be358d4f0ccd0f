"""The functions of CuPy that the library, its tests and its benchmarks call."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupy import _array, _compute, _runtime, _streams
from cupy._array import ndarray
from cupy._compute import compute, operand


class Ufunc:
    """One of CuPy's universal functions."""

    def __init__(self, name: str) -> None:
        self._function = getattr(np, name)
        self.__name__ = name

    def __call__(self, *args: Any, out: Any = None) -> Any:
        if not any(isinstance(x, ndarray) for x in args):
            [operand(x) for x in args]  # raises TypeError for NumPy's arrays
        return compute(self._function, *args, out=out)

    def at(self, a: Any, slices: Any, b: Any) -> None:
        """Add by atomics, so repeated indices add up; CuPy has it for few functions."""
        if self.__name__ != "add":
            raise NotImplementedError(f"the stand-in has no cupy.{self.__name__}.at")
        index = slices._numpy
        work = functools.partial(_add_at, a._numpy, index, operand(b))
        _streams.submit(work)


def _add_at(a: np.ndarray, index: np.ndarray, b: Any) -> None:
    # CuPy's indices wrap around.
    np.add.at(a, index % max(len(a), 1), b)


UFUNCS = (
    "add", "subtract", "multiply", "true_divide", "divide", "floor_divide", "remainder",
    "power",
    "maximum", "minimum", "exp", "log", "sqrt", "square", "absolute", "negative",
    "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "isfinite",
    "isnan", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or",
    "bitwise_xor", "invert", "rint",
)  # fmt: skip


def matmul(x1: Any, x2: Any, out: Any = None) -> ndarray:
    """Multiply matrices. CuPy does not accept a number here."""
    for x in (x1, x2):
        if not isinstance(x, ndarray):
            raise TypeError(f"Unsupported type {type(x)}")
        if x.dtype.name == "bfloat16":
            raise NotImplementedError("the stand-in has no cupy.matmul for bfloat16")
    return compute(np.matmul, x1, x2, out=out, order="C")


# Creation of arrays.


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Return bytes 0xFF, which are NaN in every floating type.

    So an element that no kernel writes shows in the result.
    """
    x = ndarray(shape, dtype, order=order)
    whole = x._numpy.reshape(-1, order=order).view(np.uint8)
    _streams.submit(functools.partial(whole.fill, 0xFF))
    return x


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if isinstance(fill_value, ndarray):
        raise NotImplementedError("the stand-in's cupy.full takes a number")
    value_dtype = np.asarray(fill_value).dtype if dtype is None else dtype
    x = ndarray(shape, value_dtype, order=order)
    x.fill(fill_value)
    return x


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def empty_like(a: Any, dtype: Any = None, order: str = "K") -> ndarray:
    return empty(a.shape, a.dtype if dtype is None else dtype, _layout(a, order))


def zeros_like(a: Any, dtype: Any = None, order: str = "K") -> ndarray:
    return zeros(a.shape, a.dtype if dtype is None else dtype, _layout(a, order))


def ones_like(a: Any, dtype: Any = None, order: str = "K") -> ndarray:
    return ones(a.shape, a.dtype if dtype is None else dtype, _layout(a, order))


def _layout(a: Any, order: str) -> str:
    if not isinstance(a, ndarray):
        raise TypeError(f"Unsupported type {type(a)}")
    by_columns = a.flags.f_contiguous and not a.flags.c_contiguous
    return "F" if order == "F" or (order in "KA" and by_columns) else "C"


def made(values: Any, order: str = "K") -> ndarray:
    """Return values that CuPy computes in a kernel, without a copy from the CPU."""
    return compute(lambda: values, order=order)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    bounds = (0, start) if stop is None else (start, stop)  # as range(stop)
    return made(np.arange(*bounds, step, dtype=dtype))


def eye(
    N: int, M: Any = None, k: int = 0, dtype: Any = float, order: str = "C"
) -> ndarray:
    return made(np.eye(N, M, k, dtype, order))


def array(obj: Any, dtype: Any = None, copy: Any = True, order: str = "K") -> ndarray:
    if isinstance(obj, ndarray):  # a copy on the device
        return obj.astype(obj.dtype if dtype is None else dtype, order, copy=bool(copy))
    if isinstance(obj, list | tuple) and any(isinstance(x, ndarray) for x in obj):
        raise NotImplementedError("the stand-in's cupy.array takes no list of arrays")
    # A copy of the values as they are now, like CuPy's copy to a pinned buffer.
    values = np.array(obj, dtype=dtype, order=order)
    if values.dtype == object:
        raise ValueError(f"Unsupported dtype {values.dtype}")
    result = made(values, order)
    if values.ndim:
        # CuPy copies from a pinned buffer and queries an event, to know when the buffer
        # is free. CUDA ends a capture because of the query. A single number takes no
        # buffer: CuPy fills the array with it.
        _streams.spoil_capture()
    return result


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None
) -> ndarray:
    return array(a, dtype, copy=bool(copy), order=order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    return asarray(a, dtype, "C")


def copy(a: Any, order: str = "K") -> ndarray:
    return a.copy(order=order)


def from_dlpack(x: Any, /, *, device: Any = None, copy: Any = None) -> ndarray:
    if device is not None or copy is not None:
        raise NotImplementedError("the stand-in's from_dlpack takes the array alone")
    if not hasattr(x, "__dlpack_device__"):
        raise TypeError("the argument does not support DLPack")
    if tuple(map(int, x.__dlpack_device__())) != (2, 0):  # CUDA, device 0
        raise NotImplementedError("the stand-in's from_dlpack takes arrays of the GPU")
    _runtime.check()
    stream = _streams.get_current_stream().ptr or 1
    try:
        capsule = x.__dlpack__(stream=stream, max_version=(1, 3), copy=copy)
    except TypeError:  # the producer supports only the first version of DLPack
        capsule = x.__dlpack__(stream=stream)
    if not isinstance(capsule, _array.Capsule):
        raise NotImplementedError("the stand-in's from_dlpack takes CuPy's arrays")
    return _array.imported(capsule.array)


# Functions that combine arrays.


def copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if where is not None or casting != "same_kind":
        raise NotImplementedError("the stand-in's cupy.copyto has no casting, no where")
    compute(lambda x: x, src, out=dst)  # broadcasts `src`


def where(condition: Any, x: Any = None, y: Any = None) -> ndarray:
    """Select by a condition. CuPy has no loop for bfloat16 and returns float32."""
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    if x is None:
        raise NotImplementedError("the stand-in's cupy.where takes three arguments")

    def choose(condition: np.ndarray, x: Any, y: Any) -> np.ndarray:
        result = np.where(condition, x, y)
        return result.astype(np.float32) if result.dtype.name == "bfloat16" else result

    return compute(choose, condition.astype("?", copy=False), x, y)


def _joined(name: str) -> Callable[..., ndarray]:
    """Return CuPy's function that joins arrays like NumPy's function of that name."""
    function = getattr(np, name)

    def join(tup: Any, axis: int = 0) -> ndarray:
        for x in tup:
            if not isinstance(x, ndarray):
                raise TypeError(f"Only cupy arrays can be joined, got {type(x)}")
        return compute(lambda *xs: function(xs, axis=axis), *tup, order="C")

    join.__name__ = name
    return join


concatenate, stack = _joined("concatenate"), _joined("stack")


def pad(array: Any, pad_width: Any, mode: str = "constant", **kwargs: Any) -> ndarray:
    if mode != "constant":
        raise NotImplementedError(f"the stand-in's cupy.pad has no mode {mode!r}")
    return compute(lambda x: np.pad(x, pad_width, mode, **kwargs), array)


def broadcast_to(array: Any, shape: Any) -> ndarray:
    # CuPy's result is writeable; `np.broadcast_to` would make it read-only.
    as_strided = np.lib.stride_tricks.as_strided
    strides = np.broadcast_to(array._numpy, shape).strides
    return _array.view_of(array, as_strided(array._numpy, shape, strides))


def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
    result = a._numpy.diagonal(offset, axis1, axis2)
    result.flags.writeable = True  # NumPy's view is read-only, CuPy's is not
    return _array.view_of(a, result)


def take_along_axis(a: Any, indices: Any, axis: Any) -> ndarray:
    size = a.shape[axis]  # CuPy's indices wrap around
    return compute(
        lambda x, i: np.take_along_axis(x, i % size, axis), a, indices, order="C"
    )


def sort(a: Any, axis: Any = -1, kind: Any = None) -> ndarray:
    return compute(lambda x: np.sort(x, axis), a, order="C")


def argsort(a: Any, axis: Any = -1, kind: Any = None) -> ndarray:
    # CuPy's sort is stable.
    return compute(lambda x: np.argsort(x, axis, kind="stable"), a, order="C")


def bincount(x: Any, weights: Any = None, minlength: Any = None) -> ndarray:
    _compute.wait()  # the CPU reads the largest value, for the length of the result
    return compute(
        lambda x, *w: np.bincount(x, *w, minlength=minlength or 0),
        *(x, *([] if weights is None else [weights])),
    )


def _reduction(name: str) -> Callable[..., ndarray]:
    """Return the function that calls the array's method of the same name."""

    def reduce(a: Any, *args: Any, **kwargs: Any) -> ndarray:
        if not isinstance(a, ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        return getattr(a, name)(*args, **kwargs)

    reduce.__name__ = name
    return reduce


REDUCTIONS = {
    name: _reduction(name)
    for name in (
        "sum",
        "mean",
        "max",
        "min",
        "any",
        "all",
        "argmax",
        "argmin",
        "cumsum",
    )
}


def clip(a: Any, a_min: Any, a_max: Any) -> ndarray:
    return a.clip(a_min, a_max)


# Properties of arrays.


def result_type(*arrays_and_dtypes: Any) -> np.dtype[Any]:
    dtypes = [x.dtype if isinstance(x, ndarray) else x for x in arrays_and_dtypes]
    return np.result_type(*dtypes)


def shape(a: Any) -> tuple[int, ...]:
    return a.shape


def ndim(a: Any) -> int:
    return a.ndim


def may_share_memory(a: Any, b: Any, max_work: Any = None) -> bool:
    """Compare the bounds of arrays in one allocation, which is CuPy's rule."""
    if max_work is not None:
        raise NotImplementedError("Only supported for `max_work` is `None`")
    # Allocations are the same if they start at the same address.
    if a.data.mem.ptr != b.data.mem.ptr or not a.size or not b.size:
        return False
    (a_first, a_end), (b_first, b_end) = (
        np.lib.array_utils.byte_bounds(x._numpy) for x in (a, b)
    )
    return bool(a_first < b_end and b_first < a_end)
