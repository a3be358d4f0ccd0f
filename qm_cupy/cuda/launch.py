"""Launches: arguments as kernels take them, grids, and shared memory."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import implementation
from .compile import kernel_dtype, kernel_files, kernel_names, raw_kernel
from .constants import BLOCK, COUNTS, VECTOR_BYTES, WARP
from .device import current_device, empty, is_capturing, to_device
from .tiles import Shape, Tiling, select_shape

_SHARED_BYTES = 48 << 10  # of a block, static and dynamic, without asking


def launch(
    page: str,
    kernel: str,
    dtype: Any,
    args: tuple[Any, ...],
    *,
    outputs: int | None = None,
    rows: int | None = None,
    blocks: int | None = None,
    vectors: Any = None,
    threads: int | None = None,
    tiles: Tiling | None = None,
    shape: Shape | None = None,
    block: int = BLOCK,
    shared: int = 0,
    cooperative: bool = False,
    kernels: str | None = None,
) -> None:
    """Run a kernel of ``kernels/*/<page>.cu`` on the current stream and device.

    It is the basic or the optimized one, as `use_kernels` or `kernels` says, and the
    basic one where no other exists. The caller states the work; nothing is launched if
    there is none.

    =========  ==========================  =========================================
    argument   basic kernels               optimized kernels
    =========  ==========================  =========================================
    `outputs`  a thread for each           the same, unless another argument is given
    `rows`     a thread for each           a warp for each
    `blocks`   a thread for each           a block for each, of `block` threads
    `vectors`  a thread for each element   a thread for each 16 bytes of a row
    `tiles`    (state `outputs` too)       a block for each tile, or row of tiles, of
                                           `shape` or else the fastest shape
    `threads`  as many threads             the same
    =========  ==========================  =========================================

    `block`, `shared` (bytes), and `cooperative` (blocks wait for each other) are for
    the optimized kernel. The grid lies in x, the one axis that may have more than
    65,535 blocks.
    """
    chosen = _available(page, kernel, kernels or implementation())
    if chosen == "basic":
        block, shared, cooperative = BLOCK, 0, False
        elements = None if vectors is None else vectors.size
        blocks = _cover(_first(outputs, rows, blocks, elements, threads), BLOCK)
    elif tiles is not None:
        shape = shape or select_shape(tiles, dtype)
        kernel += shape.suffix
        blocks, block, shared = tiles.blocks(shape), shape.threads, shape.shared
    elif blocks is None:
        warps = None if rows is None else rows * WARP
        vectors = None if vectors is None else vector_count(vectors)
        blocks = _cover(_first(warps, vectors, threads, outputs), block)
    if blocks * block == 0:
        return
    file = f"{chosen}/{page}"
    run = raw_kernel(file, kernel, kernel_dtype(file, dtype), cooperative)
    if shared and run.shared_size_bytes + shared > _SHARED_BYTES:
        # The same for every launch, so that threads cannot take it from each other.
        run.max_dynamic_shared_size_bytes = _most_dynamic(run)
    # Every argument in the width of its parameter: a launch converts nothing itself.
    values = tuple([_WIDEN.get(type(x), _as_it_is)(x) for x in args])
    run((blocks,), (block,), values, shared_mem=shared)


@functools.cache
def _available(page: str, kernel: str, wanted: str) -> str:
    """Return "optimized" if it is wanted and there is such a kernel, else "basic"."""
    file = f"{wanted}/{page}"
    found = file in kernel_files() and kernel in kernel_names(file)
    return wanted if found else "basic"


def _first(*counts: int | None) -> int:
    return next(count for count in counts if count is not None)


def _cover(count: int, size: int) -> int:
    """Return how many pieces of a size cover a count."""
    return -(-count // size)


def block_size(num_tokens: int, most: int, step: int = WARP) -> int:
    """Return the threads of a block that has one for each token, and at most `most`."""
    return min(_cover(num_tokens, step) * step, most)


def dynamic_shared_bytes(page: str, kernel: str, dtype: Any) -> int:
    """Return the most shared memory that a launch can add to an optimized kernel's."""
    file = f"optimized/{page}"
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
    width: int = VECTOR_BYTES // x.dtype.itemsize
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
    # Loaded by now, should the next call be captured.
    raw_kernel("basic/counts", "write_counts", "float32")
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
        args = (first, out.size, *some, out)
        launch("counts", "write_counts", np.float32, args, outputs=1)
    return out
