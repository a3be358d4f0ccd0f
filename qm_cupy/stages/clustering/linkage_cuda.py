"""Dendrograms on a GPU: the launchers of ``kernels/*/linkage.cu``."""

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
from ...cuda.launch import contiguous, device_counts, dynamic_shared_bytes, launch
from ...settings import implementation
from .cosine_similarity import cosine_similarity_cuda

_MEETINGS = 430  # tokens whose rows take a block as long as meetings do; an estimate
_SMALL = 256 << 20  # bytes that nobody asks the free memory for
_FEWER = 256  # threads of a block where several share a multiprocessor


def dendrograms_cuda(
    tokens: Any,
    method: str,
    mass: Any = None,
    mask: Any = None,
    protect: Any = None,
    num_groups: NDArray[np.int64] | None = None,
) -> Any:
    """Return the dendrograms (B, N - 1, 4) of tokens (B, N, D), or of one sequence.

    As many sequences at a time as the memory has room for their cosines.
    """
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    tokens = tokens.reshape(batch, num_tokens, dim)
    weight, valid, alone = (
        None if x is None else x.reshape(batch, num_tokens)
        for x in (mass, mask, protect)
    )
    counts = None if num_groups is None else num_groups.reshape(batch)
    out = empty((batch, num_tokens - 1, 4), np.float64)
    part = _sequences_at_once(batch, num_tokens, accumulation_dtype(tokens.dtype))
    for first in range(0, batch, part):
        now = slice(first, first + part)
        linkage_cuda(
            cosine_similarity_cuda(tokens[now]),
            method,
            mass=None if weight is None else weight[now],
            mask=None if valid is None else valid[now],
            protect=None if alone is None else alone[now],
            num_groups=None if counts is None else counts[now],
            out=out[now],
        )
    return out.reshape(*leading, num_tokens - 1, 4)


