"""The current device: its memory, and what it can do."""

import functools
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .workspace import Workspace


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array for a kernel to fill; part of the seam."""
    import cupy

    return cupy.empty(shape, dtype=dtype)


def to_device(x: NDArray[Any]) -> Any:
    """Return a small array of the CPU's on the current device; part of the seam."""
    import cupy

    return cupy.asarray(x)


def to_host(x: Any) -> Any:
    """Return an array of the CPU's, which waits for the GPU; part of the seam."""
    return x if x is None or isinstance(x, np.ndarray | np.generic) else x.get()


class Device(NamedTuple):
    """What a launcher asks of the current device."""

    multiprocessors: int
    """How many there are: blocks of up to 1024 threads that can run at once."""
    shared_bytes: int
    """The most shared memory that a block can have, static and dynamic."""


def current_device() -> Device:
    """Return the current device; part of the seam."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


@functools.cache
def _device(number: int) -> Device:
    import cupy

    has = cupy.cuda.Device(number).attributes
    return Device(has["MultiProcessorCount"], has["MaxSharedMemoryPerBlockOptin"])


def free_memory() -> int:
    """Return how many bytes can be had on the current device; part of the seam."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    free = int(free) + int(cupy.get_default_memory_pool().free_bytes())
    lender = getattr(cupy.cuda.get_allocator(), "__self__", None)
    return lender.free_memory(free) if isinstance(lender, Workspace) else free


def is_capturing() -> bool:
    """Whether the current stream captures a CUDA graph."""
    cupy = sys.modules.get("cupy")  # nothing else here makes CuPy's arrays
    return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())
