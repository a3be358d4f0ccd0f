"""Average and ward linkage of tokens with masses, in rounds, on the CPU.

A token i has the mass w_i, and d_ij is a distance of tokens i and j: 1 - cos_ij, or for
the Euclidean metric ‖x_i - x_j‖ (average) and ½‖x_i - x_j‖² (ward). A, B and C are
groups of tokens. W_A is the sum of the masses of A, and μ_A is the weighted mean of the
vectors of A: unit tokens, or tokens for the Euclidean metric. With the sum over i in A
and j in C, the distances d(A, C) are

    E(A, C) = Σ w_i w_j d_ij
    average   E(A, C) / (W_A W_C)
    ward      √(2 W_A W_C / (W_A + W_C)) |μ_A - μ_C|

The matrix `sums` holds E(A, C) of every two groups. An entry is infinite if A = C, or
if C is already part of another group. The distances of ward are squared until the end.

``kernels/optimized/linkage.cu`` does the same on a GPU.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import row_blocks
from ...progress import report

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_BLOCK = 1 << 16  # distances that `_search` computes at once: they stay in the cache
_COPIED = 1 << 18  # entries of `sums` that a merge copies at once
_OVERHEAD = 16  # cost of one call of `_search`, besides its rows; the unit is a row
# Replaces the hash of groups that are not tied: the largest uint32, so that `argmin`
# over the hashes selects one of the tied groups.
_LAST_TIE_BREAK = np.uint32(2**32 - 1)
# The state of the groups: one entry for each row of the matrix `sums`.
_GROUP = np.dtype(
    [
        ("alive", np.bool_),  # False once the group is part of another group
        ("node", np.intp),  # the token, or N + the number of the group's merge
        ("size", np.float64),  # number of tokens
        ("mass", np.float64),  # W_A
        ("within", np.float64),  # E(A, A)
        ("height", np.float64),  # distance of the group's merge; 0 for a token
        ("near", np.intp),  # index of the nearest neighbour, from the last search
        ("stale", np.bool_),  # whether the group or `near` has merged since then
        ("least", np.float64),  # distance to `near`
        ("tie_break", np.uint32),  # hash that decides between equal distances
    ]
)


def weighted_linkage(distance: Floats, mass: Floats, method: str) -> tuple[Floats, int]:
    """Return the dendrogram (N - 1, 4) of tokens with masses, and the number of rounds.

    `distance` holds d_ij (N, N), exactly symmetric, and is overwritten. `mass` (N,) is
    > 0, and `method` is "average" or "ward".

    The dendrogram is defined by one merge at a time, always of the nearest pair. A
    round merges pairs of groups that are each other's nearest neighbours: all such
    pairs whose groups are not stale. Let A and B be such a pair, and let C and D be
    another such pair that is merged before them.
    Then d(C ∪ D, A) ≥ min(d(C, A), d(D, A)): the union is not nearer to A than the
    nearer of C and D was. The same inequality is true for B instead of A. So A and B
    stay each other's nearest neighbours until they are merged, and A ∪ B is one of the
    merges of the dendrogram. Therefore one round may merge all such pairs.
    """
    num_tokens, sums = len(mass), distance
    # Equal tokens must have distance 0, but rounding can give them another one.
    # 2⁻⁴⁶ is 64 times the distance from 1 to the next float64.
    for rows in row_blocks(num_tokens, num_tokens):
        block = sums[rows]
        block[block < 2.0**-46] = 0
        # E of two tokens is w_i w_j d_ij. E of larger groups needs no d_ij, because
        # E(A ∪ B, C) = E(A, C) + E(B, C).
        block *= mass[rows, None] * mass
    np.fill_diagonal(sums, np.inf)  # a group is not its own neighbour
    group = np.zeros(num_tokens, _GROUP)  # also sets E(i, i) and the heights to 0
    # `due` holds the indices of the groups to search next; at first, of all tokens.
    group["node"] = due = np.arange(num_tokens)
    group["alive"], group["size"], group["mass"] = True, 1, mass
    group["tie_break"] = _hash_indices(num_tokens)
    tree, num_merges = np.empty((num_tokens - 1, 4)), 0
    # A full search is a search of all stale groups. `spent` is the cost of the searches
    # after the last full search. The unit is a row: the search of one group. Each call
    # of `_search` costs _OVERHEAD rows more. `_select_due` uses `spent` to decide when
    # to run the next full search. The rows of a full search itself do not count, but
    # the loop adds them too. So `spent` starts at minus their number: -N here, because
    # the first search, of all tokens, has N rows and counts as a full search.
    rounds, spent = 0, -num_tokens
    while num_merges < num_tokens - 1:
        # Search the due groups, then their nearest neighbours if these are stale: two
        # groups may merge only if both have been searched since their last change.
        while len(due):
            _search(sums, group, due, method)
            spent += len(due) + _OVERHEAD
            near = group["near"][due]
            due = np.unique(near[group["stale"][near]])
        a, b = _mutual_pairs(group)
        rows = slice(num_merges, num_merges + len(a))
        tree[rows] = _merge(sums, group, a, b)
        group["node"][a] = num_tokens + np.arange(rows.start, rows.stop)
        num_merges, rounds = rows.stop, rounds + 1
        # The time of a round grows with the number of groups, or its square.
        report(1 - (1 - num_merges / num_tokens) ** 2)
        sums, group, a = _compact(sums, group, a)
        due, spent = _select_due(group, a, spent)
    if method == "ward":
        np.sqrt(tree[:, 2], out=tree[:, 2])  # ward's distances are squared until here
    return _in_scipy_order(tree), rounds


def _mutual_pairs(group: Any) -> tuple[Indices, Indices]:
    """Return the groups that are each other's nearest neighbours, as pairs a < b."""
    near, index = group["near"], np.arange(len(group))
    # The `near` of a stale group is out of date.
    current = ~(group["stale"] | group["stale"][near])
    a = np.flatnonzero(current & (near[near] == index) & (index < near))
    return a, near[a]


