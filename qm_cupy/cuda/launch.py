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

# The static and dynamic shared memory of a block that CUDA allows by default, in bytes.
# For more, `max_dynamic_shared_size_bytes` of the kernel must be set before the launch.
_SHARED_BYTES = 48 << 10


def launch(
    file: str,
    kernel: str,
    dtype: Any,
    args: tuple[Any, ...],
    *,
    outputs: int | None = None,
    rows: int | None = None,
    blocks: int | None = None,
    vector_output: Any = None,
    threads: int | None = None,
    tiles: Tiling | None = None,
    shape: Shape | None = None,
    block: int = BLOCK,
    shared: int = 0,
    cooperative: bool = False,
    kernels: str | None = None,
) -> None:
    """Run a kernel of ``kernels/*/<file>.cu`` on the current stream and device.

    `kernels` selects the folder "basic" or "optimized". By default it is the value that
    the user has set by `use_kernels`, which `implementation` returns. If there is no
    optimized kernel, the basic one runs. `dtype` is the dtype that the kernel is
    compiled for, and `args` are its arguments.

    The arguments below give the amount of work, from which the number of GPU threads
    follows. If it is zero, nothing is launched.

    ===============  ==========================  ======================================
    argument         basic kernels               optimized kernels
    ===============  ==========================  ======================================
    `outputs`        a thread for each; if it    the same, unless another argument is
                     is given, the arguments     given
                     below are ignored
    `rows`           a thread for each           a warp for each
    `blocks`         a thread for each           a block for each, of `block` threads
    `vector_output`  a thread for each element   a thread for each 16 bytes of a row
                     of this array               of this array
    `tiles`          (give `outputs` too)        a block for each tile, or for each row
                                                 of tiles
    `threads`        this many threads           the same
    ===============  ==========================  ======================================

    `shape` is the shape of the tiles, by default the fastest one. `block` (threads of a
    block), `shared` (bytes of dynamic shared memory) and `cooperative` (blocks wait for
    each other) apply to the optimized kernel only. The grid uses the axis x, because y
    and z are limited to 65,535 blocks.
    """
    folder = _available(file, kernel, kernels or implementation())
    if folder == "basic":  # one thread for each output, in blocks of one size
        block, shared, cooperative = BLOCK, 0, False
        elements = None if vector_output is None else vector_output.size
        blocks = _cover(_first(outputs, rows, blocks, elements, threads), BLOCK)
    elif tiles is not None:
        shape = shape or select_shape(tiles, dtype)
        kernel += shape.suffix  # each shape has its own kernel
        blocks, block, shared = tiles.blocks(shape), shape.threads, shape.shared
    elif blocks is None:
        warp_threads = None if rows is None else rows * WARP
        vectors = None if vector_output is None else vector_count(vector_output)
        blocks = _cover(_first(warp_threads, vectors, threads, outputs), block)
    if blocks * block == 0:  # an empty batch; CUDA refuses a grid without blocks
        return
    path = f"{folder}/{file}"
    run = raw_kernel(path, kernel, kernel_dtype(path, dtype), cooperative)
    if shared and run.shared_size_bytes + shared > _SHARED_BYTES:
        # Always set the largest value. All Python threads use the same kernel object,
        # so with exact sizes another thread could lower the limit before this launch.
        run.max_dynamic_shared_size_bytes = _max_dynamic_bytes(run)
    # CuPy copies the bytes of each argument without a conversion. Each argument must
    # therefore have as many bytes as the kernel's parameter.
    values = tuple([_WIDEN.get(type(x), _unchanged)(x) for x in args])
    run((blocks,), (block,), values, shared_mem=shared)


@functools.cache
def _available(file: str, kernel: str, wanted: str) -> str:
    """Return the wanted folder if it contains the kernel, else "basic"."""
    path = f"{wanted}/{file}"
    exists = path in kernel_files() and kernel in kernel_names(path)
    return wanted if exists else "basic"


