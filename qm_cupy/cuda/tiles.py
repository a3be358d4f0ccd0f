"""Tiles of matrices: their shapes, and the selection of the fastest shape.

A tile is the part of a product that one block computes at a time. Half, whole and wide
tiles have 64 × 128, 128 × 128 and 128 × 256 entries.
"""

from typing import Any, NamedTuple

from .compile import TF32, kernel_dtype
from .constants import BLOCK, STEP_BYTES, TILE, WIDE_STAGES
from .device import Device, current_device

# Time of a wide tile that has an SM to itself, divided by the time of two whole tiles
# that run on the SM together. The wide tile reads 3/4 of the bytes and issues 3/4 of
# the loads from shared memory, but nothing else runs while it finishes. This is an
# estimate from counts: no GPU has timed it.
_WIDE_COST = 0.9
_RESERVED = 1 << 10  # bytes of shared memory that CUDA reserves for each block


class Shape(NamedTuple):
    """The shape of a tile, and the block that computes it."""

    suffix: str  # of the kernel's name
    rows: int
    columns: int
    threads: int
    shared: int = 0  # bytes of dynamic shared memory


HALF = Shape("_half", TILE // 2, TILE, BLOCK // 2)
WHOLE = Shape("", TILE, TILE, BLOCK)
# Each stage has the steps of TILE rows and 2 · TILE columns.
_WIDE_BYTES = WIDE_STAGES * 3 * TILE * STEP_BYTES
WIDE = Shape("_wide", TILE, 2 * TILE, BLOCK, _WIDE_BYTES)


class Tiling(NamedTuple):
    """Matrices that are computed in tiles, and the assignment of tiles to blocks."""

    matrices: int
    rows: int
    columns: int
    upper: bool = False  # only tiles that touch the diagonal or are above it
    whole_rows: bool = False  # a block computes all tiles of its rows
    wide: bool = False  # there is a wide kernel

    def blocks(self, shape: Shape) -> int:
        """Return the number of blocks for a shape."""
        across = -(
            -self.columns // shape.columns
        )  # rounded up: the last may be partial
        if self.upper:
            # Squares of shape.columns × shape.columns on or above the diagonal; a half
            # tile needs two blocks for each square.
            squares = across * (across + 1) // 2
            return self.matrices * squares * (shape.columns // shape.rows)
        down = -(-self.rows // shape.rows)
        return self.matrices * down * (1 if self.whole_rows else across)

    def block_tiles(self, shape: Shape) -> int:
        """Return the number of tiles that each block computes."""
        return -(-self.columns // shape.columns) if self.whole_rows else 1


def select_shape(tiling: Tiling, dtype: Any) -> Shape:
    """Return the shape that is expected to be fastest on the current device."""
    device = current_device()
    if tiling.blocks(WHOLE) < device.multiprocessors:
        return HALF  # twice as many blocks, so that fewer multiprocessors are idle
    if not tiling.wide or not _has_wide(dtype, device):
        return WHOLE
    # A multiprocessor runs two whole tiles or one wide tile at a time. The blocks of a
    # launch run in turns, each of which fills all multiprocessors.
    turns = -(-tiling.blocks(WHOLE) // (2 * device.multiprocessors))
    wide_turns = -(-tiling.blocks(WIDE) // device.multiprocessors)
    cost = turns * tiling.block_tiles(WHOLE)  # unit: time of two whole tiles together
    wide_cost = wide_turns * tiling.block_tiles(WIDE) * _WIDE_COST
    return WIDE if wide_cost < cost else WHOLE


def _has_wide(dtype: Any, device: Device) -> bool:
    """Return whether tensor cores multiply this dtype, as a wide kernel needs.

    The kernels use tensor cores from sm_80 on. Older GPUs, such as sm_75, are excluded
    by their shared memory, which is at most 96 KB.
    """
    name = kernel_dtype("optimized/", dtype)
    return name in ("float16", "bfloat16", TF32) and WIDE.shared < device.shared_bytes


def kept_bytes(row_bytes: int, dtype: Any) -> int:
    """Return the shared memory of `multiply_kept` in bytes, or 0 if it does not fit.

    With 16-bit types two blocks run on an SM, so both must fit.
    """
    if dtype.itemsize == 8:
        return 0  # the sums of float64 leave no registers for it
    size = -(-row_bytes // STEP_BYTES) * STEP_BYTES  # bytes of a row, in whole steps
    # The rows that are kept, and two buffers of columns: one is read, one is loaded.
    wanted = (WHOLE.rows + 2 * WHOLE.columns) * size
    blocks = 2 if dtype.itemsize == 2 else 1
    # Shared memory of an SM: the limit of a block and the bytes reserved for it.
    room = current_device().shared_bytes + _RESERVED
    return wanted if blocks * (wanted + _RESERVED) <= room else 0
