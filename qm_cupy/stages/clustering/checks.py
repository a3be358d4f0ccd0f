"""Checks of the arguments of clustering.

On a GPU, only shapes and dtypes are checked: to check values, the CPU would have to
wait for the GPU.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_finite_values,
    check_floating,
    check_is_array,
    check_mask,
    check_number,
    check_shape,
)
from ...arrays.counts import GroupCounts
from ...arrays.libraries import is_cuda

WEIGHTED_METHODS = "average", "ward"  # the linkages that use masses
UNLIMITED_METHODS = "nearest", "bipartite"  # methods that stop only at K groups


class Limits(NamedTuple):
    """What ends the merging, instead of K; at most one is not None."""

    max_error: float | None
    max_distance: float | None


NO_LIMITS = Limits(None, None)


def check_limits(
    num_groups: Any,
    max_error: Any,
    max_distance: Any,
    method: str,
    name: str = "num_groups",
) -> Limits:
    """Return the limits as Python numbers; all are None if K is given.

    Raise unless exactly one of K and the limits is given, and the limit fits the
    method. `name` is the caller's name for `num_groups`, such as "budget".
    """
    options = {name: num_groups, "max_error": max_error, "max_distance": max_distance}
    names = [f"`{x}`" for x, value in options.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"give exactly one of `{name}`, `max_error` and `max_distance`, got "
            f"{' and '.join(names) or 'none'}"
        )
    if max_error is not None:
        max_error = check_number("max_error", max_error, 0, np.inf, "[]")
        if method != "ward":
            other = "" if method in UNLIMITED_METHODS else "`max_distance` or "
            raise ValueError(
                f'`max_error` is for method="ward", got {method!r}: pass this method, '
                f"or {other}`{name}` instead of `max_error`"
            )
    if max_distance is not None:
        max_distance = check_number("max_distance", max_distance, 0, np.inf, "[]")
        if method in UNLIMITED_METHODS:
            raise ValueError(
                f'`max_distance` is not for method="{method}", which stops only at K '
                f"groups: pass another method, or `{name}`"
            )
    return Limits(max_error, max_distance)


def check_dendrogram(
    dendrogram: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Raise if this is not a linkage matrix (B, N - 1, 4) made with this mask.

    Return the mask as `check_mask` does.
    """
    check_floating("dendrogram", dendrogram)
    if dendrogram.ndim not in (2, 3) or dendrogram.shape[-1] != 4:
        raise ValueError(
            "`dendrogram` must have shape (N - 1, 4) or (B, N - 1, 4), "
            f"got {dendrogram.shape}"
        )
    *batch, merges, _ = dendrogram.shape
    mask = check_mask(mask, (*batch, merges + 1))
    if is_cuda(dendrogram):
        return mask
    # A row without a merge, as in a masked sequence, is (-1, -1, inf, 0).
    padded = (dendrogram[..., 0] == -1) & (dendrogram[..., 2] == np.inf)
    check_finite_values("dendrogram", np.where(padded[..., None], 0, dendrogram))
    _check_padded_rows(dendrogram, padded, mask)
    # Nodes 0..N-1 are tokens, and row r makes node N + r: row r may merge only nodes
    # below N + r. NaN replaces the children of padded rows, because NaN does not equal
    # NaN when children are compared.
    child = dendrogram[..., :2]
    first_later = merges + 1 + np.arange(merges)[:, None]
    flat = np.where(padded[..., None], np.nan, child.astype(np.float64))
    flat = flat.reshape(*batch, 2 * merges)
    # If a node occurs twice, both entries are neighbours after sorting.
    ranked = np.sort(flat, axis=-1)
    if (ranked[..., 1:] == ranked[..., :-1]).any():
        raise ValueError(
            "`dendrogram` must merge every token or group at most once: give the "
            "result of `linkage`"
        )
    wrong = (child < 0) | (child >= first_later) | (child != np.floor(child))
    if (wrong & ~padded[..., None]).any():
        raise ValueError(
            "`dendrogram` must merge only tokens and groups of earlier rows: give the "
            "result of `linkage`"
        )
    _check_heights(dendrogram[..., 2])
    return mask


def _check_heights(height: NDArray[Any]) -> None:
    """Raise if a height (B, N - 1) is below 0, or falls from row to row."""
    # A cut makes the first merges, and these must be the lowest.
    before = np.concatenate((np.zeros_like(height[..., :1]), height[..., :-1]), axis=-1)
    wrong = np.argwhere(~(height >= before))  # NaN is not ≥ any number
    if not len(wrong):
        return
    at = tuple(map(int, wrong[0]))
    where = f" of sequence {at[0]}" if len(at) > 1 else ""
    after = f" after {before[at]}" if at[-1] else ""
    raise ValueError(
        "`dendrogram` must have heights (column 2) that start at 0 or above and never "
        f"fall, got {height[at]}{after} in row {at[-1]}{where}: give the result of "
        "`linkage` (centroid and median linkage are not supported)"
    )


