"""Checks of what clustering takes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_finite_values,
    check_floating,
    check_is_array,
    check_mask,
    check_shape,
)
from ...arrays.libraries import is_cuda

_WEIGHED = "average", "ward"  # the linkages that have a use for masses


def check_dendrogram(dendrogram: NDArray[Any], mask: NDArray[Any] | None) -> None:
    """Refuse what is not a linkage matrix (B, N - 1, 4), made with this mask."""
    check_floating("dendrogram", dendrogram)
    if dendrogram.ndim not in (2, 3) or dendrogram.shape[-1] != 4:
        raise ValueError(
            "`dendrogram` must have shape (N - 1, 4) or (B, N - 1, 4), "
            f"got {dendrogram.shape}"
        )
    *batch, merges, _ = dendrogram.shape
    check_mask(mask, (*batch, merges + 1))
    if is_cuda(dendrogram):
        return
    padded = (dendrogram[..., 0] == -1) & (dendrogram[..., 2] == np.inf)
    check_finite_values("dendrogram", np.where(padded[..., None], 0, dendrogram))
    _check_padded_rows(dendrogram, padded, mask)
    child = dendrogram[..., :2]
    first_later = merges + 1 + np.arange(merges)[:, None]
    flat = np.where(padded[..., None], np.nan, child.astype(np.float64))
    flat = flat.reshape(*batch, 2 * merges)
    ranked = np.sort(flat, axis=-1)
    if (ranked[..., 1:] == ranked[..., :-1]).any():
        raise ValueError("`dendrogram` must merge every group once at most")
    wrong = (child < 0) | (child >= first_later) | (child != np.floor(child))
    if (wrong & ~padded[..., None]).any():
        raise ValueError(
            "`dendrogram` must merge tokens or groups of earlier rows only"
        )


def _check_padded_rows(
    dendrogram: NDArray[Any], padded: NDArray[np.bool_], mask: NDArray[Any] | None
) -> None:
    if mask is None:
        if padded.any():
            raise ValueError(
                "`dendrogram` has rows of padding: give the `mask` it was made with"
            )
        return
    for index in np.ndindex(padded.shape[:-1]):
        rows, kept = padded[index], np.count_nonzero(mask[index])
        where = f" in sequence {index[0]}" if index else ""
        if (rows != (np.arange(len(rows)) >= kept - 1)).any():
            raise ValueError(
                f"`dendrogram` must have {kept - 1} merges{where}, as `mask` keeps "
                f"{kept} tokens, got {np.count_nonzero(~rows)}"
            )
        used = np.zeros(2 * len(rows) + 1, np.bool_)
        child = dendrogram[index][: kept - 1, :2]
        used[child[(child >= 0) & (child < len(used))].astype(np.intp)] = True
        wrong = np.flatnonzero(used[: len(rows) + 1] & ~mask[index])
        if len(wrong):
            raise ValueError(
                f"`mask` must be the one `dendrogram` was made with{where}, "
                f"which merges token {wrong[0]}"
            )


def check_mass_method(mass: NDArray[Any] | None, method: str) -> None:
    """Refuse masses for a method that has no use for them."""
    if mass is not None and method not in _WEIGHED:
        raise ValueError(f'`mass` is for method="average" or "ward", got {method!r}')


def check_weighted_linkage(weighted_linkage: Any, method: str) -> None:
    """Refuse what is no bool, or True for a method that has no use for masses."""
    if not isinstance(weighted_linkage, bool):
        raise TypeError(
            f"`weighted_linkage` must be True or False, got {weighted_linkage!r}"
        )
    if weighted_linkage and method not in _WEIGHED:
        raise ValueError(
            f'`weighted_linkage` is for method="average" or "ward", got {method!r}'
        )


def check_protect(
    protect: NDArray[Any] | None,
    method: str,
    counts: NDArray[np.int64],
    wanted: tuple[int, ...],
    mask: NDArray[np.bool_] | None,
) -> None:
    """Refuse what is not boolean (B, N) or leaves other tokens without a group."""
    if protect is None:
        return
    check_is_array("protect", protect)
    if protect.dtype != np.bool_:
        raise TypeError(f"`protect` must be boolean, got {protect.dtype}")
    check_shape("protect", protect, "BN", wanted)
    if is_cuda(protect):
        return
    for index in np.ndindex(wanted[:-1]):
        alone = protect[index] if mask is None else protect[index][mask[index]]
        start = ~alone & np.append(True, alone[:-1])  # of a run of the others
        runs = np.count_nonzero(start) if method == "contiguous" else (~alone).any()
        num_alone, got = np.count_nonzero(alone), int(counts[index])
        if got >= num_alone + runs:
            continue
        where = f" for sequence {index[0]}" if index else ""
        why = f"the {num_alone} protected tokens leave no group for the others"
        if got > num_alone:
            why = f"{num_alone} protected tokens leave {runs} runs of neighbours"
        raise ValueError(
            f"`num_groups` must be at least {num_alone + runs}{where}, got {got}: {why}"
        )


def check_anchors(
    anchors: NDArray[Any],
    method: str,
    counts: NDArray[np.int64],
    most: int,
    tokens: tuple[int, ...],
    mask: NDArray[np.bool_] | None,
    protect: NDArray[np.bool_] | None,
) -> None:
    """Refuse anchors that are not K distinct positions of tokens per sequence."""
    if method != "nearest":
        raise ValueError(f'`anchors` are for method="nearest", got {method!r}')
    check_is_array("anchors", anchors)
    if anchors.dtype.kind not in "iu":
        raise TypeError(f"`anchors` must be integers, got {anchors.dtype}")
    check_shape("anchors", anchors, "BK", (*tokens[:-1], most))
    if is_cuda(anchors):
        return
    for index in np.ndindex(tokens[:-1]):
        given = anchors[index][: int(counts[index])]
        if len(given) and not 0 <= given.min() <= given.max() < tokens[-1]:
            raise ValueError(f"`anchors` must lie in 0..{tokens[-1] - 1}, got {given}")
        if len(np.unique(given)) < len(given):
            raise ValueError(f"`anchors` must be distinct, got {given}")
        if mask is not None and not mask[index][given].all():
            raise ValueError(f"`anchors` must be tokens that `mask` keeps, got {given}")
        if protect is not None:
            alone = protect[index] if mask is None else protect[index] & mask[index]
            if len(np.setdiff1d(np.flatnonzero(alone), given)):
                raise ValueError(
                    "`anchors` must include the protected tokens "
                    f"{np.flatnonzero(alone)}, got {given}"
                )
