"""Dendrograms on a GPU: launchers of ``linkage.cu`` and ``single_linkage.cu``.

A team is the blocks that work on one sequence. A cluster is a group of tokens while the
dendrogram is computed. Except in single linkage, every block of a team has a copy
of the arrays of clusters; a slot is the index of a cluster in them. `width` is the
number of bytes of a distance. The methods are described in ``linkage.cu`` and
``single_linkage.cu`` in the folder ``kernels/optimized``.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...cuda.constants import (
    BLOCK,
    LINKAGE_METHODS,
    LINKAGE_SCRATCH,
    LINKAGE_THREADS,
    NEAREST_BYTES,
    SINGLE_INTEGERS,
    SINGLE_PROGRESS,
    SINGLE_REALS,
    SINGLE_ROW_INTEGERS,
    SINGLE_WORDS,
    SLOT_BYTES,
    TREE_BYTES,
    VECTOR_BYTES,
    WARP,
)
from ...cuda.device import current_device, empty, free_memory
from ...cuda.launch import contiguous, counts_on_device, dynamic_shared_bytes, launch
from ...settings import implementation
from .metrics import scale_heights_cuda, similarities_cuda

# Estimated time of all synchronisations of a sequence. It equals the time in which one
# block processes the rows of a sequence of 430 tokens.
_SYNC_COST = 430
# Cosines up to this number of bytes run in one launch, without a look at free memory.
_SMALL = 256 << 20
_FEWER_THREADS = 256  # threads of a block if a multiprocessor runs several blocks


def dendrograms_cuda(
    tokens: Any,
    method: str,
    mass: Any = None,
    mask: Any = None,
    protect: Any = None,
    num_groups: NDArray[np.int64] | None = None,
    *,
    metric: str = "cosine",
) -> Any:
    """Return the dendrograms (B, N - 1, 4) of tokens (B, N, D), or of one sequence.

    If the cosines of the whole batch do not fit in the free memory, launch several
    times, each time with as many sequences as fit. With `num_groups` (B,), rows after
    the merges that leave K groups may be (-1, -1, inf, 0).
    """
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    tokens = tokens.reshape(batch, num_tokens, dim)
    masses, masks, protects = (
        None if x is None else x.reshape(batch, num_tokens)
        for x in (mass, mask, protect)
    )
    counts = None if num_groups is None else num_groups.reshape(batch)
    out = empty((batch, num_tokens - 1, 4), np.float64)
    at_once = _sequences_at_once(batch, num_tokens, accumulation_dtype(tokens.dtype))
    for start in range(0, batch, at_once):
        sequences = slice(start, start + at_once)
        valid, protected = (
            None if x is None else x[sequences] for x in (masks, protects)
        )
        matrix, units = similarities_cuda(
            tokens[sequences], valid, protected, metric, squared=method == "ward"
        )
        linkage_cuda(
            matrix,
            method,
            mass=None if masses is None else masses[sequences],
            mask=valid,
            protect=protected,
            num_groups=None if counts is None else counts[sequences],
            out=out[sequences],
        )
        if units is not None:
            scale_heights_cuda(out[sequences], units)
    return out.reshape(*leading, num_tokens - 1, 4)


def _sequences_at_once(batch: int, num_tokens: int, dtype: np.dtype[Any]) -> int:
    """Return the number of sequences of one launch; raise if not even one fits."""
    bytes_per_sequence = num_tokens**2 * dtype.itemsize
    if batch * bytes_per_sequence <= _SMALL:
        return max(batch, 1)
    free = free_memory()
    if bytes_per_sequence > free:
        raise MemoryError(
            f"a dendrogram of {num_tokens} tokens takes "
            f"{bytes_per_sequence / 2**30:.1f} GiB of GPU memory for the similarities, "
            f"but {free / 2**30:.1f} GiB are free: merge fewer tokens at a time, or "
            "let `cluster_tokens` or `quickmerge` use a method that stores no "
            'similarities ("nearest", "bipartite" or "contiguous")'
        )
    # The cosines get three quarters of the free memory. The rest is for the other
    # arrays of the kernels.
    return min(batch, max(free // 4 * 3 // bytes_per_sequence, 1))


def linkage_cuda(
    cosines: Any,
    method: str,
    mass: Any = None,
    mask: Any = None,
    protect: Any = None,
    num_groups: NDArray[np.int64] | None = None,
    *,
    out: Any = None,
) -> tuple[Any, Any]:
    """Return the dendrograms (B, N - 1, 4) and the number of rounds (B,).

    The cosines (B, N, N) may be overwritten; for Euclidean distances they are the
    matrix of `similarities_cuda`. With `num_groups` (B,), the kernel may
    stop after the merges that leave K groups. K counts each protected token as a group.
    In a round, all pairs of clusters that are each other's nearest neighbours merge; in
    single linkage, all clusters join along their shortest edges. `rounds` is not
    initialised with the basic kernel, which counts no rounds, and for N = 1.
    """
    batch, num_tokens, _ = cosines.shape
    if out is None:
        out = empty((batch, num_tokens - 1, 4), np.float64)
    rounds = empty((batch,), np.int32)
    # One token has no merge, so there is no row to write.
    if num_tokens == 1:
        return out, rounds
    # Without `num_groups`, K = 1: the kernel makes all merges.
    counts, max_groups = (
        (None, 1) if num_groups is None else counts_on_device(num_groups)
    )
    mass = contiguous(mass, cosines.dtype)
    masks = contiguous(mask), contiguous(protect)
    if implementation() == "basic":
        _linkage_basic_cuda(cosines, method, mass, masks, out)
        return out, rounds
    sizes = counts, batch, num_tokens, max_groups
    if method == "single":
        _single_linkage_cuda(cosines, masks, sizes, out, rounds)
        return out, rounds
    dtype = cosines.dtype
    width = dtype.itemsize
    # Three cases, by the shared memory of one block: the clusters and the matrix fit in
    # it (`in_shared` and `state_in_shared`), only the clusters fit (`state_in_shared`),
    # or neither fits. `room` is the shared memory of a block without the scratch, in
    # bytes.
    room = _dynamic_shared_bytes("linkage", dtype) - LINKAGE_SCRATCH * width
    height_bytes = _height_bytes(num_tokens, width)
    state_bytes = _state_bytes(num_tokens, width)
    in_shared = height_bytes + bytes_alone(num_tokens, width) <= room
    state_in_shared = state_bytes <= room
    # 0 bytes if the clusters are in global memory.
    shared = state_in_shared * state_bytes
    if in_shared:
        shared = height_bytes + bytes_alone(num_tokens, width)
    layout = layout_of(
        batch, num_tokens, width, LINKAGE_SCRATCH * width + shared, one_block=in_shared
    )
    # When at most `max_alone` clusters are left, the first block of a team can continue
    # without the other blocks: the clusters and their matrix fit in its shared memory.
    # If the heights are in shared memory, they stay there. With `max_alone` = 0, the
    # first block never continues alone.
    max_alone = 0
    if layout.blocks > 1:
        max_alone = max_clusters_alone(
            room - state_in_shared * height_bytes, layout.threads, width
        )
        shared = room if max_alone else shared
    # Every block has its own copy of the clusters. Copies in global memory need arrays.
    copies = 0 if state_in_shared else layout.num_teams * layout.blocks
    # For each team: its merges so far, and two buffers in which its blocks publish the
    # nearest cluster of each slot.
    tree_bytes = _tree_bytes(num_tokens, width)
    trees = empty((layout.num_teams, tree_bytes), np.uint8)
    exchange = empty(
        (layout.num_teams, 2 * num_tokens * NEAREST_BYTES[width]), np.uint8
    )
    states = empty((copies, state_bytes), np.uint8) if copies else None
    options = (
        LINKAGE_METHODS[method],
        int(in_shared),
        max_alone,
        layout.blocks,
        state_bytes,
        tree_bytes,
    )
    scratch = trees, exchange, states, _zeros(layout.num_teams)
    launch(
        "linkage",
        "linkage",
        dtype,
        (cosines, mass, *masks, *sizes, *options, *scratch, out, rounds),
        blocks=layout.num_teams * layout.blocks,
        block=layout.threads,
        shared=LINKAGE_SCRATCH * width + shared,
        cooperative=layout.blocks > 1,  # blocks of a team wait for each other
    )
    return out, rounds


def _height_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of the heights of all merges, which each block keeps."""
    return _aligned(num_tokens * width)


