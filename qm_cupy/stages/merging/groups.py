"""Groups: their sizes, positions and members."""

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

_GLOBAL_RUNS = 8  # of tokens sorted at once, if their counts are in global memory


@operation(
    constants=("labels",), counts="num_groups", dtype="int32", shapes=groups_of_tokens
)
def group_sizes(labels: IntArray, num_groups: Any) -> IntArray:
    """Number of tokens of each group.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest with 0.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        int32. Attention over merged tokens adds log(size) to its scores.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label lies outside -1..K-1.

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
    """Return the sizes, of labels that are converted and checked."""
    if is_cuda(labels):
        return _groups_cuda("group_sizes", labels, num_groups.max_groups)
    return _group_sizes_reference(labels, num_groups.max_groups)


def _group_sizes_reference(labels: NDArray[Any], num_groups: int) -> NDArray[np.int32]:
    _, group, num_rows = flat_groups(labels, num_groups)
    sizes = np.bincount(group, minlength=num_rows).astype(np.int32)
    return sizes.reshape(*labels.shape[:-1], num_groups)


@operation(
    constants=("labels",), counts="num_groups", dtype="int32", shapes=groups_of_tokens
)
def group_positions(labels: IntArray, num_groups: Any) -> IntArray:
    """Position of each group: that of its last member.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest with -1.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        int32; -1 for a group without members.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label lies outside -1..K-1.

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
    if is_cuda(labels):
        return _groups_cuda("group_positions", labels, num_groups.max_groups)
    return _group_positions_reference(labels, num_groups.max_groups)


def _group_positions_reference(
    labels: NDArray[Any], num_groups: int
) -> NDArray[np.int32]:
    flat, group, num_rows = flat_groups(labels, num_groups)
    last = np.full(num_rows, -1, np.int32)
    np.maximum.at(last, group, (flat % labels.shape[-1]).astype(np.int32))
    return last.reshape(*labels.shape[:-1], num_groups)


def _groups_cuda(kernel: str, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens = labels.shape
    batch = math.prod(leading)
    out = empty((*leading, num_groups), np.int32)
    args = (contiguous(labels, np.int32), batch, num_tokens, num_groups, out)
    launch("groups", kernel, np.float32, args, outputs=out.size, blocks=batch)
    return out


def _check_groups(labels: NDArray[Any], num_groups: Any) -> GroupCounts:
    check_is_array("labels", labels)
    groups = check_group_counts(num_groups, labels.shape[:-1])
    check_labels(labels, None, groups.counts)
    return groups


def flat_groups(
    labels: NDArray[Any], num_groups: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return each token's place in the flat (B·N), its group in (B·K), and B·K."""
    rows = labels.reshape(-1, labels.shape[-1])  # (B, N)
    flat = np.flatnonzero(rows >= 0)
    group = rows.ravel()[flat].astype(np.intp)
    group += flat // rows.shape[-1] * num_groups
    return flat, group, len(rows) * num_groups


def members_cuda(labels: Any, num_groups: int) -> tuple[Any, Any]:
    """Return where groups end, (B·K), and the tokens (B·N) of one after the other."""
    num_tokens = labels.shape[-1]
    batch = math.prod(labels.shape[:-1])
    ends = empty((batch, num_groups), np.int32)
    members = empty((batch, num_tokens), np.int32)
    kernel = "groups", "sort_members", np.float32
    room = dynamic_shared_bytes(*kernel)
    runs, shared = sort_layout(num_tokens, num_groups, room)
    counts = None
    if not shared:
        counts = empty((batch, runs + 1, num_groups), np.int32)
    # A warp for each run, and a thread for each group.
    warps = max(runs, -(-num_groups // WARP))
    block = min(WARP * warps, SORT_THREADS)
    args = (labels, batch, num_tokens, num_groups, runs, counts, ends, members)
    launch(*kernel, args, blocks=batch, block=block, shared=shared)
    return ends, members


def sort_layout(num_tokens: int, num_groups: int, room: int) -> tuple[int, int]:
    """Return how many runs of tokens are sorted at once, and bytes of shared memory.

    Each run has a warp and a count of every group. With W runs, the counts are cleared,
    read and written in 3 K W / 32 cycles (shared memory moves 128 bytes a cycle), and
    each warp places its tokens in N / (32 W) steps of about 210 cycles. The sum is
    least at W² = 70 N / K. The bytes are 0 if not even one run fits in the `room`: the
    counts are then in global memory.
    """
    steps = -(-num_tokens // WARP)
    runs = math.isqrt(70 * num_tokens // num_groups)
    runs = max(1, min(runs, steps, SORT_THREADS // WARP))
    each = 4 * num_groups
    fitting = room // each - 1  # beside the counts: where each group begins
    if fitting < 1:
        return min(_GLOBAL_RUNS, steps), 0
    runs = min(runs, fitting)
    return runs, (runs + 1) * each
