"""Launches: arguments as kernels take them, grids, and shared memory."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compile import kernel_dtype, raw_kernel
from .constants import BLOCK, COUNTS
from .device import current_device, empty, is_capturing, to_device

_SHARED_BYTES = 48 << 10  # of a block, static and dynamic, without asking
_WRITE_COUNTS = "basic/counts", "write_counts", "float32"


def launch(
    file: str,
    kernel: str,
    dtype: Any,
    threads: int,
    args: tuple[Any, ...],
    *,
    block: int = BLOCK,
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Run a kernel of ``kernels/<file>.cu`` on the current stream and device.

    `threads` is rounded up to whole blocks, all in x: the one axis that may have more
    than 65,535 of them. Nothing is launched for zero threads. `shared` is in bytes;
    blocks that wait for each other take a `cooperative` launch.
    """
    if threads == 0:
        return
    grid = -(-threads // block)
    run = raw_kernel(file, kernel, kernel_dtype(file, dtype), cooperative)
    if shared and run.shared_size_bytes + shared > _SHARED_BYTES:
        # The same for every launch, so that threads cannot take it from each other.
        run.max_dynamic_shared_size_bytes = _most_dynamic(run)
    # Every argument in the width of its parameter: a launch converts nothing itself.
    values = tuple([_WIDEN.get(type(x), _as_it_is)(x) for x in args])
    run((grid,), (block,), values, shared_mem=shared)


def dynamic_shared_bytes(file: str, kernel: str, dtype: Any) -> int:
    """Return the most shared memory that a launch of a kernel can add to its own."""
    return _most_dynamic(raw_kernel(file, kernel, kernel_dtype(file, dtype)))


def _most_dynamic(run: Any) -> int:
    most: int = current_device().shared_bytes - run.shared_size_bytes
    return most


def _as_it_is(x: Any) -> Any:
    if not isinstance(x, np.generic) and not x.flags.c_contiguous:
        raise ValueError(f"a kernel takes C-contiguous arrays, got strides {x.strides}")
    return x


_NULL = np.uint64(0)
_WIDEN: dict[type, Callable[[Any], Any]] = {
    int: np.int64,
    bool: np.int64,
    float: np.float64,
    type(None): lambda x: _NULL,
}


def vector_count(x: Any) -> int:
    """Return how many vectors of 16 bytes the rows of `x` take."""
    width: int = 16 // x.dtype.itemsize
    rows: int = math.prod(x.shape[:-1])
    return rows * -(-int(x.shape[-1]) // width)


def contiguous(x: Any, dtype: Any = None) -> Any:
    """Return `x` as a kernel takes it: C-contiguous, of `dtype`; None stays None."""
    return None if x is None else x.astype(dtype or x.dtype, order="C", copy=False)


def device_counts(num_groups: NDArray[np.int64]) -> tuple[Any, int]:
    """Return K of every sequence as a kernel takes it, null if all are equal, and K."""
    most = int(num_groups.max(initial=0))
    if (num_groups == most).all():
        return None, most
    if is_capturing():
        return _write_counts(num_groups), most
    raw_kernel(*_WRITE_COUNTS)  # loaded by now, should the next call be captured
    return to_device(num_groups.astype(np.int32)), most


def _write_counts(num_groups: NDArray[np.int64]) -> Any:
    """Return counts (B,) int32 as arguments of launches, which a graph can hold.

    CuPy copies from the CPU through memory that it uses again: a graph that is replayed
    later would read something else there.
    """
    out = empty(num_groups.shape, np.int32)
    values = num_groups.ravel().tolist()
    for first in range(0, len(values), COUNTS):
        some = values[first : first + COUNTS]
        some += [0] * (COUNTS - len(some))
        launch(*_WRITE_COUNTS, 1, (first, out.size, *some, out))
    return out
