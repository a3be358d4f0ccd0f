"""Groups of tokens: their sizes, positions and members.

A label is the group of a token: 0..K-1, or -1 for padding. N is the number of tokens in
a sequence, K is the number of groups, and B is the number of sequences.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_is_array, check_labels
from ...arrays.conversion import IntArray, convert_inputs
from ...arrays.counts import GroupCounts, check_group_counts
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import groups_of_tokens
from ...cuda.constants import SORT_THREADS, WARP
from ...cuda.device import empty
from ...cuda.launch import contiguous, dynamic_shared_bytes, launch

# `members_cuda` sorts the tokens of a sequence by group, with a counting sort.
# Different warps sort different parts of the sequence, the runs, at the same time.
# `_GLOBAL_RUNS` is the number of runs if the counts of the sort are in global memory.
# If the counts are in shared memory, `sort_layout` computes the number of runs.
_GLOBAL_RUNS = 8


@operation(
    constants=("labels",),
    count_parameter="num_groups",
    dtype="int32",
    shapes=groups_of_tokens,
)
def group_sizes(labels: IntArray, num_groups: Any) -> IntArray:
    """Return the number of tokens of each group.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        Number of groups K, for all sequences or for each one. The result is padded
        with 0 to the largest K.

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
    convert_back, labels, num_groups = convert_inputs(
        {"labels": labels}, counts={"num_groups": num_groups}
    )
    return convert_back(compute_group_sizes(labels, _check_groups(labels, num_groups)))


def compute_group_sizes(labels: Any, num_groups: GroupCounts) -> Any:
    """Return the sizes for labels that are already converted and checked."""
    if is_cuda(labels):
        return _groups_cuda("group_sizes", labels, num_groups.max_groups)
    return _group_sizes_reference(labels, num_groups.max_groups)


def _group_sizes_reference(labels: NDArray[Any], num_groups: int) -> NDArray[np.int32]:
    _, group, num_all_groups = flat_groups(labels, num_groups)
    # Without `minlength`, the result would end at the last group that has a member.
    sizes = np.bincount(group, minlength=num_all_groups).astype(np.int32)
    return sizes.reshape(*labels.shape[:-1], num_groups)


@operation(
    constants=("labels",),
    count_parameter="num_groups",
    dtype="int32",
    shapes=groups_of_tokens,
)
def group_positions(labels: IntArray, num_groups: Any) -> IntArray:
    """Return the position of each group, which is the position of its last member.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        Number of groups K, for all sequences or for each one. The result is padded
        with -1 to the largest K.

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
    convert_back, labels, num_groups = convert_inputs(
        {"labels": labels}, counts={"num_groups": num_groups}
    )
    return convert_back(
        compute_group_positions(labels, _check_groups(labels, num_groups))
    )


def compute_group_positions(labels: Any, num_groups: GroupCounts) -> Any:
    """Return the positions for labels that are already converted and checked."""
    if is_cuda(labels):
        return _groups_cuda("group_positions", labels, num_groups.max_groups)
    return _group_positions_reference(labels, num_groups.max_groups)


def _group_positions_reference(
    labels: NDArray[Any], num_groups: int
) -> NDArray[np.int32]:
    flat, group, num_all_groups = flat_groups(labels, num_groups)
    last = np.full(num_all_groups, -1, np.int32)  # (B·K,)
    # `flat` modulo N is the position of a token in its sequence. A group occurs once
    # for each member: `maximum.at` uses all of them, but `last[group] = …` would keep
    # an arbitrary one.
    np.maximum.at(last, group, (flat % labels.shape[-1]).astype(np.int32))
    return last.reshape(*labels.shape[:-1], num_groups)


def _groups_cuda(kernel: str, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens = labels.shape
    batch = math.prod(leading)
    out = empty((*leading, num_groups), np.int32)
    args = (contiguous(labels, np.int32), batch, num_tokens, num_groups, out)
    # A block for each sequence. The kernel uses atomics only on integers, so the order
    # of the atomics does not change the result. The basic kernel has a thread for each
    # group. The kernels read no floats; they are compiled for float32.
    launch("groups", kernel, np.float32, args, outputs=out.size, blocks=batch)
    return out


def _check_groups(labels: NDArray[Any], num_groups: Any) -> GroupCounts:
    """Return K of every sequence and the largest K; raise if a label is not below K."""
    check_is_array("labels", labels)
    groups = check_group_counts(num_groups, labels.shape[:-1])
    check_labels(labels, None, groups.counts)
    return groups


def flat_groups(
    labels: NDArray[Any], num_groups: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return the index in (B·N,) and the group in (B·K,) of each token, and B·K.

    Padding, with label -1, is left out. So both arrays have one entry for each token
    that is not padding.
    """
    rows = labels.reshape(-1, labels.shape[-1])  # (B, N)
    # The indices ascend, so sums over `flat` add the members of a group in index order.
    flat = np.flatnonzero(rows >= 0)
    group = rows.ravel()[flat].astype(np.intp)
    # Number the groups of all sequences: sequence b has the groups b·K to b·K + K - 1.
    group += flat // rows.shape[-1] * num_groups
    return flat, group, len(rows) * num_groups