def _select_due(group: Any, unions: Indices, spent: int) -> tuple[Indices, int]:
    """Return the indices of the groups to search next, and the new value of `spent`.

    If many groups have the same nearest neighbour, all of them become stale when this
    neighbour merges. A search of all stale groups in every round would be slow. So a
    round searches only the groups that it made, `unions`, until such searches have cost
    as many rows as a search of all stale groups.
    """
    # A group keeps its nearest neighbour if a later merge makes another group equally
    # near. So equal distances can form a cycle: A has the neighbour B, B has the
    # neighbour C, and C has the neighbour A. Then no pair can merge. A search of all
    # groups decides all ties by the same rule.
    # Ties are likely again after the next merges, so the next round should search all
    # stale groups too. Therefore the rows of this search count: the new `spent` is 0,
    # and after the search it is more than the number of groups.
    if len(unions) == 0:
        return np.flatnonzero(group["alive"]), 0
    stale = np.flatnonzero(group["alive"] & group["stale"])
    # -len(stale): the loop adds the rows of the search of all stale groups to `spent`,
    # and these rows must not count.
    return (unions, spent) if spent < len(stale) else (stale, -len(stale))


def _search(sums: Floats, group: Any, due: Indices, method: str) -> None:
    """Find the nearest neighbour of each group in `due`, and store it in `group`."""
    # Copies are contiguous; a field of a structured array is strided.
    mass, tie_break = group["mass"].copy(), group["tie_break"].copy()
    spread = group["within"] / mass**2 / 2  # (1 - |μ_A|²) / 2 for each group A
    step = max(1, _BLOCK // len(group))
    for start in range(0, len(due), step):
        rows = due[start : start + step]
        # Two arrays (rows, groups). `distance` starts as a copy of E(A, C) and is
        # changed to d(A, C) below. `mass_product` starts as W_A W_C.
        distance, mass_product = sums[rows], mass[rows, None] * mass
        if method == "ward":
            # |μ_A - μ_C|² = 2 (E(A, C) / (W_A W_C) - spread_A - spread_C), so that
            # 2 W_A W_C / (W_A + W_C) |μ_A - μ_C|²
            #   = 4 / (W_A + W_C) (E(A, C) - W_A W_C (spread_A + spread_C))
            mass_product *= spread[rows, None] + spread
            distance -= mass_product
            distance /= (mass[rows, None] + mass) / 4
            np.maximum(distance, 0, out=distance)  # rounding can make it negative
        else:
            distance /= mass_product  # E(A, C) / (W_A W_C)
        # Distances that differ by rounding alone must count as equal: round to the
        # nearest multiple of 8 units in the last place.
        bits = distance.view(np.int64)
        bits += 4
        bits &= -8
        least = distance.min(axis=-1)
        tied = distance == least[:, None]
        near = tied.argmax(axis=-1)
        # Break ties by a hash of the pair, the xor of the hashes of its two groups. The
        # hash of a pair is the same in both of its rows. A rule such as "the lowest
        # index" would give many equal groups the same neighbour, and only one pair
        # would merge in a round.
        tied_rows = np.flatnonzero(np.count_nonzero(tied, axis=-1) > 1)
        pair_hash = tie_break[rows[tied_rows], None] ^ tie_break
        near[tied_rows] = np.where(tied[tied_rows], pair_hash, _LAST_TIE_BREAK).argmin(
            axis=-1
        )
        group["near"][rows], group["least"][rows] = near, least
    group["stale"][due] = False


def _merge(sums: Floats, group: Any, a: Indices, b: Indices) -> Floats:
    """Merge group b into group a, for each pair of `a` and `b` (both (pairs,)).

    The union has the index of a. Return the merges (pairs, 4): the two nodes, the
    height, and the number of tokens.
    """
    height = np.maximum(group["height"][a], group["height"][b])
    height = np.maximum(height, group["least"][a])  # rounding must not lower heights
    # E(A ∪ B, A ∪ B) = E(A, A) + E(B, B) + 2 E(A, B)
    group["within"][a] += group["within"][b] + 2 * sums[a, b]
    group["mass"][a] += group["mass"][b]
    group["size"][a] += group["size"][b]
    group["height"][a] = height
    group["alive"][b] = False
    _add_sums(sums, a, b)
    merged = ~group["alive"]  # absorbed in this round or before
    merged[a] = True
    group["stale"] |= merged | merged[group["near"]]
    node = group["node"]
    return np.stack((node[a], node[b], height, group["size"][a]), axis=-1)


def _add_sums(sums: Floats, a: Indices, b: Indices) -> None:
    """Replace E(A, C) by E(A ∪ B, C), for each pair of `a` and `b` (both (pairs,))."""
    blocks = [*row_blocks(len(a), len(sums), _COPIED)]  # of pairs, to save memory
    for x in blocks:
        rows = sums[a[x]]  # (block, groups)
        rows += sums[b[x]]  # E(A ∪ B, C), where C did not merge
        rows[:, a] += rows[:, b]  # E between two unions has four terms
        sums[a[x]] = rows
    # An entry and its mirror image added the four terms in another order, so their
    # rounding differs; the mean of both is exactly symmetric.
    for x in blocks:
        later = a[x.start :]  # the pairs before have their means already
        entries, mirrored = np.ix_(a[x], later), np.ix_(later, a[x])
        mean = sums[entries]
        mean += sums[mirrored].T
        mean /= 2
        sums[entries], sums[mirrored] = mean, mean.T
    for x in blocks:
        sums[:, a[x]] = sums[a[x]].T
    # The columns b become infinite, so that no search finds an absorbed group. The row
    # of an absorbed group is not read again.
    sums[:, b] = np.inf


def _compact(sums: Floats, group: Any, unions: Indices) -> tuple[Floats, Any, Indices]:
    """Drop absorbed groups from the arrays, if they are at least a quarter of all.

    `unions` holds the indices of the groups that this round made. Return the matrix,
    which stays in its memory, the groups, and the new indices of these unions.
    """
    alive = group["alive"]
    if 4 * np.count_nonzero(alive) > 3 * len(group):
        return sums, group, unions
    new_index = np.cumsum(alive) - 1
    group = group[alive]
    # If the neighbour of a group was dropped, the group is stale. The new `near` of the
    # group is wrong, but the `near` of a stale group has no effect.
    group["near"] = new_index[group["near"]]
    # The entries move towards the start of the memory, so none is overwritten before it
    # has moved.
    kept, flat = np.flatnonzero(alive), sums.reshape(-1)
    size = len(kept)
    for x in row_blocks(size, len(sums), _COPIED):
        flat[x.start * size : x.stop * size] = sums[np.ix_(kept[x], kept)].ravel()
    return flat[: size * size].reshape(size, size), group, new_index[unions]


def _hash_indices(count: int) -> NDArray[np.uint32]:
    """Return distinct hashes of 0 .. count - 1 (the last step of MurmurHash3)."""
    # Every operation maps different values to different values.
    x = np.arange(count, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ x >> np.uint32(16)


def _in_scipy_order(tree: Floats) -> Floats:
    """Sort merges by height, and number groups by their rows in this order."""
    # The merges of several rounds are not in the order of height. A stable sort keeps
    # the order of equal heights.
    num_tokens = len(tree) + 1
    order = np.argsort(tree[:, 2], stable=True)
    # A node that is a merge has the number N + its row, and the sort changes the rows.
    node = np.arange(num_tokens + len(tree))
    node[num_tokens + order] = num_tokens + np.arange(len(tree))
    tree = tree[order]
    tree[:, :2] = np.sort(node[tree[:, :2].astype(np.intp)], axis=-1)
    return tree
