"""Arrays that stand for a device's arrays and count the reads of the host.

They are NumPy arrays, so the code between launches runs, but their values mean nothing.
An operation with an array of the host raises, as it does in CuPy. A read of a value by
the host, which would wait for a GPU, is counted in `READS`.
"""

import math
import mmap
import sys

import numpy as np

READS: list[str] = []
"""The operations that have read a device's array since `READS.clear()`."""

# Results that an operation puts on the device.
_NUMERIC = np.ndarray | np.generic | tuple
_SMALL = 1 << 10  # bytes; larger arrays share one reserve of addresses
_READ = 1 << 20  # bytes of an array of integers that the host may read
_RESERVE = 1 << 37  # bytes of addresses, more than any card's memory


class MixedArraysError(TypeError):
    """An array of the host where CuPy takes only arrays of the device."""


class DeviceArray(np.ndarray):
    """An array on the device; results of operations on it are on the device too."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        for x in inputs:
            # A plain array, not a NumPy scalar: CuPy takes scalars.
            if type(x) is np.ndarray:
                raise MixedArraysError(
                    f"{ufunc.__name__} of a device's and a host's array"
                )
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        result = getattr(ufunc, method)(*map(_plain, inputs), **options)
        return out[0] if out else _on_device(result)

    def __array_function__(self, function, types, args, options):
        if np.ndarray in types:
            raise MixedArraysError(
                f"{function.__name__} of a device's and a host's array"
            )
        result = super().__array_function__(function, types, args, options)
        return _on_device(result) if isinstance(result, _NUMERIC) else result

    def get(self):
        """Return counts of a caller, which the host has or waits for."""
        return self.view(np.ndarray)

    def __getitem__(self, key):
        # The shape of the result depends on values, so CuPy waits for the GPU.
        _count_mask("x[mask]", key)
        return _on_device(super().__getitem__(key))

    def __setitem__(self, key, value):
        _count_mask("x[mask] = value", key)
        super().__setitem__(key, value)


def _counted(name):
    method = getattr(np.ndarray, name)

    def read(self, *args):
        READS.append(name)
        return method(self.view(np.ndarray), *args)

    return read


# Each of these needs a value on the host, or a shape that depends on values.
for _name in (
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"
):  # fmt: skip
    setattr(DeviceArray, _name, _counted(_name))


def _count_mask(name, key):
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, np.ndarray) and k.dtype == np.bool_ for k in keys):
        READS.append(name)


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, DeviceArray) else x


def _on_device(x):
    """Return a result as CuPy does: arrays of shape () instead of scalars."""
    if isinstance(x, tuple):
        return tuple(map(_on_device, x))
    return x if isinstance(x, DeviceArray) else np.asarray(x).view(DeviceArray)


def _reserve():
    """Return addresses that use no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= 0x4000  # MAP_NORESERVE, which Python 3.11 does not define
    return mmap.mmap(-1, _RESERVE, flags=flags)


_MEMORY = _reserve()


def empty(shape, dtype):
    """Return a C-contiguous array; all except small ones share one range of addresses.

    Integers are 1, up to a MiB, because the host may read them: sizes of groups, which
    have members.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind in "iu" and size <= _READ:
        return np.ones(shape, dtype).view(DeviceArray)
    if size <= _SMALL:
        return np.zeros(shape, dtype).view(DeviceArray)
    if size > _RESERVE:
        raise MemoryError(f"no card has {size / 2**30:.0f} GiB, for shape {shape}")
    return DeviceArray(shape, dtype, buffer=_MEMORY)


def to_device(x):
    """Return a copy of an array of the host on the device."""
    return np.array(x).view(DeviceArray)


def to_host(x):
    """Return an array on the host; this counts as a read."""
    if not isinstance(x, DeviceArray):
        return x
    READS.append("to_host")
    return x.view(np.ndarray)
