"""The current device: its memory and its limits.

Tests replace the functions of this module to run without a GPU.
"""

import functools
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .workspace import Workspace


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an uninitialised array for a kernel to fill."""
    import cupy

    # The memory comes from CuPy's pool for the current stream, or from a `Workspace`.
    return cupy.empty(shape, dtype=dtype)


def to_device(x: NDArray[Any]) -> Any:
    """Copy a small NumPy array to the current device."""
    import cupy

    return cupy.asarray(x)


def to_host(x: Any) -> Any:
    """Return an array as NumPy array; for a GPU array, the CPU waits for its values."""
    return x if x is None or isinstance(x, np.ndarray | np.generic) else x.get()


class Device(NamedTuple):
    """Limits of the current device that launchers need."""

    multiprocessors: int
    """Number of multiprocessors. Each can run at least one block of 1024 threads."""
    shared_bytes: int
    """Largest shared memory of a block in bytes, static and dynamic together."""


def current_device() -> Device:
    """Return the limits of the current device."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


@functools.cache  # the attributes of a device never change
def _device(number: int) -> Device:
    import cupy

    attributes = cupy.cuda.Device(number).attributes
    # "Optin": the limit for kernels that request more than the default of 48 KiB.
    return Device(
        attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
    )


def free_memory() -> int:
    """Return the number of bytes that can be allocated on the current device.

    Within `Workspace.lend`, return the same value as at the first call with this
    workspace. The sizes of buffers depend on this value. It stays the same, so every
    call requests buffers of the same sizes.
    """
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    # CuPy's pool keeps freed memory, which the driver counts as used.
    free = int(free) + int(cupy.get_default_memory_pool().free_bytes())
    # Within `Workspace.lend`, the allocator is a method of the workspace.
    lender = getattr(cupy.cuda.get_allocator(), "__self__", None)
    return (
        lender.device_bytes_at_first_call(free)
        if isinstance(lender, Workspace)
        else free
    )


def is_capturing() -> bool:
    """Return whether the current stream captures a CUDA graph."""
    cupy = sys.modules.get("cupy")  # without CuPy no stream can be capturing
    return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())
