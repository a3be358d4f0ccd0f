"""Groups of the entries of caches: ward linkage in windows, cut at a common height.

S sequences, one for each head, have N entries each. Some entries are free to merge, and
the other ones stay groups of their own. A window holds n free entries of one sequence,
and a sequence has P windows (windows.py). Every window has a dendrogram. The cut makes
the lowest merges of all windows of a pool: a sequence, the heads of a layer, or all
layers. So parts of a cache that repeat themselves keep fewer entries than others.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.counts import GroupCounts
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device, to_host
from ..stages.clustering.cut_linkage import cut_linkage_cuda
from ..stages.clustering.labels import in_order, number_groups_cuda
from ..stages.clustering.linkage_cuda import dendrograms_cuda
from ..stages.merging.groups import compute_group_sizes
from ..stages.merging.merge_tokens import compute_merge_tokens
from .window_linkage import Merges, window_linkage
from .windows import windows_of_similar

Counts = NDArray[np.int64]

_STEP = 8  # of a long cache with a small budget, so many entries first become one
_LEAST_GROUPS = 4  # mean number of groups of a window, at least


class Cut(NamedTuple):
    """Where the dendrograms are cut; one of the first two is None."""

    counts: Counts | None
    """(S,): the number K of groups of each sequence, of the entries that are not free
    too. In a pool of several sequences, only the sum of their counts matters."""
    max_error: float | None
    """The largest squared error of a pool, relative to its squared vectors."""
    pool_size: int
    """Number of sequences of a pool, which follow one another."""
    num_equal: int = 1
    """Number of sequences, such as the heads of a layer, that merge equally often."""


def group_entries(
    vectors: Any, mass: Any, free: Any, valid: Any, cut: Cut, window: int
) -> tuple[NDArray[np.int32], Counts]:
    """Return labels (S, N), -1 for padding, and the number of groups (S,).

    `vectors` are (S, N, d), and `mass` (S, N) is > 0. `free` and `valid` (S, N) are
    booleans: which entries may merge, and which are not padding. Groups are numbered by
    their last members. For arrays on a GPU, the CPU waits for the numbers of free
    entries and for the heights of the merges.
    """
    num_free = to_host(free.sum(axis=-1)).astype(np.int64)  # (S,)
    num_kept = to_host(valid.sum(axis=-1)).astype(np.int64) - num_free
    if not num_free.any():
        return _numbered(np.where(valid, _entry_numbers(free), -1)), num_kept
    if _in_two_steps(num_free, num_kept, cut, window):
        # Every window keeps an entry, so there are too many windows for this budget.
        factor = min(_STEP, window // (2 * _least_groups(window)))
        step = cut._replace(counts=num_kept + -(-num_free // factor))
        first, counts = group_entries(vectors, mass, free, valid, step, window)
        merged = _merged_entries(vectors, mass, free, first, counts)
        second, counts = group_entries(*merged, cut, window)
        inside = np.where(first < 0, 0, first)
        labels = np.where(first < 0, -1, np.take_along_axis(second, inside, -1))
        return labels.astype(np.int32), counts
    index = windows_of_similar(vectors, free, num_free, window)  # (S, P, n)
    shape = index.shape
    members = index.reshape(len(index), -1)  # (S, P · n)
    real = members < vectors.shape[1]
    inside = np.where(real, members, 0)
    x = np.take_along_axis(vectors, inside[..., None], 1).reshape(
        -1, shape[-1], vectors.shape[-1]
    )  # (S · P, n, d)
    weight = np.where(real, np.take_along_axis(mass, inside, -1), mass.dtype.type(1))
    weight, real = weight.reshape(-1, shape[-1]), real.reshape(-1, shape[-1])
    squares = to_host(_squares(x, weight, real)) if cut.counts is None else None
    pools = Pools(cut, shape, num_free + num_kept, squares)
    link = _cut_cuda if is_cuda(vectors) else _cut_reference
    roots, merges = link(x, weight, real, pools)
    labels = _numbered(_spread(roots, index, free, valid))
    return labels, num_free + num_kept - merges


def _in_two_steps(num_free: Counts, num_kept: Counts, cut: Cut, window: int) -> bool:
    """Return whether the budget leaves few groups for each window."""
    if cut.counts is None or num_free.max() <= window:
        return False
    wanted = (cut.counts - num_kept).reshape(-1, cut.pool_size).sum(axis=-1)
    in_pool = num_free.reshape(-1, cut.pool_size).sum(axis=-1)
    # A window has more than window / 2 entries.
    return bool((wanted * window < 2 * _least_groups(window) * in_pool).any())


def _least_groups(window: int) -> int:
    """Return the mean number of groups that a window must keep, at least."""
    return max(1, min(_LEAST_GROUPS, window // 4))


def _merged_entries(
    vectors: Any, mass: Any, free: Any, labels: Any, counts: Counts
) -> tuple[Any, Any, Any, Any]:
    """Return vectors, mass, `free` and `valid` of merged entries (S, K)."""
    groups = GroupCounts(counts, int(counts.max()))
    sizes = compute_group_sizes(labels, groups)
    valid = sizes > 0

    def mean(x: Any) -> Any:
        return compute_merge_tokens(x[..., None], labels, groups)[..., 0]

    merged = compute_merge_tokens(vectors, labels, groups, mass=mass)
    total = mean(mass) * sizes.astype(mass.dtype)
    total = np.where(valid, total, mass.dtype.type(1))
    return merged, total, mean(free.astype(mass.dtype)) > 0, valid


class Pools(NamedTuple):
    """The cut of all windows, and the sizes that it needs."""

    cut: Cut
    shape: tuple[int, ...]
    """(S, P, n): sequences, windows of each, and tokens of each window."""
    totals: Counts
    """(S,): number of entries of each sequence."""
    squares: Any
    """(S · P,): sums of squared vectors, weighted by mass; None for a budget."""


def _cut_reference(x: Any, weight: Any, real: Any, pools: Pools) -> tuple[Any, Counts]:
    """Return roots in the windows (S · P, n), and the number of merges (S,).

    A root is the index of a token of the group in its window.
    """
    merges = window_linkage(x, weight, real)
    counts = _merges_of_windows(merges.height, pools)
    return _roots(merges, counts), counts.reshape(pools.shape[:2]).sum(axis=-1)


def _cut_cuda(x: Any, weight: Any, real: Any, pools: Pools) -> tuple[Any, Counts]:
    """Do the same as `_cut_reference` by the kernels of `linkage`."""
    # The kernels need at least one token in each window; one alone has no merge.
    first = np.zeros(real.shape, np.bool_, like=real)
    first[:, 0] = True
    present = real | first
    sizes = to_host(present.sum(axis=-1)).astype(np.int64)
    if real.shape[1] == 1:
        counts = np.zeros(len(sizes), np.int64)
        return _entry_numbers(real), counts.reshape(pools.shape[:2]).sum(axis=-1)
    trees = dendrograms_cuda(x, "ward", weight, present, metric="euclidean")
    counts = _merges_of_windows(to_host(trees)[..., 2], pools)
    groups = sizes - counts  # K of each window
    on_device = to_device(groups.astype(np.int32))
    labels = cut_linkage_cuda(trees, on_device, int(groups.max()), mask=present)
    # The root is the first member of the group: the least index with its label.
    same = labels[:, :, None] == labels[:, None, :]
    return same.argmax(axis=-1), counts.reshape(pools.shape[:2]).sum(axis=-1)


def _merges_of_windows(height: NDArray[Any], pools: Pools) -> Counts:
    """Return the number of merges of each window (S · P,): the lowest of each pool.

    `height` (S · P, M) has the heights of merges, infinite where there is none. A merge
    at height h adds h² / 2 to the squared error.
    """
    cut, num_sequences = pools.cut, pools.shape[0]
    heights = height.reshape(num_sequences, -1)  # all windows of a sequence
    order = np.argsort(heights, axis=-1, kind="stable")
    # The squared error of the i-th merge of each sequence. Sequences that merge equally
    # often make it together.
    with np.errstate(over="ignore"):
        ascending = np.take_along_axis(heights, order, -1).astype(np.float64)
        error = ascending**2 / 2
    error = error.reshape(-1, cut.num_equal, error.shape[-1]).sum(axis=1)
    steps = _steps_of_pools(error, pools)  # for each of these sequences
    counts = np.zeros((num_sequences, heights.shape[1] // height.shape[1]), np.int64)
    for sequence, made in enumerate(np.repeat(steps, cut.num_equal)):
        np.add.at(counts[sequence], order[sequence, :made] // height.shape[1], 1)
    return counts.reshape(-1)


def _steps_of_pools(error: NDArray[Any], pools: Pools) -> Counts:
    """Return how many steps each sequence makes, those with the least errors of a pool.

    `error` (S / E, M) ascends: a step is a merge in each of E sequences that merge
    equally often. It is infinite where there is none.
    """
    cut = pools.cut
    num_pools = pools.shape[0] // cut.pool_size
    steps = np.zeros((num_pools, len(error) // num_pools), np.int64)
    for pool, of_pool in enumerate(error.reshape(num_pools, -1)):
        rows = slice(pool * cut.pool_size, (pool + 1) * cut.pool_size)
        ascending = np.argsort(of_pool, kind="stable")
        if cut.counts is not None:
            merges = int((pools.totals - cut.counts)[rows].sum())
            wanted = -(-max(merges, 0) // cut.num_equal)
        else:
            squares = pools.squares.reshape(num_pools, -1)[pool].sum()
            wanted = _within_error(of_pool[ascending], cut.max_error, float(squares))
        made = ascending[: min(wanted, int(np.isfinite(of_pool).sum()))]
        np.add.at(steps[pool], made // error.shape[1], 1)
    return steps.reshape(-1)


def _within_error(error: NDArray[Any], max_error: Any, squares: float) -> int:
    """Return how many of the ascending errors have a sum within the relative error.

    Some allowance is made for rounding, so that an error of 0 merges equal entries.
    """
    with np.errstate(over="ignore"):
        total = np.cumsum(error)
    return int(np.count_nonzero(total <= (max_error + 2.0**-40) * squares))


def _squares(x: Any, weight: Any, real: Any) -> Any:
    """Return the sums of squared vectors of the windows (S · P,), weighted by mass."""
    squared = (x.astype(np.float64) ** 2).sum(axis=-1)
    return np.where(real, weight * squared, 0).sum(axis=-1)


def _roots(merges: Merges, counts: Counts) -> NDArray[np.intp]:
    """Return the root (S · P, n) of each token after the merges of its window."""
    order = np.argsort(merges.height, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], -1)
    parent = np.where(
        rank < counts[:, None], merges.into, np.arange(order.shape[1])
    ).astype(np.intp)
    # Pointer doubling: each step doubles the number of levels up to `parent`.
    for _ in range(math.ceil(math.log2(max(order.shape[1], 2)))):
        parent = np.take_along_axis(parent, parent, -1)
    return parent


def _spread(roots: Any, index: Any, free: Any, valid: Any) -> Any:
    """Return the roots (S, N) of all entries from those of the windows; -1 for padding.

    The root of an entry is the index of an entry of its group.
    """
    sequences, num_entries = free.shape
    own = np.where(valid, _entry_numbers(free), -1)
    if not math.prod(index.shape):
        return own
    members = index.reshape(sequences, -1)
    root = np.take_along_axis(index, roots.reshape(index.shape), -1)
    out = np.concatenate((own, own[:, :1]), axis=-1)  # one more slot, for the index N
    sequence = np.cumsum(_entry_numbers(free)[:, :1] + 1, axis=0) - 1  # (S, 1)
    out[sequence, members] = root.reshape(members.shape)
    return out[:, :num_entries]


def _entry_numbers(like: Any) -> Any:
    """Return 0..N-1 for each sequence (S, N), on the device of `like`."""
    ones = np.zeros(like.shape, np.int64, like=like) + 1
    return np.cumsum(ones, axis=-1) - 1


def _numbered(roots: Any) -> Any:
    """Return labels (S, N) of roots: groups numbered by their last members."""
    if is_cuda(roots):
        return number_groups_cuda(roots, "last")
    labels = np.full(roots.shape, -1, np.int32)
    for sequence, root in enumerate(roots):
        valid = root >= 0
        labels[sequence, valid] = in_order(root[valid], "last")
    return labels
