"""Groups of tokens: their sizes, positions and members."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    GroupCounts,
    check_group_counts,
    check_is_array,
    check_labels,
)
from ...arrays.conversion import IntArray, enter
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import groups_of_tokens
from ...cuda.constants import SORT_THREADS, WARP
from ...cuda.device import empty
from ...cuda.launch import contiguous, dynamic_shared_bytes, launch

# Runs of tokens that are sorted at once if their counts are in global memory.
_GLOBAL_RUNS = 8


@operation(
    constants=("labels",), counts="num_groups", dtype="int32", shapes=groups_of_tokens
)
def group_sizes(labels: IntArray, num_groups: Any) -> IntArray:
    """Return the number of tokens of each group.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K for all sequences, or for each one. The result is padded with 0 to the largest
        K.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        Sizes, int32. Attention over merged tokens adds log(size) to its scores.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> group_sizes(np.array([0, 1, 0, -1]), 2)
    array([2, 1], dtype=int32)
    """
    leave, labels, num_groups = enter(
        {"labels": labels}, counts={"num_groups": num_groups}
    )
    return leave(compute_group_sizes(labels, _check_groups(labels, num_groups)))


def compute_group_sizes(labels: Any, num_groups: GroupCounts) -> Any:
    """Return the sizes for labels that are already converted and checked."""
    if is_cuda(labels):
        return _groups_cuda("group_sizes", labels, num_groups.max_groups)
    return _group_sizes_reference(labels, num_groups.max_groups)


def _group_sizes_reference(labels: NDArray[Any], num_groups: int) -> NDArray[np.int32]:
    _, group, num_rows = flat_groups(labels, num_groups)
    # `minlength` gives groups without members a size of 0.
    sizes = np.bincount(group, minlength=num_rows).astype(np.int32)
    return sizes.reshape(*labels.shape[:-1], num_groups)


@operation(
    constants=("labels",), counts="num_groups", dtype="int32", shapes=groups_of_tokens
)
def group_positions(labels: IntArray, num_groups: Any) -> IntArray:
    """Return the position of each group: the position of its last member.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K for all sequences, or for each one. The result is padded with -1 to the
        largest K.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        Positions, int32; -1 for a group without members.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> group_positions(np.array([0, 1, 0, -1]), 2)
    array([2, 1], dtype=int32)
    """
    leave, labels, num_groups = enter(
        {"labels": labels}, counts={"num_groups": num_groups}
    )
    return leave(compute_group_positions(labels, _check_groups(labels, num_groups)))


def compute_group_positions(labels: Any, num_groups: GroupCounts) -> Any:
    """Return the positions for labels that are already converted and checked."""
    if is_cuda(labels):
        return _groups_cuda("group_positions", labels, num_groups.max_groups)
    return _group_positions_reference(labels, num_groups.max_groups)


def _group_positions_reference(
    labels: NDArray[Any], num_groups: int
) -> NDArray[np.int32]:
    flat, group, num_rows = flat_groups(labels, num_groups)
    last = np.full(num_rows, -1, np.int32)
    # `flat` modulo N is the position in the sequence. `maximum.at` handles repeated
    # groups; `last[group] = …` would keep an arbitrary member.
    np.maximum.at(last, group, (flat % labels.shape[-1]).astype(np.int32))
    return last.reshape(*labels.shape[:-1], num_groups)


def _groups_cuda(kernel: str, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens = labels.shape
    batch = math.prod(leading)
    out = empty((*leading, num_groups), np.int32)
    args = (contiguous(labels, np.int32), batch, num_tokens, num_groups, out)
    # A block for each sequence, which uses integer atomics, so their order does not
    # matter. The basic kernel has one thread for each group. Neither reads floats.
    launch("groups", kernel, np.float32, args, outputs=out.size, blocks=batch)
    return out


def _check_groups(labels: NDArray[Any], num_groups: Any) -> GroupCounts:
    """Return K of every sequence and the largest; raise if labels do not fit them."""
    check_is_array("labels", labels)
    groups = check_group_counts(num_groups, labels.shape[:-1])
    check_labels(labels, None, groups.counts)
    return groups


def flat_groups(
    labels: NDArray[Any], num_groups: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return the index in (B·N) and the group in (B·K) of each token, and B·K.

    Padding, with label -1, is left out.
    """
    rows = labels.reshape(-1, labels.shape[-1])  # (B, N)
    # Ascending: sums over `flat` add the members of a group in index order.
    flat = np.flatnonzero(rows >= 0)
    group = rows.ravel()[flat].astype(np.intp)
    # Groups of sequence b are b·K to b·K + K - 1.
    group += flat // rows.shape[-1] * num_groups
    return flat, group, len(rows) * num_groups


def members_cuda(labels: Any, num_groups: int) -> tuple[Any, Any]:
    """Return where the members of each group end, and the members themselves.

    `members` (B, N) lists the tokens of group 0 in index order, then of group 1, and so
    on. `ends` (B, K) holds where the members of each group end in this list. Merging
    then reads each token once, and adds members in index order.
    """
    num_tokens = labels.shape[-1]
    batch = math.prod(labels.shape[:-1])
    ends = empty((batch, num_groups), np.int32)
    members = empty((batch, num_tokens), np.int32)
    kernel = "groups", "sort_members", np.float32
    room = dynamic_shared_bytes(*kernel)  # bytes that a launch may ask for
    # Counts are in shared memory, unless K is too large for it.
    runs, shared = sort_layout(num_tokens, num_groups, room)
    counts = None
    if not shared:
        # For each run a count of every group, and the first index of every group.
        counts = empty((batch, runs + 1, num_groups), np.int32)
    # At least a warp for each run and, up to the limit, a thread for each group.
    warps = max(runs, -(-num_groups // WARP))
    block = min(WARP * warps, SORT_THREADS)
    args = (labels, batch, num_tokens, num_groups, runs, counts, ends, members)
    launch(*kernel, args, blocks=batch, block=block, shared=shared)
    return ends, members


def sort_layout(num_tokens: int, num_groups: int, room: int) -> tuple[int, int]:
    """Return the number of runs that are sorted at once, and bytes of shared memory.

    A counting sort splits the tokens into runs. Each run has a warp and a count of
    every group. With W runs, clearing, reading and writing the counts takes 3 K W / 32
    cycles (shared memory moves 128 bytes a cycle). Each warp sorts its tokens in
    N / (32 W) steps of about 210 cycles. The sum has its minimum at W² = 70 N / K. If
    not even one run fits in `room` bytes, the counts are in global memory and the bytes
    are 0.
    """
    steps = -(-num_tokens // WARP)  # of 32 tokens
    # d/dW (3 K W / 32 + 210 N / (32 W)) = 0 gives W² = 70 N / K.
    runs = math.isqrt(70 * num_tokens // num_groups)
    # No run is empty, and a block has no more than SORT_THREADS threads.
    runs = max(1, min(runs, steps, SORT_THREADS // WARP))
    run_bytes = 4 * num_groups  # an int32 for each group
    # One part of the room is for the first index of each group, beside the counts.
    fitting = room // run_bytes - 1
    if fitting < 1:
        return min(_GLOBAL_RUNS, steps), 0
    runs = min(runs, fitting)
    return runs, (runs + 1) * run_bytes
