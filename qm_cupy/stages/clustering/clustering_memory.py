"""The memory that clustering needs on a CPU: the peak of all arrays, in bytes.

There are B sequences of N tokens of width D, of which one at a time is clustered into K
groups. The numbers are those of the references: of the arrays that exist at the same
time. `tests/test_memory.py` compares them with measurements.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays.dtypes import accumulation_dtype
from ...host_memory import check_memory

# Up to so many tokens, `linkage` uses SciPy's `squareform`, which is faster than a copy
# within the matrix of distances.
IN_PLACE = 1024
# Arrays of a limited size, such as blocks of rows.
_BLOCKS = 6_000_000
# Arrays with a few numbers for each token, such as labels and the rows of a dendrogram.
_PER_TOKEN = 150
_CALL = 100_000  # Python's objects


def sequence_bytes(
    num_tokens: int,
    dim: int,
    method: str,
    *,
    weighted: bool = False,
    num_groups: int | None = None,
    step: int | None = None,
) -> int:
    """Return the bytes for one sequence; without K, for the K that needs most."""
    vectors, pairs = 8 * num_tokens * dim, num_tokens**2
    num_groups = num_tokens if num_groups is None else num_groups
    if method == "nearest":  # vectors of anchors and their similarities
        work = vectors + 8 * num_groups * (dim + num_tokens)
    elif method == "bipartite":
        # Similarities of half of the groups to the others. The means are another array
        # like the vectors. So are the sums from the second step on; they are smaller if
        # the first step merges half of the groups.
        means = 2 if step is not None and step < num_tokens // 2 else 1
        work = (1 + means) * vectors + 2 * pairs
    elif method == "contiguous":
        work = vectors
    else:
        # The matrix of distances, beside the vectors. SciPy's linkage reads the half
        # above the diagonal, and makes a copy of it.
        in_place = weighted or num_tokens > IN_PLACE
        work = 8 * pairs + max(vectors, 0 if in_place else 4 * pairs)
    return work + min(work, _BLOCKS) + _PER_TOKEN * num_tokens + _CALL


def clustering_bytes(
    shape: Sequence[int],
    dtype: Any,
    method: str,
    *,
    weighted: bool = False,
    num_groups: int | None = None,
    step: int | None = None,
    copied: bool = False,
    by_norms: bool = False,
) -> int:
    """Return the bytes for tokens (N, D) or (B, N, D).

    `copied` says that a mask or protected tokens exist, so that the other tokens of a
    sequence are copied. `by_norms` says that anchors are selected by norms.
    """
    *batch, num_tokens, dim = shape
    sequence = sequence_bytes(
        num_tokens, dim, method, weighted=weighted, num_groups=num_groups, step=step
    )
    if copied:
        sequence += num_tokens * dim * dtype.itemsize
    if by_norms:  # three arrays like all tokens, in float64
        sequence = max(
            sequence, 24 * math.prod(shape) + _PER_TOKEN * num_tokens + _CALL
        )
    return 4 * math.prod(batch) * num_tokens + sequence  # with the labels


def check_clustering_memory(
    function: str, shape: Sequence[int], needed: int, sequence: int, method: str
) -> None:
    """Raise MemoryError if there is not enough memory; say what to do instead.

    `needed` are the bytes of the call, and `sequence` those of one sequence. `method`
    is "" if the function has no method.
    """
    *batch, num_tokens, _ = shape
    count = math.prod(batch)
    call = f"`{function}` of {num_tokens:,} tokens"
    way_out = "cut the sequence into windows"
    if count > 1:
        call = f"`{function}` of {count:,} sequences of {num_tokens:,} tokens"
    if count > 1 and needed > 2 * sequence:
        way_out = "pass fewer sequences per call"
    elif function == "linkage":
        way_out = f'use `cluster_tokens` with `method="contiguous"`, or {way_out}'
    elif method not in ("contiguous", "nearest", ""):
        way_out = f'pass `method="contiguous"` or "nearest", or {way_out}'
    check_memory(needed, call, way_out)


def check_cluster_tokens_memory(
    shape: Sequence[int],
    dtype: np.dtype[Any],
    method: str,
    *,
    weighted: bool,
    num_groups: int | None,
    step: int | None,
    copied: bool,
    by_norms: bool,
) -> None:
    """Raise MemoryError if `cluster_tokens` needs more memory than there is."""
    needed, sequence = (
        clustering_bytes(
            part, dtype, method, weighted=weighted, num_groups=num_groups, step=step,
            copied=copied, by_norms=by_norms,
        )
        for part in (shape, shape[-2:])
    )  # fmt: skip
    check_clustering_memory("cluster_tokens", shape, needed, sequence, method)


def check_linkage_memory(shape: Sequence[int], method: str, weighted: bool) -> None:
    """Raise MemoryError if `linkage` needs more memory than there is."""
    *batch, num_tokens, dim = shape
    sequence = sequence_bytes(num_tokens, dim, method, weighted=weighted)
    needed = 32 * math.prod(batch) * num_tokens + sequence  # with the dendrograms
    check_clustering_memory("linkage", shape, needed, sequence, method)


def similarity_bytes(shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the bytes of `cosine_similarity` for one sequence, and for all."""
    *batch, num_tokens, dim = shape
    size = accumulation_dtype(dtype).itemsize
    matrix = size * num_tokens**2
    work = matrix + size * num_tokens * dim
    sequence = work + min(work, _BLOCKS) + _CALL
    return sequence, (math.prod(batch) - 1) * matrix + sequence


def check_similarity_memory(shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    """Raise MemoryError if `cosine_similarity` needs more memory than there is."""
    sequence, needed = similarity_bytes(shape, dtype)
    check_clustering_memory("cosine_similarity", shape, needed, sequence, "")
