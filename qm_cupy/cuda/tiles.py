from collections.abc import Callable
from typing import Any, NamedTuple

from .compile import TF32, kernel_dtype
from .constants import BLOCK, STEP_BYTES, TILE, WIDE_STAGES
from .device import Device, current_device
from .launch import launch

# Seconds of a wide tile on a whole SM, over those of two tiles that share the SM. The
# wide one reads 3/4 of the bytes and issues 3/4 of the loads from shared memory, but
# nothing runs while it finishes. An estimate from counts: no GPU has timed it.
_WIDE_COST = 0.9
_RESERVED = 1 << 10  # bytes of shared memory that CUDA takes of each block


class Shape(NamedTuple):
    """A tile, and how a block works at it."""

    suffix: str  # of the kernel's name
    rows: int
    columns: int
    threads: int
    shared: int = 0  # bytes that the launch gives


HALF = Shape("_half", TILE // 2, TILE, BLOCK // 2)
WHOLE = Shape("", TILE, TILE, BLOCK)
_WIDE_BYTES = WIDE_STAGES * 3 * TILE * STEP_BYTES
WIDE = Shape("_wide", TILE, 2 * TILE, BLOCK, _WIDE_BYTES)


def upper_tiles(shape: Shape, num_tokens: int) -> int:
    """Return how many tiles of an N × N matrix reach its diagonal or lie above."""
    squares = -(-num_tokens // shape.columns)
    return shape.columns // shape.rows * squares * (squares + 1) // 2


def row_tiles(shape: Shape, num_rows: int) -> int:
    """Return how many tiles the rows of a matrix take."""
    return -(-num_rows // shape.rows)


def column_tiles(shape: Shape, num_columns: int) -> int:
    """Return how many tiles the columns of a matrix take."""
    return -(-num_columns // shape.columns)


def select_shape(
    blocks: Callable[[Shape], int],
    dtype: Any = None,
    tiles: Callable[[Shape], int] = lambda shape: 1,
) -> Shape:
    """Return the shape that should be fastest.

    `blocks` tells how many blocks a shape takes, and `tiles` how many tiles each of
    them works at. Without a `dtype` the kernel has no wide variant.
    """
    device = current_device()
    if blocks(WHOLE) < device.multiprocessors:
        return HALF
    if dtype is None or not _has_wide(dtype, device):
        return WHOLE
    turns = -(-blocks(WHOLE) // (2 * device.multiprocessors))
    wide_turns = -(-blocks(WIDE) // device.multiprocessors)
    cost, wide_cost = turns * tiles(WHOLE), wide_turns * tiles(WIDE) * _WIDE_COST
    return WIDE if wide_cost < cost else WHOLE


def _has_wide(dtype: Any, device: Device) -> bool:
    """Whether tensor cores multiply this dtype, as wide kernels need.

    GPUs without them (sm_75 and older) have less shared memory, 96 KB at most.
    """
    name = kernel_dtype("optimized/", dtype)
    return name in ("float16", "bfloat16", TF32) and WIDE.shared < device.shared_bytes


def kept_bytes(row_bytes: int, dtype: Any) -> int:
    """Return the shared memory of `multiply_kept`, or 0 where there is no room for it.

    Of 16-bit types two blocks share an SM.
    """
    if dtype.itemsize == 8:
        return 0  # whose sums leave no registers
    size = -(-row_bytes // STEP_BYTES) * STEP_BYTES
    wanted = (WHOLE.rows + 2 * WHOLE.columns) * size
    blocks = 2 if dtype.itemsize == 2 else 1
    room = current_device().shared_bytes + _RESERVED
    return wanted if blocks * (wanted + _RESERVED) <= room else 0


def launch_tiles(
    file: str,
    kernel: str,
    dtype: Any,
    shape: Shape,
    blocks: int,
    args: tuple[Any, ...],
) -> None:
    """Run the variant of a kernel for a shape of tile."""
    launch(
        f"optimized/{file}",
        kernel + shape.suffix,
        dtype,
        blocks * shape.threads,
        args,
        block=shape.threads,
        shared=shape.shared,
    )