def members_cuda(labels: Any, num_groups: int) -> tuple[Any, Any]:
    """Return `ends` (B, K) and `members` (B, N), int32, for `labels` in int32.

    `members` lists the tokens of group 0 in index order, then the tokens of group 1,
    and so on. `ends` has, for each group, the index in this list after its last member.
    With the list, merging reads each token once and adds members in index order. A
    counting sort makes the list: it counts the members of each group, computes from the
    counts the index where each group starts, and writes each token to its index.
    """
    num_tokens = labels.shape[-1]
    batch = math.prod(labels.shape[:-1])
    ends = empty((batch, num_groups), np.int32)
    members = empty((batch, num_tokens), np.int32)
    kernel = "groups", "sort_members", np.float32
    max_bytes = dynamic_shared_bytes(*kernel)  # shared memory that a launch may request
    runs, shared = sort_layout(num_tokens, num_groups, max_bytes)
    # The counts are in shared memory, or in global memory if K is too large for it.
    counts = None
    if not shared:
        # (B, runs + 1, K): for each run a count of every group, and one more row for
        # the first index of every group.
        counts = empty((batch, runs + 1, num_groups), np.int32)
    # A block sorts a sequence. It has at least a warp for each run and, up to
    # SORT_THREADS, a thread for each group.
    warps = max(runs, -(-num_groups // WARP))
    block = min(WARP * warps, SORT_THREADS)
    args = (labels, batch, num_tokens, num_groups, runs, counts, ends, members)
    launch(*kernel, args, blocks=batch, block=block, shared=shared)
    return ends, members


def sort_layout(num_tokens: int, num_groups: int, max_bytes: int) -> tuple[int, int]:
    """Return the number of runs, and the bytes of shared memory of a block.

    The counting sort of a sequence splits its N tokens into W runs. Each run has a
    warp, and a count (int32) for each of the K groups. The counts are cleared, read and
    written in 3 K W / 32 cycles, because shared memory moves 32 counts (128 bytes) per
    cycle. Each warp sorts its tokens in N / (32 W) steps of about 210 cycles. The
    sum 3 K W / 32 + 210 N / (32 W) has its minimum at W² = 70 N / K.

    If not even one run fits in `max_bytes`, the counts are in global memory and the
    bytes are 0.
    """
    steps = -(-num_tokens // WARP)  # a step sorts 32 tokens, one for each lane
    runs = math.isqrt(70 * num_tokens // num_groups)  # W
    # At most one run for each step, so that no run is empty. A block has at most
    # SORT_THREADS threads.
    runs = max(1, min(runs, steps, SORT_THREADS // WARP))
    run_bytes = 4 * num_groups  # counts of one run: an int32 for each group
    # Beside the counts, shared memory holds the first index of each group, which takes
    # as many bytes as one run.
    max_runs = max_bytes // run_bytes - 1
    if max_runs < 1:
        return min(_GLOBAL_RUNS, steps), 0
    runs = min(runs, max_runs)
    return runs, (runs + 1) * run_bytes
