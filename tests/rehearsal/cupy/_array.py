"""CuPy's array. A NumPy array holds the bytes that stand for device memory."""

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupy import _compute, _index, _memory, _streams
from cupy._operators import Operators

_IMPLICIT = (
    "Implicit conversion to a NumPy array is not allowed. "
    "Please use `.get()` to construct a NumPy array explicitly."
)


class ndarray(Operators):  # noqa: N801
    """An array on the device. It lacks some of CuPy's attributes."""

    # CuPy's arrays accept no other attributes and no weak references.
    __slots__ = (
        "_numpy",
        "data",
    )
    __array_priority__ = 100  # NumPy's operators leave the work to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: Any = None,
        strides: Any = None,
        order: str = "C",
    ) -> None:
        if strides is not None:
            raise NotImplementedError("the stand-in's cupy.ndarray takes no strides")
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        self.data = _memory.alloc(size) if memptr is None else memptr
        there = _memory.as_numpy(self.data, size).view(dtype)
        self._numpy: np.ndarray = there.reshape(shape, order=order)

    # Properties.

    @property
    def shape(self) -> tuple[int, ...]:
        return self._numpy.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._numpy.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._numpy.dtype

    @property
    def size(self) -> int:
        return self._numpy.size

    @property
    def ndim(self) -> int:
        return self._numpy.ndim

    @property
    def itemsize(self) -> int:
        return self._numpy.itemsize

    @property
    def nbytes(self) -> int:
        return self._numpy.nbytes

    @property
    def flags(self) -> "Flags":
        return Flags(self._numpy.flags)

    @property
    def device(self) -> Any:
        from cupy.cuda import Device

        return Device(0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "version": 3,
        }

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator["ndarray"]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # Reads by the CPU. All of them wait for the current stream.

    def get(
        self,
        stream: Any = None,
        order: str = "C",
        out: Any = None,
        blocking: bool = True,
    ) -> np.ndarray:
        if stream is not None or out is not None or not blocking:
            raise NotImplementedError("the stand-in's get() takes `order` alone")
        _compute.wait()
        return self._numpy.copy(order=order)

    def item(self) -> Any:
        _compute.wait()
        return self._numpy.item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)

    def __bool__(self) -> bool:
        if not self.size:
            return False  # NumPy raises an error here
        if self.size > 1:
            return bool(self._numpy)  # raises the same error in CuPy
        _compute.wait()
        return bool(self._numpy.item())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(_IMPLICIT)

    # NumPy's functions of an array call CuPy's functions of the same name.

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any
    ) -> Any:
        import cupy

        if method != "__call__":
            return NotImplemented
        if "out" in kwargs:  # NumPy passes a tuple
            (kwargs["out"],) = kwargs["out"]
        return getattr(cupy, ufunc.__name__)(*inputs, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        import cupy

        if not all(issubclass(t, ndarray | np.ndarray) for t in types):
            return NotImplemented
        # np.linalg.norm becomes cupy.linalg.norm.
        path = [*func.__module__.split(".")[1:], func.__name__]
        return functools.reduce(getattr, path, cupy)(*args, **kwargs)

    # DLPack, which here works between CuPy's own arrays only.

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # device type 2 is CUDA

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> "Capsule":
        if dl_device not in (None, (2, 0)) or copy:
            raise NotImplementedError("the stand-in's __dlpack__ makes no copy")
        # The standard gives the default stream the number 1, and forbids 0. With -1 the
        # caller asks for no synchronisation.
        if stream == 0:
            warnings.warn(
                "DLPack has no stream 0: the default stream is used", stacklevel=2
            )
        if stream != -1:
            _streams.wait_between(_streams.get_current_stream(), stream or 1)
        return Capsule(self)

    # Views and copies.

    @property
    def T(self) -> "ndarray":  # noqa: N802
        return view_of(self, self._numpy.T)

    @property
    def mT(self) -> "ndarray":  # noqa: N802
        return view_of(self, self._numpy.mT)

    def transpose(self, *axes: Any) -> "ndarray":
        return view_of(self, self._numpy.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> "ndarray":
        return view_of(self, self._numpy.swapaxes(axis1, axis2))

    def squeeze(self, axis: Any = None) -> "ndarray":
        return view_of(self, self._numpy.squeeze(axis))

    def view(self, dtype: Any = None) -> "ndarray":
        same = dtype is None
        return view_of(self, self._numpy.view() if same else self._numpy.view(dtype))

    def reshape(self, *shape: Any, order: str = "C") -> "ndarray":
        shaped = self._numpy.reshape(*shape, order=order)
        # NumPy copies if a view is impossible. Then a copy in the stream is needed.
        if not shaped.size or np.may_share_memory(shaped, self._numpy):
            return view_of(self, shaped)
        return _compute.compute(lambda x: x.reshape(*shape, order=order), self)

    def ravel(self, order: str = "C") -> "ndarray":
        return self.reshape(-1, order=order)

    def copy(self, order: str = "C") -> "ndarray":  # CuPy's default is "C"
        return _compute.compute(lambda x: x.copy(order=order), self, order=order)

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: str | None = None,
        subok: None = None,
        copy: bool = True,
    ) -> "ndarray":
        if casting is not None or subok is not None:
            raise NotImplementedError("the stand-in's astype() has no casting or subok")
        dtype, flags = np.dtype(dtype), self.flags
        # `laid`: the array has the requested layout already.
        laid = order in "KA" or (
            flags.c_contiguous if order == "C" else flags.f_contiguous
        )
        if not copy and dtype == self.dtype and laid:
            return self
        return _compute.compute(lambda x: x.astype(dtype), self, order=order)

    def fill(self, value: Any) -> None:
        # A NumPy array without axes is a scalar; it is the only one that is accepted.
        if isinstance(value, ndarray | list | tuple) or np.ndim(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        if isinstance(value, np.ndarray):
            value = value.item()
        _streams.submit(functools.partial(_fill, self._numpy, value))

    def __getitem__(self, key: Any) -> "ndarray":
        return _index.get(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _index.put(self, key, value)


class Flags:
    """The flags of an array's layout. CuPy has no flag `writeable`."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous: bool = flags.c_contiguous
        self.f_contiguous: bool = flags.f_contiguous


class Capsule:
    """An array that DLPack passes from a producer to a consumer."""

    def __init__(self, array: ndarray) -> None:
        self.array = array


def view_of(x: ndarray, values: np.ndarray) -> ndarray:
    """Return an array in the memory of `x`; `values` must be a view of it."""
    return _wrap(values, x.data)


def imported(x: ndarray) -> ndarray:
    """Return `x` as DLPack imports it: its memory starts at its first element."""
    # Without __init__, which would look for the owner of the address.
    address = int(x._numpy.__array_interface__["data"][0])
    memory = _memory.UnownedMemory.__new__(_memory.UnownedMemory)
    memory.ptr, memory.size, memory.device_id = address, x.nbytes, 0
    memory._owner, memory._buffer = x, None
    return _wrap(x._numpy.view(), _memory.MemoryPointer(memory, 0))


def _wrap(values: np.ndarray, data: Any) -> ndarray:
    # Without __init__, which would allocate memory.
    result = ndarray.__new__(ndarray)
    first = int(values.__array_interface__["data"][0]) - data.mem.ptr
    result.data = _memory.MemoryPointer(data.mem, first if values.size else 0)
    result._numpy = values
    return result


def _fill(target: np.ndarray, value: Any) -> None:
    with np.errstate(all="ignore"):  # a GPU does not warn of overflow
        target[...] = np.asarray(value).astype(target.dtype)


ndarray.__module__ = "cupy"
