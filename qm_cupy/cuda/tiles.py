"""Tiles of matrices: their shapes, and the selection of the fastest shape.

A tile is the part of a matrix product that one block of GPU threads computes at a time.
Half, whole and wide tiles have 64 × 128, 128 × 128 and 128 × 256 entries. An SM is a
multiprocessor of the GPU.
"""

from typing import Any, NamedTuple

from .compile import TF32, kernel_dtype
from .constants import BLOCK, STEP_BYTES, TILE, WIDE_STAGES
from .device import Device, current_device

# The time of a wide tile, which has an SM to itself, divided by the time of two whole
# tiles, which run on one SM together. Both have the same area. The wide tile copies 3/4
# of the bytes that the two whole tiles copy to shared memory, and issues 2/3 of their
# loads from shared memory, but no other tile runs on the SM while it finishes. This is
# an estimate from counts; it was not timed on a GPU.
_WIDE_COST = 0.9
_RESERVED = 1 << 10  # bytes of shared memory that CUDA reserves for each block


class Shape(NamedTuple):
    """The shape of a tile, and the block that computes it."""

    suffix: str  # the end of the kernel's name
    rows: int  # of the tile
    columns: int  # of the tile
    threads: int  # of the block
    shared: int = 0  # bytes of dynamic shared memory of the block


HALF = Shape("_half", TILE // 2, TILE, BLOCK // 2)
WHOLE = Shape("", TILE, TILE, BLOCK)
# A tile is computed in steps, and a stage is a buffer in shared memory for one step. A
# stage of a wide tile has room for TILE rows and 2 · TILE columns, with STEP_BYTES for
# each row and each column.
_WIDE_BYTES = WIDE_STAGES * 3 * TILE * STEP_BYTES
WIDE = Shape("_wide", TILE, 2 * TILE, BLOCK, _WIDE_BYTES)


class Tiling(NamedTuple):
    """Matrices that are computed in tiles, and the assignment of tiles to blocks."""

    matrices: int  # number of matrices
    rows: int  # of each matrix
    columns: int  # of each matrix
    upper: bool = False  # only tiles that touch the diagonal or are above it
    whole_rows: bool = False  # a block computes all tiles of its rows
    wide: bool = False  # there is also a kernel for wide tiles

    def blocks(self, shape: Shape) -> int:
        """Return the number of blocks for a shape."""
        # Tiles side by side, rounded up: the last one may be partly outside the matrix.
        across = -(-self.columns // shape.columns)
        if self.upper:
            # The matrix is divided into squares of shape.columns × shape.columns. Count
            # the squares on or above the diagonal. A square has one whole tile, two
            # half tiles or two wide tiles.
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
        return HALF  # twice as many blocks, so that fewer SMs are idle
    if not tiling.wide or not _has_wide(dtype, device):
        return WHOLE
    # An SM runs two whole tiles or one wide tile at a time. (For TF32 it runs one whole
    # tile, see TILE_BLOCKS_PER_SM in tiles.cuh; this estimate ignores the difference.)
    # The blocks of a launch run in turns. In one turn, every SM has as many tiles as it
    # can run.
    turns = -(-tiling.blocks(WHOLE) // (2 * device.multiprocessors))
    wide_turns = -(-tiling.blocks(WIDE) // device.multiprocessors)
    cost = turns * tiling.block_tiles(WHOLE)  # unit: time of two whole tiles together
    wide_cost = wide_turns * tiling.block_tiles(WIDE) * _WIDE_COST
    return WIDE if wide_cost < cost else WHOLE


def _has_wide(dtype: Any, device: Device) -> bool:
    """Return whether wide tiles can run on the device.

    There are two conditions: tensor cores can multiply the dtype, and the device has
    more shared memory per block than a wide tile needs, which is 96 KiB. Kernels use
    tensor cores from sm_80 on, where a block may have more than 96 KiB. The comparison
    is strict, because older GPUs have at most 96 KiB (64 KiB on sm_75).
    """
    name = kernel_dtype("optimized/", dtype)
    return name in ("float16", "bfloat16", TF32) and WIDE.shared < device.shared_bytes


def kept_or_half(
    matrices: int, num_tokens: int, row_bytes: int, dtype: Any, static_bytes: int = 0
) -> tuple[Tiling, Shape]:
    """Return the tiling of square matrices of which a block computes whole rows.

    The shape is that of the kernel "…_kept" if it can be used, and otherwise half
    tiles. By default a block loads the rows of its tile again, step by step, for each
    tile of columns. With 16-bit types, two blocks with whole tiles would have too few
    registers for these loads. So this kernel has half tiles, of 64 rows, for all
    dtypes. Its name has no suffix.

    The kernel "…_kept" loads the rows of a block once, to shared memory, and uses whole
    tiles of 128 rows. This kernel runs on two conditions. First, its shared memory must
    fit: `kept_bytes` returns 0 for float64 and for rows that are too wide. Second,
    whole tiles must give at least one block for each multiprocessor; otherwise
    `select_shape` returns half tiles. `static_bytes` is the shared memory that the
    kernel "…_kept" declares itself.
    """
    tiling = Tiling(matrices, num_tokens, num_tokens, whole_rows=True)
    shared_bytes = kept_bytes(row_bytes, dtype, static_bytes)
    if shared_bytes and select_shape(tiling, dtype) is WHOLE:
        return tiling, WHOLE._replace(suffix="_kept", shared=shared_bytes)
    return tiling, HALF._replace(suffix="")


def kept_bytes(row_bytes: int, dtype: Any, static_bytes: int = 0) -> int:
    """Return the shared memory of `multiply_kept` in bytes, or 0 if it cannot be used.

    `multiply_kept`, in kernels/optimized/tiles.cuh, keeps the rows of a tile in shared
    memory while it multiplies them by all columns. With 16-bit types on tensor cores,
    two blocks run on an SM at the same time, so the shared memory of both must fit. The
    same limit applies to 16-bit types without tensor cores (sm_75), where one block
    runs. With float32 one block runs.
    """
    if dtype.itemsize == 8:
        return 0  # not compiled for float64, whose sums need all registers
    size = -(-row_bytes // STEP_BYTES) * STEP_BYTES  # bytes of a row, in whole steps
    # The rows that are kept, and two buffers for columns: one is multiplied while the
    # other is loaded.
    wanted = (WHOLE.rows + 2 * WHOLE.columns) * size
    blocks = 2 if dtype.itemsize == 2 else 1
    # The shared memory of an SM: the limit of a block, and the bytes reserved for it.
    room = current_device().shared_bytes + _RESERVED
    block_bytes = wanted + static_bytes + _RESERVED
    return wanted if blocks * block_bytes <= room else 0