def _slot_bytes(num_slots: int, width: int) -> int:
    """Return the bytes of the clusters in `num_slots` slots, which each block keeps."""
    return _aligned(num_slots * SLOT_BYTES[width])


def _aligned(size: int) -> int:
    """Return a number of bytes, rounded up to a multiple of `VECTOR_BYTES`."""
    return -(-size // VECTOR_BYTES) * VECTOR_BYTES


def _state_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of the heights and clusters that each block keeps."""
    return _height_bytes(num_tokens, width) + _slot_bytes(num_tokens, width)


def bytes_alone(num_slots: int, width: int) -> int:
    """Return the bytes that a block needs in shared memory to work without the others.

    This memory has the clusters, two buffers of the nearest cluster of each slot, and
    the matrix. The heights are not included.
    """
    exchange = 2 * NEAREST_BYTES[width]  # two buffers: one is read, one is written
    return _slot_bytes(num_slots, width) + num_slots * (exchange + num_slots * width)


def max_clusters_alone(room: int, threads: int, width: int) -> int:
    """Return the largest number of clusters that fit in `room` bytes of one block.

    There is at most one cluster for each thread, because `renumber` in
    ``linkage_columns.cuh`` moves clusters to another layout in one pass. Fewer than two
    clusters count as 0: they have nothing to merge.
    """
    # The matrix alone has n² distances, so n is at most √(room / width).
    sizes = range(min(threads, math.isqrt(max(room, 0) // width)), 1, -1)
    return next((n for n in sizes if bytes_alone(n, width) <= room), 0)


def _tree_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of a sequence's nodes, heights and merges; a multiple of 8."""
    # A token has 28 or 36 bytes (`TREE_BYTES`), which is 4 more than a multiple of 8.
    # So an odd number of tokens needs 4 more bytes.
    return num_tokens * TREE_BYTES[width] + num_tokens % 2 * 4


def _single_linkage_cuda(
    cosines: Any, masks: tuple[Any, ...], sizes: tuple[Any, ...], out: Any, rounds: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    dtype = cosines.dtype
    # Sizes of two arrays in shared memory. The first has a count for each warp of a
    # block, which has at most 32 warps (`WARP`, the threads of a warp, is 32 too). The
    # second has the parent, node and size of each token, for the block that writes the
    # rows of the dendrogram. If it does not fit, the arrays of `state` are used.
    count_bytes, row_bytes = 4 * WARP, 4 * SINGLE_ROW_INTEGERS * num_tokens
    in_shared = count_bytes + row_bytes <= _dynamic_shared_bytes(
        "single_linkage", dtype
    )
    shared = count_bytes + row_bytes if in_shared else count_bytes
    layout = layout_of(batch, num_tokens, dtype.itemsize, shared)
    state = (
        empty((layout.num_teams, SINGLE_WORDS * num_tokens), np.uint64),
        empty((layout.num_teams, SINGLE_REALS * num_tokens), dtype),
        empty((layout.num_teams, SINGLE_INTEGERS * num_tokens), np.int32),
        empty((layout.num_teams, SINGLE_PROGRESS), np.int32),
        _zeros(layout.num_teams),
    )
    options = int(in_shared), layout.blocks
    launch(
        "single_linkage",
        "single_linkage",
        dtype,
        (cosines, *masks, *sizes, *options, *state, out, rounds),
        blocks=layout.num_teams * layout.blocks,
        block=layout.threads,
        shared=shared,
        cooperative=layout.blocks > 1,
    )


def _dynamic_shared_bytes(kernel: str, dtype: Any) -> int:
    return dynamic_shared_bytes(kernel, kernel, dtype)


class Layout(NamedTuple):
    """The blocks and threads of a launch."""

    num_teams: int  # teams of blocks, each of which works on one sequence at a time
    blocks: int  # blocks of each team
    threads: int  # threads of each block


def layout_of(
    batch: int, num_tokens: int, width: int, shared: int, *, one_block: bool = False
) -> Layout:
    """Return the layout that should be fastest.

    A block uses `shared` bytes of shared memory. With `one_block`, each sequence gets
    one block, because all its arrays fit in the shared memory of this block.
    """
    device, threads = current_device(), LINKAGE_THREADS[width]
    rows = threads // WARP  # rows of one block at a time, a warp for each row
    # With more blocks, some warps would have no row.
    max_blocks = min(-(-num_tokens // rows), device.multiprocessors)
    if one_block or batch >= device.multiprocessors or max_blocks == 1:
        # No block waits for another block. If a multiprocessor has memory for three
        # blocks, smaller blocks are faster: while one of them waits, another one works.
        # A multiprocessor has about as much shared memory as one block may use.
        several_fit = (
            batch > device.multiprocessors and 3 * shared <= device.shared_bytes
        )
        return Layout(
            batch, 1, min(threads, _FEWER_THREADS) if several_fit else threads
        )

    # The time of the batch, in units of the time of one block for the rows of one
    # sequence. More blocks divide the work on rows, O(N²), but not the time of the
    # synchronisations. With larger teams, fewer teams fit on the GPU at once, so that a
    # large batch needs more waves.
    def cost(blocks: int) -> float:
        waves = -(-batch // (device.multiprocessors // blocks))
        return waves * (1 / blocks + (_SYNC_COST / num_tokens) ** 2)

    blocks = min(range(1, max_blocks + 1), key=cost)
    # All blocks of a cooperative launch must run at once, each on its multiprocessor.
    num_teams = min(batch, device.multiprocessors // blocks)
    return Layout(num_teams, blocks, threads)


def _zeros(count: int) -> Any:
    """Return an array (count,) of zeros: a counter for each team.

    A counter has the number of blocks that have arrived at a barrier of the team.
    """
    arrived = empty((count,), np.uint32)
    arrived.fill(0)  # `fill` needs no copy from the CPU
    return arrived


def _linkage_basic_cuda(
    cosines: Any, method: str, mass: Any, masks: tuple[Any, ...], out: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    # Scratch of the kernel, each array (B, N). `reals` holds the masses and the least
    # distances of the clusters; `integers` holds their nearest clusters, nodes, sizes.
    reals = [empty((batch, num_tokens), cosines.dtype) for _ in range(2)]
    integers = [empty((batch, num_tokens), np.int32) for _ in range(3)]
    sizes = batch, num_tokens, LINKAGE_METHODS[method]
    args = (cosines, mass, *masks, *sizes, *reals, *integers, out)
    launch("linkage", "linkage", cosines.dtype, args, threads=batch * BLOCK)
