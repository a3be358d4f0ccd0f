from typing import Any, NamedTuple

from .compile import TF32, kernel_dtype
from .constants import BLOCK, STEP_BYTES, TILE, WIDE_STAGES
from .device import Device, current_device

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


class Tiling(NamedTuple):
    """Matrices in tiles: those that blocks work at, and how they are shared out."""

    matrices: int
    rows: int
    columns: int
    upper: bool = False  # only the tiles that reach the diagonal or lie above
    whole_rows: bool = False  # a block works at all tiles of some rows
    wide: bool = False  # there is a wide kernel

    def blocks(self, shape: Shape) -> int:
        """Return how many blocks a shape takes."""
        across = -(-self.columns // shape.columns)
        if self.upper:
            squares = across * (across + 1) // 2
            return self.matrices * squares * (shape.columns // shape.rows)
        down = -(-self.rows // shape.rows)
        return self.matrices * down * (1 if self.whole_rows else across)

    def block_tiles(self, shape: Shape) -> int:
        """Return how many tiles each block works at."""
        return -(-self.columns // shape.columns) if self.whole_rows else 1


def select_shape(tiling: Tiling, dtype: Any) -> Shape:
    """Return the shape that should be fastest."""
    device = current_device()
    if tiling.blocks(WHOLE) < device.multiprocessors:
        return HALF
    if not tiling.wide or not _has_wide(dtype, device):
        return WHOLE
    turns = -(-tiling.blocks(WHOLE) // (2 * device.multiprocessors))
    wide_turns = -(-tiling.blocks(WIDE) // device.multiprocessors)
    cost = turns * tiling.block_tiles(WHOLE)
    wide_cost = wide_turns * tiling.block_tiles(WIDE) * _WIDE_COST
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
