"""Dendrograms on a GPU: the launchers of ``kernels/*/linkage.cu``."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from .saliency import _token_norms_cuda

METHODS = ("average", "complete", "ward", "single")  # by their numbers in the kernels
# Threads of a block, by the bytes of a distance: as many as have the registers they
# need. A multiprocessor has one block at a time, so that all of a launch can run.
THREADS = {4: 768, 8: 512}
_SMALL = 256 << 20  # bytes that nobody asks the free memory for
_SCRATCH = 64  # values in shared memory, in front of the matrix


def cosine_similarity_cuda(tokens: Any) -> Any:
    """Return the cosines (B, N, N), or of one sequence (N, N), of tokens (B, N, D)."""
    *leading, num_tokens, dim = tokens.shape
    batch, kind = math.prod(leading), _cuda.accumulation(tokens.dtype)
    out = _cuda.empty((*leading, num_tokens, num_tokens), kind)
    tokens, norms = _cuda.contiguous(tokens), _token_norms_cuda(tokens)
    args = (tokens, norms, batch, num_tokens, dim, out)
    num_tiles = -(-num_tokens // _cuda.TILE)
    blocks = batch * num_tiles * (num_tiles + 1) // 2
    chosen = _cuda.implementation()
    threads = out.size if chosen == "basic" else blocks * _cuda.BLOCK
    _cuda.launch(
        f"{chosen}/clustering", "cosine_similarity", tokens.dtype, threads, args
    )
    return out


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
    out = _cuda.empty((batch, num_tokens - 1, 4), np.float64)
    part = _sequences_at_once(batch, num_tokens, _cuda.accumulation(tokens.dtype))
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
    free = _cuda.free_memory()
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
        out = _cuda.empty((batch, num_tokens - 1, 4), np.float64)
    rounds = _cuda.empty((batch,), np.int32)
    if num_tokens == 1:
        return out, rounds
    given, most = (None, 1) if num_groups is None else _cuda.counts(num_groups)
    mass = _cuda.contiguous(mass, cosines.dtype)
    masks = _cuda.contiguous(mask), _cuda.contiguous(protect)
    if _cuda.implementation() == "basic":
        _linkage_basic_cuda(cosines, method, mass, masks, out)
        return out, rounds
    counts = given, batch, num_tokens, most
    if method == "single":
        _single_linkage_cuda(cosines, masks, counts, out, rounds)
        return out, rounds
    device, width = _cuda.device(), cosines.dtype.itemsize
    matrix = width * (_SCRATCH + num_tokens**2)
    in_shared = matrix <= device.shared_bytes
    threads = THREADS[width]
    blocks = 1 if in_shared else _blocks(batch, num_tokens, threads)
    places = _places(batch, blocks)
    state = (
        _cuda.empty((places, 9 * num_tokens // 4 * 4 + 4), cosines.dtype),
        _cuda.empty((places, 5 * num_tokens), np.int32),
        _cuda.empty((places, 6), np.int32),
        _zeros(places),
    )
    options = METHODS.index(method), int(in_shared), blocks
    _cuda.launch(
        "optimized/linkage",
        "linkage",
        cosines.dtype,
        places * blocks * threads,
        (cosines, mass, *masks, *counts, *options, *state, out, rounds),
        block=threads,
        shared=matrix if in_shared else width * _SCRATCH,
        cooperative=blocks > 1,
    )
    return out, rounds


def _single_linkage_cuda(
    cosines: Any, masks: tuple[Any, ...], counts: tuple[Any, ...], out: Any, rounds: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    threads = THREADS[cosines.dtype.itemsize]
    blocks = _blocks(batch, num_tokens, threads)
    places = _places(batch, blocks)
    state = (
        _cuda.empty((places, 2 * num_tokens), np.uint64),
        _cuda.empty((places, 2 * num_tokens), cosines.dtype),
        _cuda.empty((places, 8 * num_tokens), np.int32),
        _cuda.empty((places, 4), np.int32),
        _zeros(places),
    )
    _cuda.launch(
        "optimized/single_linkage",
        "single_linkage",
        cosines.dtype,
        places * blocks * threads,
        (cosines, *masks, *counts, blocks, *state, out, rounds),
        block=threads,
        shared=4 * _cuda.WARP,
        cooperative=blocks > 1,
    )


def _linkage_basic_cuda(
    cosines: Any, method: str, mass: Any, masks: tuple[Any, ...], out: Any
) -> None:
    batch, num_tokens, _ = cosines.shape
    reals = [_cuda.empty((batch, num_tokens), cosines.dtype) for _ in range(2)]
    integers = [_cuda.empty((batch, num_tokens), np.int32) for _ in range(3)]
    sizes = batch, num_tokens, METHODS.index(method)
    args = (cosines, mass, *masks, *sizes, *reals, *integers, out)
    threads = batch * _cuda.BLOCK
    _cuda.launch("basic/linkage", "linkage", cosines.dtype, threads, args)


def _blocks(batch: int, num_tokens: int, threads: int) -> int:
    """Return how many blocks share a sequence, each with a row for every warp."""
    rows = threads // _cuda.WARP
    share = _cuda.device().multiprocessors // max(batch, 1)
    return max(min(share, -(-num_tokens // rows)), 1)


def _places(batch: int, blocks: int) -> int:
    """Return how many sequences are at work at once."""
    if blocks == 1:  # which waits for nobody
        return batch
    return min(batch, _cuda.device().multiprocessors // blocks)


def _zeros(places: int) -> Any:
    """Return counts of the blocks that have arrived; `fill` waits for no copy."""
    arrived = _cuda.empty((places,), np.uint32)
    arrived.fill(0)
    return arrived
