"""Launches of kernels: arguments, grids and shared memory."""

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

# Shared memory of a block, static and dynamic, that CUDA allows by default. A kernel
# that needs more must set its attribute before the launch.
_SHARED_BYTES = 48 << 10


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

    `use_kernels` or `kernels` selects the basic or the optimized kernel. If there is no
    optimized kernel, the basic one runs. The arguments below give the amount of work.
    If it is zero, nothing is launched.

    =========  ==========================  =========================================
    argument   basic kernels               optimized kernels
    =========  ==========================  =========================================
    `outputs`  a thread for each           the same, unless another argument is given
    `rows`     a thread for each           a warp for each
    `blocks`   a thread for each           a block for each, of `block` threads
    `vectors`  a thread for each element   a thread for each 16 bytes of a row
    `tiles`    (give `outputs` too)        a block for each tile, or row of tiles, of
                                           `shape`, by default the fastest shape
    `threads`  this many threads           the same
    =========  ==========================  =========================================

    `block`, `shared` (bytes), and `cooperative` (blocks wait for each other) apply to
    the optimized kernel only. The grid uses the axis x, because y and z are limited to
    65,535 blocks.
    """
    folder = _available(page, kernel, kernels or implementation())
    if folder == "basic":  # one thread computes one output, in blocks of one size
        block, shared, cooperative = BLOCK, 0, False
        elements = None if vectors is None else vectors.size
        blocks = _cover(_first(outputs, rows, blocks, elements, threads), BLOCK)
    elif tiles is not None:
        shape = shape or select_shape(tiles, dtype)
        kernel += shape.suffix  # each shape is a kernel of its own
        blocks, block, shared = tiles.blocks(shape), shape.threads, shape.shared
    elif blocks is None:
        warps = None if rows is None else rows * WARP
        vectors = None if vectors is None else vector_count(vectors)
        blocks = _cover(_first(warps, vectors, threads, outputs), block)
    if blocks * block == 0:  # an empty batch; CUDA refuses a grid without blocks
        return
    file = f"{folder}/{page}"
    run = raw_kernel(file, kernel, kernel_dtype(file, dtype), cooperative)
    if shared and run.shared_size_bytes + shared > _SHARED_BYTES:
        # Always the largest value, because all threads use one kernel object. With
        # exact sizes another thread could lower the limit before this launch.
        run.max_dynamic_shared_size_bytes = _max_dynamic_bytes(run)
    # CuPy copies each argument's bytes as they are, so each must have the width of its
    # parameter in the kernel.
    values = tuple([_WIDEN.get(type(x), _unchanged)(x) for x in args])
    run((blocks,), (block,), values, shared_mem=shared)


@functools.cache
def _available(page: str, kernel: str, wanted: str) -> str:
    """Return the wanted folder if it contains the kernel, else "basic"."""
    file = f"{wanted}/{page}"
    exists = file in kernel_files() and kernel in kernel_names(file)
    return wanted if exists else "basic"


def _first(*counts: int | None) -> int:
    """Return the first count that is not None: the order above is the priority."""
    return next(count for count in counts if count is not None)


def _cover(count: int, size: int) -> int:
    """Return the number of pieces of a size that cover a count: ⌈count / size⌉."""
    return -(-count // size)


def block_size(num_tokens: int, max_threads: int, step: int = WARP) -> int:
    """Return the threads of a block with one thread per token, up to `max_threads`.

    The number is a multiple of `step`, because a warp is never divided.
    """
    return min(_cover(num_tokens, step) * step, max_threads)


def dynamic_shared_bytes(page: str, kernel: str, dtype: Any) -> int:
    """Return the largest dynamic shared memory of an optimized kernel, in bytes."""
    file = f"optimized/{page}"
    return _max_dynamic_bytes(raw_kernel(file, kernel, kernel_dtype(file, dtype)))


def _max_dynamic_bytes(run: Any) -> int:
    # The limit of the device includes the static part.
    max_bytes: int = current_device().shared_bytes - run.shared_size_bytes
    return max_bytes


def _unchanged(x: Any) -> Any:
    """Return an array or NumPy scalar; raise if an array has gaps or another order."""
    if not isinstance(x, np.generic) and not x.flags.c_contiguous:
        raise ValueError(
            f"a kernel needs C-contiguous arrays, got strides {x.strides}: use "
            "`contiguous`"
        )
    return x


# Python numbers and None become 8 bytes: `long long`, `double` or a null pointer.
_NULL = np.uint64(0)
_WIDEN: dict[type, Callable[[Any], Any]] = {
    int: np.int64,
    bool: np.int64,
    float: np.float64,
    type(None): lambda x: _NULL,
}


def vector_count(x: Any) -> int:
    """Return the number of vectors of 16 bytes that cover the rows of `x`."""
    width: int = VECTOR_BYTES // x.dtype.itemsize  # elements of one vector
    rows: int = math.prod(x.shape[:-1])
    # Each row starts a new vector, so the last vector of a row may be partly empty.
    return rows * -(-int(x.shape[-1]) // width)


def contiguous(x: Any, dtype: Any = None) -> Any:
    """Return `x` C-contiguous and of `dtype`, without a copy if it is; None is kept."""
    return None if x is None else x.astype(dtype or x.dtype, order="C", copy=False)


def device_counts(num_groups: NDArray[np.int64]) -> tuple[Any, int]:
    """Return K of every sequence on the device, or None if all are equal; and max K.

    Counts are known on the CPU, because the shapes of results depend on them.
    """
    max_groups = int(num_groups.max(initial=0))
    if (num_groups == max_groups).all():
        return None, max_groups
    if is_capturing():
        return _write_counts(num_groups), max_groups
    # Load the kernel now: no module can be loaded while a later call is captured.
    raw_kernel("basic/counts", "write_counts", "float32")
    return to_device(num_groups.astype(np.int32)), max_groups


def _write_counts(num_groups: NDArray[np.int64]) -> Any:
    """Write counts (B,) int32 by launches whose arguments are the counts.

    A CUDA graph stores the arguments of its launches. A copy from the CPU would not
    work: CuPy reuses its staging memory, so a later replay would copy other values.
    """
    out = empty(num_groups.shape, np.int32)
    values = num_groups.ravel().tolist()
    for first in range(0, len(values), COUNTS):
        chunk = values[first : first + COUNTS]
        chunk += [0] * (COUNTS - len(chunk))  # the kernel ignores these
        args = (first, out.size, *chunk, out)
        launch("counts", "write_counts", np.float32, args, outputs=1)
    return out