def _sequences_at_once(batch: int, num_tokens: int, kind: np.dtype[Any]) -> int:
    each = num_tokens**2 * kind.itemsize
    if batch * each <= _SMALL:
        return max(batch, 1)
    free = free_memory()
    if each > free:
        raise MemoryError(
            f"a dendrogram of {num_tokens} tokens takes {each / 2**30:.1f} GiB of GPU "
            f"memory for their similarities, and {free / 2**30:.1f} GiB are free: "
            "merge fewer tokens at a time, or by a method that stores none of them "
            '("nearest", "bipartite" or "contiguous")'
        )
    return min(batch, max(free // 4 * 3 // each, 1))


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
    """Return the dendrograms (B, N - 1, 4) and the rounds (B,) they took.

    The cosines (B, N, N) are used up. With `num_groups` (B,), only the merges down to K
    groups, the protected tokens' own among them, are sure to be made.
    """
    batch, num_tokens, _ = cosines.shape
    if out is None:
        out = empty((batch, num_tokens - 1, 4), np.float64)
    rounds = empty((batch,), np.int32)
    if num_tokens == 1:
        return out, rounds
    given, most = (None, 1) if num_groups is None else device_counts(num_groups)
    mass = contiguous(mass, cosines.dtype)
    masks = contiguous(mask), contiguous(protect)
    if implementation() == "basic":
        _linkage_basic_cuda(cosines, method, mass, masks, out)
        return out, rounds
    counts = given, batch, num_tokens, most
    if method == "single":
        _single_linkage_cuda(cosines, masks, counts, out, rounds)
        return out, rounds
    dtype = cosines.dtype
    width = dtype.itemsize
    room = _dynamic_shared_bytes("linkage", dtype) - LINKAGE_SCRATCH * width
    heights, state = _height_bytes(num_tokens, width), _state_bytes(num_tokens, width)
    alone = heights + held_bytes(num_tokens, width) <= room  # all in a block's memory
    held = state <= room  # the clusters
    shared = held * state
    if alone:
        shared = heights + held_bytes(num_tokens, width)
    layout = layout_of(
        batch, num_tokens, width, LINKAGE_SCRATCH * width + shared, alone=alone
    )
    last = 0  # clusters that a block of several can hold alone
    if layout.blocks > 1:
        last = most_held(room - held * heights, layout.threads, width)
        shared = room if last else shared
    copies = 0 if held else layout.places * layout.blocks
    tree = _tree_bytes(num_tokens, width)
    trees = empty((layout.places, tree), np.uint8)
    found = empty((layout.places, 2 * num_tokens * NEAREST_BYTES[width]), np.uint8)
    states = empty((copies, state), np.uint8) if copies else None
    options = LINKAGE_METHODS[method], int(alone), last, layout.blocks, state, tree
    scratch = trees, found, states, _zeros(layout.places)
    launch(
        "linkage",
        "linkage",
        dtype,
        (cosines, mass, *masks, *counts, *options, *scratch, out, rounds),
        blocks=layout.places * layout.blocks,
        block=layout.threads,
        shared=LINKAGE_SCRATCH * width + shared,
        cooperative=layout.blocks > 1,
    )
    return out, rounds


def _height_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of the heights that each block keeps."""
    return _aligned(num_tokens * width)


def _slot_bytes(num_slots: int, width: int) -> int:
    """Return the bytes of the clusters that each block keeps."""
    return _aligned(num_slots * SLOT_BYTES[width])


def _aligned(size: int) -> int:
    """Return bytes of shared memory, in whole vectors."""
    return -(-size // VECTOR_BYTES) * VECTOR_BYTES


def _state_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of what each block keeps."""
    return _height_bytes(num_tokens, width) + _slot_bytes(num_tokens, width)


def held_bytes(num_slots: int, width: int) -> int:
    """Return the bytes of clusters, what is found for them, and their matrix."""
    found = 2 * NEAREST_BYTES[width]  # in this round and the next
    return _slot_bytes(num_slots, width) + num_slots * (found + num_slots * width)


def most_held(room: int, threads: int, width: int) -> int:
    """Return how many clusters, at most one a thread, a block can hold alone."""
    sizes = range(min(threads, math.isqrt(max(room, 0) // width)), 1, -1)
    return next((n for n in sizes if held_bytes(n, width) <= room), 0)


def _tree_bytes(num_tokens: int, width: int) -> int:
    """Return the bytes of what becomes a sequence's dendrogram."""
    return num_tokens * TREE_BYTES[width] + num_tokens % 2 * 4


def _single_linkage_cuda(
    cosines: Any, masks: tuple[Any, ...], counts: tuple[Any, ...], out: Any, rounds: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    dtype = cosines.dtype
    ranks, components = 4 * WARP, 4 * SINGLE_ROW_INTEGERS * num_tokens  # bytes
    in_shared = ranks + components <= _dynamic_shared_bytes("single_linkage", dtype)
    layout = layout_of(batch, num_tokens, dtype.itemsize, 0)
    state = (
        empty((layout.places, SINGLE_WORDS * num_tokens), np.uint64),
        empty((layout.places, SINGLE_REALS * num_tokens), dtype),
        empty((layout.places, SINGLE_INTEGERS * num_tokens), np.int32),
        empty((layout.places, SINGLE_PROGRESS), np.int32),
        _zeros(layout.places),
    )
    options = int(in_shared), layout.blocks
    scratch = ranks + components if in_shared else ranks
    launch(
        "single_linkage",
        "single_linkage",
        dtype,
        (cosines, *masks, *counts, *options, *state, out, rounds),
        blocks=layout.places * layout.blocks,
        block=layout.threads,
        shared=scratch,
        cooperative=layout.blocks > 1,
    )


def _dynamic_shared_bytes(kernel: str, kind: Any) -> int:
    return dynamic_shared_bytes(kernel, kernel, kind)


class Layout(NamedTuple):
    """How a launch shares out the sequences."""

    places: int  # sequences at work at once
    blocks: int  # for each of them
    threads: int  # of a block


def layout_of(
    batch: int, num_tokens: int, width: int, shared: int, *, alone: bool = False
) -> Layout:
    """Return the layout that should be fastest.

    A block takes `shared` bytes of shared memory, and one `alone` has a sequence.
    """
    device, threads = current_device(), LINKAGE_THREADS[width]
    rows = threads // WARP  # a warp works at a row
    most = min(-(-num_tokens // rows), device.multiprocessors)
    if alone or batch >= device.multiprocessors or most == 1:
        # Nobody waits for other blocks; smaller ones, where three fit, fill the waits.
        several = batch > device.multiprocessors and 3 * shared <= device.shared_bytes
        return Layout(batch, 1, min(threads, _FEWER) if several else threads)

    def cost(blocks: int) -> float:
        turns = -(-batch // (device.multiprocessors // blocks))
        return turns * (1 / blocks + (_MEETINGS / num_tokens) ** 2)

    blocks = min(range(1, most + 1), key=cost)
    places = min(batch, device.multiprocessors // blocks)
    return Layout(places, blocks, threads)


def _zeros(count: int) -> Any:
    """Return counters of the blocks that have arrived at a barrier."""
    arrived = empty((count,), np.uint32)
    arrived.fill(0)  # without a copy to wait for
    return arrived


def _linkage_basic_cuda(
    cosines: Any, method: str, mass: Any, masks: tuple[Any, ...], out: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    reals = [empty((batch, num_tokens), cosines.dtype) for _ in range(2)]
    integers = [empty((batch, num_tokens), np.int32) for _ in range(3)]
    sizes = batch, num_tokens, LINKAGE_METHODS[method]
    args = (cosines, mass, *masks, *sizes, *reals, *integers, out)
    launch("linkage", "linkage", cosines.dtype, args, threads=batch * BLOCK)
