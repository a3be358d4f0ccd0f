"""The groupings that need no dendrogram, of one sequence's unit tokens (N, D).

Each returns a group identifier per token, in no particular order. Zero rows stand for
zero-norm tokens, whose similarity with all others is 0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRAM_ROWS = 2048  # of a product of tokens by themselves

Groups = NDArray[np.intp]


def _gram(x: NDArray[Any], out: NDArray[Any]) -> None:
    """Write x xᵀ (N, N), symmetric to the bit: some rows at a time, each mirrored.

    Never as one product: OpenBLAS's threaded syrk, which NumPy takes for that, faults
    from some 16,384 rows on (numpy#19685).
    """
    for start in range(0, len(x), _GRAM_ROWS):
        stop = start + _GRAM_ROWS
        rows = x[start:stop]
        np.matmul(rows, rows.T, out=out[start:stop, start:stop])
        rest = rows @ x[stop:].T
        out[start:stop, stop:] = rest
        out[stop:, start:stop] = rest.T


def _unit_tokens(x: NDArray[Any]) -> NDArray[Any]:
    """Scale each token to norm 1; zero tokens stay zero."""
    peak = np.abs(x).max(axis=-1, keepdims=True)  # first, so that no square overflows
    x = x / np.where(peak > 0, peak, 1)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def nearest_groups(unit: NDArray[Any], anchors: NDArray[Any]) -> Groups:
    """Join each token to its most similar anchor (ties: the earlier anchor)."""
    anchors = np.sort(anchors)
    groups = np.argmax(unit @ unit[anchors].T, axis=-1)  # (N, K) -> (N,)
    groups[anchors] = np.arange(len(anchors))  # an anchor stands for itself
    return groups


def bipartite_groups(unit: NDArray[Any], num_groups: int) -> Groups:
    """Match groups at even places to those at odd ones, again until K are left.

    A step merges the r even groups most similar to their best odd partner, r at most
    half of the groups; groups then stand in the order of their last members.
    """
    groups = np.arange(len(unit))  # the place of each token's group
    sums, last = unit.copy(), np.arange(len(unit))
    while len(sums) > num_groups:
        norm = np.linalg.norm(sums, axis=-1, keepdims=True)
        mean = sums / np.where(norm > 0, norm, 1)
        similarity = mean[::2] @ mean[1::2].T
        partner = similarity.argmax(axis=-1)
        best = np.take_along_axis(similarity, partner[:, None], axis=-1)[:, 0]
        merges = min(len(sums) - num_groups, len(sums) // 2)
        chosen = np.argsort(-best, stable=True)[:merges]
        source, target = 2 * chosen, 2 * partner[chosen] + 1
        np.add.at(sums, target, sums[source])
        np.maximum.at(last, target, last[source])
        kept = np.delete(np.arange(len(sums)), source)
        kept = kept[np.argsort(last[kept])]
        place = np.empty(len(sums), np.intp)
        place[kept] = np.arange(len(kept))
        place[source] = place[target]
        groups, sums, last = place[groups], sums[kept], last[kept]
    return groups


def contiguous_groups(
    unit: NDArray[Any], num_groups: int, runs: NDArray[np.intp]
) -> Groups:
    """Merge the neighbours that add least to the squared error, until K are left.

    Tokens of different `runs` (N,), which never sink, are no neighbours.

    Ward's cost of two groups of n_a and n_b unit tokens with sums S_a and S_b. The
    leftmost pair goes first among equals. A zero token counts as a unit vector
    orthogonal to all others, as its similarity 0 says.
    """
    num_tokens = len(unit)
    sums, size = unit.copy(), np.ones(num_tokens)
    square = np.ones(num_tokens)  # ‖S‖², each zero token adding its own 1
    right = np.arange(1, num_tokens + 1)  # the next group's first token
    left = np.arange(-1, num_tokens - 1)
    starts = np.ones(num_tokens, np.intp)  # 1 where a group starts
    cost = np.full(num_tokens, np.inf)  # of merging a group with the next one
    cost[:-1] = 1 - np.einsum("ij,ij->i", unit[:-1], unit[1:])
    cost[:-1][runs[:-1] != runs[1:]] = np.inf

    def pair_cost(a: int, b: int) -> float:
        if runs[a] != runs[b]:
            return np.inf
        gap = square[a] / size[a] ** 2 + square[b] / size[b] ** 2
        gap -= 2 * (sums[a] @ sums[b]) / (size[a] * size[b])
        return float(size[a] * size[b] / (size[a] + size[b]) * gap)

    for _ in range(num_tokens - num_groups):
        a = int(cost.argmin())
        b = int(right[a])
        square[a] += square[b] + 2 * (sums[a] @ sums[b])
        sums[a] += sums[b]
        size[a] += size[b]
        starts[b], cost[b] = 0, np.inf
        after = right[a] = right[b]
        if after < num_tokens:
            left[after] = a
        cost[a] = pair_cost(a, int(after)) if after < num_tokens else np.inf
        before = int(left[a])
        if before >= 0:
            cost[before] = pair_cost(before, a)
    return np.cumsum(starts) - 1
