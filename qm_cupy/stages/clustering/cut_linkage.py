"""Cuts of dendrograms into groups.

In a dendrogram (N - 1, 4), nodes 0..N-1 are tokens, and row r merges two nodes into
node N + r, at a height h. Heights never fall from row to row. A cut makes the first
merges and skips the others. In a ward dendrogram, a merge at height h adds h² / 2 to
the squared error of unit tokens, or of the tokens if the dendrogram is Euclidean.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_choice, check_is_array, check_number
from ...arrays.conversion import BoolArray, FloatArray, IntArray, convert_inputs
from ...arrays.counts import check_num_groups
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...cuda.constants import ERROR_ROUNDING, GROUP_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, counts_on_device, launch
from ...settings import implementation
from .checks import NO_LIMITS, Limits, check_dendrogram
from .labels import (
    ORDERS,
    Groups,
    Order,
    in_order,
    number_groups_cuda,
)
from .linkage import relative_mass
from .weighted_linkage import Floats


@operation(
    constants=("dendrogram", "mask?"),
    count_parameter="num_groups?",
    options=("float? max_distance", "str order"),
    dtype="int32",
    shapes=lambda tree, *_: ((*tree.shape[:-2], tree.shape[-2] + 1),),
)
def cut_linkage(
    dendrogram: FloatArray,
    *,
    num_groups: Any = None,
    max_distance: float | None = None,
    mask: BoolArray | None = None,
    order: Order = "last",
) -> IntArray:
    r"""Cut dendrograms into exactly K groups, or at a distance.

    Parameters
    ----------
    dendrogram : ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        The result of `linkage`, or of SciPy's function.
    num_groups : int or ndarray of int of shape (B,), optional
        K, or K of each sequence.
    max_distance : float, optional
        Instead of K: make all merges whose height is at most this distance, at least 0.
        With infinity, all tokens form one group. K may then differ between sequences;
        it is ``labels.max(-1) + 1``. For a limit of the error, see `cluster_tokens`.
    mask : ndarray of shape (N,) or (B, N), optional
        The mask that the dendrogram was made with.
    order : {"last", "first"}, default "last"
        Number groups by the position of their last or first member. With "last",
        a group has the position of its last member, so it contains no later token.
        Causal models need this.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        int32 labels within 0..K-1; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If `dendrogram` is not a dendrogram or was made with another mask, a height is
        negative or falls from row to row, K is less than 1 or exceeds the number of
        valid tokens, `max_distance` is negative or NaN, `order` is unknown, or not
        exactly one of `num_groups` and `max_distance` is given.

    See Also
    --------
    scipy.cluster.hierarchy.fcluster : The same cuts, with another numbering of groups.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import linkage
    >>> tree = linkage(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), "ward")
    >>> cut_linkage(tree, num_groups=2)
    array([1, 0, 1], dtype=int32)
    >>> cut_linkage(tree, max_distance=0.5)
    array([1, 0, 1], dtype=int32)
    """
    convert_back, dendrogram, mask, num_groups = convert_inputs(
        {"dendrogram": dendrogram, "mask": mask}, counts={"num_groups": num_groups}
    )
    check_is_array("dendrogram", dendrogram)
    check_choice("order", order, ORDERS)
    if (num_groups is None) == (max_distance is None):
        raise ValueError(
            "give exactly one of `num_groups` and `max_distance`, got "
            f"{'neither' if num_groups is None else 'both'}"
        )
    mask = check_dendrogram(dendrogram, mask)
    batch, num_tokens = dendrogram.shape[:-2], dendrogram.shape[-2] + 1
    counts = None
    # K of a sequence is at most its number of valid tokens. A distance has no upper
    # limit.
    if max_distance is None:
        limit = num_tokens if mask is None else mask.sum(axis=-1)
        counts = check_num_groups(num_groups, batch, limit)
    else:
        max_distance = check_number("max_distance", max_distance, 0, np.inf, "[]")
    limits = Limits(None, max_distance)
    if is_cuda(dendrogram):
        group_counts, max_groups = (
            (None, 1) if counts is None else counts_on_device(counts)
        )
        return convert_back(
            cut_linkage_cuda(
                dendrogram, group_counts, max_groups, limits, mask=mask, order=order
            )
        )
    return convert_back(_cut_linkage_reference(dendrogram, counts, limits, mask, order))


def _cut_linkage_reference(
    dendrogram: Floats,
    counts: NDArray[np.int64] | None,
    limits: Limits,
    mask: NDArray[np.bool_] | None,
    order: str,
) -> NDArray[np.int32]:
    """Return labels (B, N) of dendrograms cut into K groups, or at a distance."""
    num_tokens = dendrogram.shape[-2] + 1
    labels = np.full((*dendrogram.shape[:-2], num_tokens), -1, np.int32)
    # The dendrogram of a masked sequence numbers tokens by their positions in the
    # padded sequence. So the cut covers padded tokens too. No merge contains them.
    for index in np.ndindex(labels.shape[:-1]):
        valid = np.ones(num_tokens, np.bool_) if mask is None else mask[index]
        num_valid = int(np.count_nonzero(valid))
        # Every merge reduces the number of groups by one. n valid tokens form K groups
        # after n - K merges.
        if counts is None:
            height = dendrogram[index][: num_valid - 1, 2]  # without padded rows
            merges = merges_within(height, limits)
        else:
            merges = num_valid - int(counts[index])
        groups = cut_sequence(dendrogram[index], merges)
        labels[index][valid] = in_order(groups[valid], order)
    return labels


def merges_within(
    height: Floats, limits: Limits, mass: NDArray[Any] | None = None
) -> int:
    """Return the largest number of merges that stay within the limits.

    The heights (N - 1,) are those of all merges of N tokens with the masses (N,); they
    are ascending. Without masses each token counts as 1.
    """
    max_error, max_distance = limits
    if max_distance is not None:
        return int(np.count_nonzero(height <= max_distance))
    largest = height.max(initial=0)
    if max_error is None or largest == 0:  # all tokens are equal
        return len(height)
    relative, peak = relative_mass(np.ones(len(height) + 1) if mass is None else mass)
    # The error of the first r merges, divided by the largest height squared, so that no
    # square overflows.
    error = np.cumsum((height / largest) ** 2 / 2)
    # `linkage` multiplied the heights by √peak, where `peak` is the largest mass.
    limit = max_error * relative.sum() / largest * peak / largest
    limit += ERROR_ROUNDING * error[-1]
    return int(np.count_nonzero(error <= limit))


def cut_sequence(dendrogram: Floats, merges: int) -> Groups:
    """Return the root (N,) of each token: its topmost node after `merges` merges."""
    num_tokens = len(dendrogram) + 1
    parent = np.arange(num_tokens + merges)
    # The parent of both children of row r is node N + r.
    children = dendrogram[:merges, :2].astype(np.intp)
    parent[children] = num_tokens + np.arange(merges)[:, None]
    # Pointer doubling: each step doubles the number of levels from a node to `parent`.
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return parent[:num_tokens]
        parent = above


def cut_linkage_cuda(
    dendrogram: Any,
    counts: Any,
    num_groups: int,
    limits: Limits = NO_LIMITS,
    mass: Any = None,
    mask: Any = None,
    protect: Any = None,
    order: str = "last",
) -> Any:
    """Return labels (B, N) of dendrograms (B, N - 1, 4) cut at K or within the limits.

    K is `counts` (B,), or `num_groups` without counts. An error is relative to the sum
    of the masses of all tokens, protected tokens too.
    """
    *leading, rows, _ = dendrogram.shape
    batch, num_tokens = math.prod(leading), rows + 1
    dendrogram = contiguous(dendrogram, np.float64)
    # The kernels read heights in float64. Those that read masses are compiled for the
    # dtype of sums of masses.
    acc_dtype = np.dtype(np.float32) if mass is None else accumulation_dtype(mass.dtype)
    masks = contiguous(mask), contiguous(protect)
    # For the kernels, a negative bound means that there is no bound.
    max_error, max_distance = (-1.0 if x is None else float(x) for x in limits)
    bounds = max_error, max_distance
    out = empty((*leading, num_tokens), np.int32)
    sizes = counts, batch, num_tokens, num_groups
    args: tuple[Any, ...]
    args = (dendrogram, contiguous(mass, acc_dtype), *masks, *sizes, *bounds)
    # The basic kernels have three steps: count merges, find roots (the topmost node of
    # each token), and number the groups. The last step has two launches.
    if implementation() == "basic":
        merges = empty((batch,), np.int32)
        args = (*args, merges)
        launch("cut_linkage", "count_merges", acc_dtype, args, outputs=batch)
        args = (dendrogram, masks[0], merges, batch, num_tokens, out)
        kernel = "cut_linkage", "dendrogram_roots"
        launch(*kernel, np.float32, args, outputs=out.size)
        return number_groups_cuda(out, order)
    # Scratch of the kernel: for each sequence, two arrays of the parents of 2N nodes.
    nodes = empty((batch, 4 * num_tokens), np.int32)
    args = (*args, int(order == "first"), nodes, out)
    block = block_size(num_tokens, GROUP_THREADS)
    launch("cut_linkage", "cut_linkage", acc_dtype, args, blocks=batch, block=block)
    return out
