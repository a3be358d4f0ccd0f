"""Dendrograms: grown by SciPy, or by rounds where tokens have masses; and their cuts.

Rows are SciPy's: two groups, their distance, the tokens of the new group. Under a mask
tokens keep their places in the padded sequence, row r makes group N + r, and the rows
that padding leaves over are (-1, -1, inf, 0).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._matching import Groups, _gram, _unit_tokens
from ._rounds import Floats, weighted_linkage

LEAST_MASS = 1e-6  # of the largest in the sequence: what counts as no mass
PADDED_ROW = (-1.0, -1.0, np.inf, 0.0)


def linkage_reference(
    tokens: NDArray[Any],
    method: str,
    mass: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
) -> Floats:
    """Return the dendrograms (B, N - 1, 4) of tokens (B, N, D)."""
    *batch, num_tokens, _ = tokens.shape
    dendrogram = np.empty((*batch, num_tokens - 1, 4))
    for index in np.ndindex(*batch):
        weight = None if mass is None else mass[index]
        if mask is None:
            dendrogram[index] = linkage_sequence(tokens[index], method, weight)
            continue
        place = np.flatnonzero(mask[index])
        weight = None if weight is None else weight[place]
        tree = linkage_sequence(tokens[index][place], method, weight)
        node = np.concatenate((place, num_tokens + np.arange(len(tree))))
        dendrogram[index] = PADDED_ROW
        dendrogram[index][: len(tree), :2] = node[tree[:, :2].astype(np.intp)]
        dendrogram[index][: len(tree), 2:] = tree[:, 2:]
    return dendrogram


def linkage_sequence(
    tokens: NDArray[Any], method: str, mass: NDArray[Any] | None = None
) -> Floats:
    """Return the dendrogram (N - 1, 4) of one sequence without padding."""
    # Here, or `import qm_cupy` takes twice as long.
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(tokens) == 1:
        return np.empty((0, 4))
    unit = _unit_tokens(tokens.astype(np.float64))
    distance = np.empty((len(unit), len(unit)))
    _gram(unit, distance)
    if mass is None:
        distance = squareform(distance, checks=False)  # what is above the diagonal
    np.subtract(1, distance, out=distance)
    np.clip(distance, 0, 2, out=distance)
    if mass is not None:
        weight, peak = relative_mass(mass)
        tree, _ = weighted_linkage(distance, weight, method)
        tree[:, 2] *= np.sqrt(peak) if method == "ward" else 1
        return tree
    if method == "ward":
        distance *= 2
        np.sqrt(distance, out=distance)
    found: Floats = hierarchy.linkage(distance, method)
    return found


def relative_mass(mass: NDArray[Any]) -> tuple[Floats, float]:
    """Return masses (N,) over the largest, none of them 0, and the largest."""
    peak = float(mass.max())
    if peak == 0:
        return np.ones(len(mass)), 1.0
    return np.maximum(mass.astype(np.float64) / peak, LEAST_MASS), peak


def cut_reference(
    dendrogram: Floats,
    mass: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
    counts: NDArray[np.int64] | None,
    max_error: float | None,
    order: str,
) -> NDArray[np.int32]:
    """Return labels (B, N) of dendrograms cut at K groups each or within an error."""
    if counts is None:
        counts = count_within(dendrogram, mass, mask, max_error or 0)
    num_tokens = dendrogram.shape[-2] + 1
    labels = np.full((*dendrogram.shape[:-2], num_tokens), -1, np.int32)
    for index in np.ndindex(labels.shape[:-1]):
        keep = np.ones(num_tokens, np.bool_) if mask is None else mask[index]
        merges = int(np.count_nonzero(keep)) - int(counts[index])
        groups = cut_sequence(dendrogram[index], merges)
        labels[index][keep] = in_order(groups[keep], order)
    return labels


def count_within(
    dendrogram: Floats,
    mass: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
    max_error: float,
) -> NDArray[np.int64]:
    """Return the fewest groups (B,) whose error per token, or mass, is within."""
    num_tokens = dendrogram.shape[-2] + 1
    counts = np.empty(dendrogram.shape[:-2], np.int64)
    for index in np.ndindex(counts.shape):
        keep = np.ones(num_tokens, np.bool_) if mask is None else mask[index]
        ones = np.ones(num_tokens)
        weight, peak = relative_mass((ones if mass is None else mass[index])[keep])
        height = dendrogram[index][:, 2] / np.sqrt(peak)  # inf where padded
        error = np.cumsum(height**2 / 2) / weight.sum()
        counts[index] = len(weight) - np.sum(error <= max_error + 1e-12)  # to rounding
    return counts


def cut_sequence(dendrogram: Floats, merges: int) -> Groups:
    """Return the topmost node above each token once the first merges are made."""
    num_tokens = len(dendrogram) + 1
    parent = np.arange(num_tokens + merges)
    children = dendrogram[:merges, :2].astype(np.intp)
    parent[children] = num_tokens + np.arange(merges)[:, None]
    while True:  # each round doubles the distance climbed
        above = parent[parent]
        if np.array_equal(above, parent):
            return parent[:num_tokens]
        parent = above


def in_order(groups: Groups, order: str) -> Groups:
    """Number groups 0..K-1 by the position of their last or first member."""
    forwards = groups if order == "first" else groups[::-1]
    _, place, label = np.unique(forwards, return_index=True, return_inverse=True)
    if order == "last":
        place, label = -place, label[::-1]
    rank = np.argsort(np.argsort(place))
    return rank[label]
