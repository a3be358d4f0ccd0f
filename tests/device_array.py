"""Arrays that stand for a device's, and know which values the host reads.

They are NumPy's, so the code between launches runs; their values mean nothing. An array
of the host's among them raises, as it does in CuPy. A value that the host reads, for
which it would wait on a GPU, is counted in `READS`.
"""

import math
import mmap
import sys

import numpy as np

READS: list[str] = []
"""What has read values of a device's array since `READS.clear()`."""

_NUMERIC = np.ndarray | np.generic | tuple
_SMALL = 1 << 10  # bytes; larger arrays lie in one reserve of addresses
_READ = 1 << 20  # bytes of integers that may be read
_RESERVE = 1 << 37  # bytes of addresses, more than any card's memory


class MixedArraysError(TypeError):
    """An array of the host's where CuPy takes only the device's."""


class DeviceArray(np.ndarray):
    """An array on the device; the results of operations on it are on it too."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        for x in inputs:
            if type(x) is np.ndarray:
                raise MixedArraysError(f"{ufunc.__name__} of a device's and a host's")
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        found = getattr(ufunc, method)(*map(_plain, inputs), **options)
        return out[0] if out else _on_device(found)

    def __array_function__(self, function, types, args, options):
        if np.ndarray in types:
            raise MixedArraysError(f"{function.__name__} of a device's and a host's")
        found = super().__array_function__(function, types, args, options)
        return _on_device(found) if isinstance(found, _NUMERIC) else found

    def __getitem__(self, key):
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
    """Return a result as CuPy has it, which gives arrays of shape () for scalars."""
    if isinstance(x, tuple):
        return tuple(map(_on_device, x))
    return x if isinstance(x, DeviceArray) else np.asarray(x).view(DeviceArray)


def _reserve():
    """Return addresses that take no memory until somebody writes to them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= 0x4000  # MAP_NORESERVE, which Python 3.11 does not name
    return mmap.mmap(-1, _RESERVE, flags=flags)


_MEMORY = _reserve()


def empty(shape, dtype):
    """Return a C-contiguous array; all but small ones share addresses and cost nothing.

    Integers are 1, up to a MiB: sizes that are read are of groups with members.
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
    """Return a copy of an array of the host's."""
    return np.array(x).view(DeviceArray)


def to_host(x):
    """Return an array of the host's; it counts as a read."""
    if not isinstance(x, DeviceArray):
        return x
    READS.append("to_host")
    return x.view(np.ndarray)