def _check_padded_rows(
    dendrogram: NDArray[Any], padded: NDArray[np.bool_], mask: NDArray[Any] | None
) -> None:
    """Raise if the padded rows or the merged tokens do not fit the mask.

    `padded` (B, N - 1) is True for rows of padding.
    """
    if mask is None:
        if padded.any():
            raise ValueError(
                "`dendrogram` has rows of padding: give the `mask` it was made with"
            )
        return
    for index in np.ndindex(padded.shape[:-1]):
        is_padding, kept = padded[index], np.count_nonzero(mask[index])
        where = f" in sequence {index[0]}" if index else ""
        # n valid tokens have n - 1 merges, and all later rows are padding.
        if (is_padding != (np.arange(len(is_padding)) >= kept - 1)).any():
            raise ValueError(
                f"`dendrogram` must have {kept - 1} merges{where}, because `mask` "
                f"keeps {kept} tokens, got {np.count_nonzero(~is_padding)}, and all "
                "rows of padding must follow the merges"
            )
        # Every merged token must be a valid token of the mask.
        used = np.zeros(2 * len(is_padding) + 1, np.bool_)
        child = dendrogram[index][: kept - 1, :2]
        used[child[(child >= 0) & (child < len(used))].astype(np.intp)] = True
        wrong = np.flatnonzero(used[: len(is_padding) + 1] & ~mask[index])
        if len(wrong):
            raise ValueError(
                f"`mask` must be the one that `dendrogram` was made with{where}, got "
                f"one that excludes the merged token {wrong[0]}"
            )


def check_mass_method(mass: NDArray[Any] | None, method: str) -> None:
    """Raise if masses are given for a method that does not use them."""
    if mass is not None and method not in WEIGHTED_METHODS:
        raise ValueError(f'`mass` is for method="average" or "ward", got {method!r}')


def check_step(step: Any, method: str) -> int | None:
    """Return `step` as an int or None; raise if it does not fit the method."""
    if step is None:
        return None
    if method != "bipartite":
        raise ValueError(
            f'`step` is for method="bipartite", got {method!r}: pass this method, or '
            "leave `step` out"
        )
    if isinstance(step, bool | np.bool_) or not isinstance(step, int | np.integer):
        raise TypeError(f"`step` must be an integer, got {step!r}")
    if step < 1:
        raise ValueError(f"`step` must be at least 1, got {step}")
    return int(step)


def check_weighted_linkage(weighted_linkage: Any, method: str) -> None:
    """Raise if the value is not a bool, or is True for a method without masses."""
    if not isinstance(weighted_linkage, bool | np.bool_):
        raise TypeError(
            f"`weighted_linkage` must be True or False, got {weighted_linkage!r}"
        )
    if weighted_linkage and method not in WEIGHTED_METHODS:
        raise ValueError(
            f'`weighted_linkage` is for method="average" or "ward", got {method!r}'
        )


def check_protect(
    protect: NDArray[np.bool_] | None,
    method: str,
    counts: NDArray[np.int64] | None,
    shape: tuple[int, ...],
    mask: NDArray[np.bool_] | None,
    name: str = "num_groups",
) -> None:
    """Raise if `protect` (B, N) leaves too few groups; `name` is the argument with K.

    Each protected token needs a group of its own. The other tokens need one more group,
    or one group for each run if groups are contiguous. A run is a series of neighbours
    without a protected token between them. `counts` (B,) is K, or None if a limit
    decides K.
    """
    if protect is None or is_cuda(protect) or counts is None:
        return
    # Padding is not protected: it has no group.
    for index in np.ndindex(shape[:-1]):
        protected = protect[index] if mask is None else protect[index][mask[index]]
        # A run starts at the first token, or after a protected token.
        start = ~protected & np.append(True, protected[:-1])
        runs = np.count_nonzero(start) if method == "contiguous" else (~protected).any()
        num_protected, num_groups = np.count_nonzero(protected), int(counts[index])
        if num_groups >= num_protected + runs:
            continue
        where = f" for sequence {index[0]}" if index else ""
        why = f"the {num_protected} protected tokens leave no group for the others"
        if num_groups > num_protected:
            why = (
                f"the {num_protected} protected tokens divide the others into {runs} "
                "runs, and a contiguous group cannot span two runs"
            )
        raise ValueError(
            f"`{name}` must be at least {num_protected + runs}{where}, got "
            f"{num_groups}: {why}"
        )


def check_anchors(
    anchors: NDArray[Any],
    method: str,
    groups: GroupCounts | None,
    shape: tuple[int, ...],
    mask: NDArray[np.bool_] | None,
    protect: NDArray[np.bool_] | None,
) -> None:
    """Raise if `anchors` are not K distinct positions of valid tokens per sequence.

    `shape` is the shape of the tokens without their last axis: (N,) or (B, N).
    """
    if method != "nearest" or groups is None:
        raise ValueError(f'`anchors` are for method="nearest", got {method!r}')
    check_is_array("anchors", anchors)
    if anchors.dtype.kind not in "iu":
        raise TypeError(f"`anchors` must be integers, got {anchors.dtype}")
    check_shape("anchors", anchors, "BK", (*shape[:-1], groups.max_groups))
    if is_cuda(anchors):
        return
    for index in np.ndindex(shape[:-1]):
        # A sequence with a smaller K has padding after its K anchors.
        selected = anchors[index][: int(groups.counts[index])]
        if len(selected) and not 0 <= selected.min() <= selected.max() < shape[-1]:
            raise ValueError(
                f"`anchors` must lie in 0..{shape[-1] - 1}, got {selected}"
            )
        if len(np.unique(selected)) < len(selected):
            raise ValueError(f"`anchors` must be distinct, got {selected}")
        if mask is not None and not mask[index][selected].all():
            raise ValueError(
                f"`anchors` must be tokens that `mask` keeps, got {selected}"
            )
        # A protected token that is not an anchor would join the group of an anchor.
        if protect is not None:
            protected = protect[index] if mask is None else protect[index] & mask[index]
            if len(np.setdiff1d(np.flatnonzero(protected), selected)):
                raise ValueError(
                    "`anchors` must include the protected tokens "
                    f"{np.flatnonzero(protected)}, got {selected}"
                )