def _first(*counts: int | None) -> int:
    """Return the first count that is not None. Callers pass the counts by priority."""
    return next(count for count in counts if count is not None)


def _cover(count: int, size: int) -> int:
    """Return ⌈count / size⌉, for example the blocks that contain `count` threads."""
    return -(-count // size)


def block_size(num_tokens: int, max_threads: int, step: int = WARP) -> int:
    """Return the number of threads of a block that works on a sequence.

    It is the number of tokens, rounded up to a multiple of `step`, or `max_threads` if
    that is less; then a thread has several tokens. A step has one or more whole warps,
    because a block consists of whole warps.
    """
    return min(_cover(num_tokens, step) * step, max_threads)


def dynamic_shared_bytes(file: str, kernel: str, dtype: Any) -> int:
    """Return the largest dynamic shared memory of an optimized kernel, in bytes."""
    path = f"optimized/{file}"
    return _max_dynamic_bytes(raw_kernel(path, kernel, kernel_dtype(path, dtype)))


def _max_dynamic_bytes(run: Any) -> int:
    # The device limits the sum of static and dynamic shared memory.
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


# Python numbers and None become 8 bytes, as the kernels declare them: `long long`,
# `double` or a null pointer.
_NULL = np.uint64(0)
_WIDEN: dict[type, Callable[[Any], Any]] = {
    int: np.int64,
    bool: np.int64,
    float: np.float64,
    type(None): lambda x: _NULL,
}


def vector_count(x: Any) -> int:
    """Return how many vectors of 16 bytes cover the rows of an array."""
    width: int = VECTOR_BYTES // x.dtype.itemsize  # elements of one vector
    rows: int = math.prod(x.shape[:-1])
    # Each row starts with a new vector, so the last vector of a row may be partly
    # empty.
    return rows * -(-int(x.shape[-1]) // width)


def contiguous(x: Any, dtype: Any = None) -> Any:
    """Return a C-contiguous array in `dtype` with these values; None stays None.

    An array that already has this order and dtype is not copied.
    """
    return None if x is None else x.astype(dtype or x.dtype, order="C", copy=False)


def counts_on_device(
    num_groups: NDArray[np.int64], default: int | None = None
) -> tuple[Any, int]:
    """Return K of every sequence on the device, and max K.

    The first result is None if every K is `default`: the K that the kernel uses if it
    gets no counts. It is max K by default. A kernel that uses the length of an axis
    instead needs this length as `default`, because all K can be smaller. The argument
    `num_groups` (B,) is on the CPU, because the shapes of results depend on it.
    """
    max_groups = int(num_groups.max(initial=0))
    if (num_groups == (max_groups if default is None else default)).all():
        return None, max_groups
    if is_capturing():
        return _write_counts(num_groups), max_groups
    # This call does not need `write_counts`, but a later call may be captured in a CUDA
    # graph, and no module can be loaded during the capture. So load the kernel now.
    raw_kernel("basic/counts", "write_counts", "float32")
    return to_device(num_groups.astype(np.int32)), max_groups


def _write_counts(num_groups: NDArray[np.int64]) -> Any:
    """Write counts (B,) int32 to the device by launches whose arguments are the counts.

    A CUDA graph stores the arguments of its launches. A captured copy from the CPU
    would not work: CuPy reuses the CPU memory of the copy, so a later replay of the
    graph would copy other values.
    """
    out = empty(num_groups.shape, np.int32)
    values = num_groups.ravel().tolist()
    for first in range(0, len(values), COUNTS):
        chunk = values[first : first + COUNTS]
        chunk += [0] * (COUNTS - len(chunk))  # the kernel ignores the zeros
        args = (first, out.size, *chunk, out)
        # The kernel uses no floats. Every kernel is compiled for some dtype.
        launch("counts", "write_counts", np.float32, args, outputs=1)
    return out
