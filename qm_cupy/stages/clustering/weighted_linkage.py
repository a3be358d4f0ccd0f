"""Average and ward linkage of tokens with masses, by rounds, on the CPU.

``kernels/optimized/linkage.cu`` does the same on a GPU.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_BLOCK = 1 << 16  # distances searched at once, few enough to stay in the cache
_OVERHEAD = 16  # cost of one call of `_search`, in rows searched
_LAST_TIE_BREAK = np.uint32(2**32 - 1)
# The state of the groups: one entry for each row of the distance matrix.
_GROUP = np.dtype(
    [
        ("alive", np.bool_),  # not yet part of another group
        ("node", np.intp),  # its token, or N + the row of the merge that made it
        ("size", np.float64),  # tokens
        ("mass", np.float64),  # W
        ("within", np.float64),  # E(A, A)
        ("height", np.float64),  # of the merge that made it; 0 for a token
        ("near", np.intp),  # index of its nearest neighbour
        ("stale", np.bool_),  # whether `near` or the group itself has merged since
        ("least", np.float64),  # distance to `near`, squared for ward
        ("tie_break", np.uint32),  # decides between equal distances
    ]
)


def weighted_linkage(distance: Floats, mass: Floats, method: str) -> tuple[Floats, int]:
    """Merge reciprocal nearest neighbours, all pairs of a round at once.

    `distance` holds 1 - cos (N, N) and is overwritten, `mass` (N,) is > 0, and `method`
    is "average" or "ward". Return the dendrogram and the number of rounds. With these
    methods, merging two groups never brings the new group nearer to a third one than
    its parts were. So every such pair is a merge of the dendrogram.
    """
    num_tokens, apart = len(mass), distance
    apart[apart < 2.0**-46] = 0  # equal tokens have distance 0, without rounding error
    # E(A, C) = Σ w_a w_c (1 - cos) adds up over merges: E(A ∪ B, C) = E(A, C) + E(B, C)
    apart *= mass[:, None] * mass
    np.fill_diagonal(apart, np.inf)  # a group is not its own neighbour
    group = np.zeros(num_tokens, _GROUP)
    group["node"] = due = np.arange(num_tokens)
    group["alive"], group["size"], group["mass"] = True, 1, mass
    group["tie_break"] = _hash_indices(num_tokens)
    tree, made = np.empty((num_tokens - 1, 4)), 0
    rounds, spent = 0, -num_tokens
    while made < num_tokens - 1:
        # Search the due groups, then their nearest neighbours if those are stale: a
        # pair is mutual only if both sides are up to date.
        while len(due):
            _search(apart, group, due, method)
            spent += len(due) + _OVERHEAD
            near = group["near"][due]
            due = np.unique(near[group["stale"][near]])
        a, b = _mutual_pairs(group)
        rows = slice(made, made + len(a))
        tree[rows] = _merge(apart, group, a, b)
        group["node"][a] = num_tokens + np.arange(rows.start, rows.stop)
        made, rounds = rows.stop, rounds + 1
        apart, group, a = _compact(apart, group, a)
        due, spent = _select_due(group, a, spent)
    if method == "ward":
        np.sqrt(tree[:, 2], out=tree[:, 2])  # distances were squared so far
    return _in_scipy_order(tree), rounds


def _mutual_pairs(group: Any) -> tuple[Indices, Indices]:
    """Return the pairs of groups that are each other's nearest; a < b."""
    near, index = group["near"], np.arange(len(group))
    current = ~(group["stale"] | group["stale"][near])
    a = np.flatnonzero(current & (near[near] == index) & (index < near))
    return a, near[a]


def _select_due(group: Any, merged: Indices, spent: int) -> tuple[Indices, int]:
    """Return the groups to search next, new ones or all stale ones, and the cost.

    If many groups have the same nearest neighbour, all of them become stale whenever it
    merges, and a search of all in every round would be slow. So only new groups are
    searched, until these searches have cost as much as one of all stale groups.
    """
    # Ties that were broken before a merge and after it can form a cycle without a
    # mutual pair. Searching all groups again breaks all ties alike.
    if len(merged) == 0:
        return np.flatnonzero(group["alive"]), 0
    stale = np.flatnonzero(group["alive"] & group["stale"])
    return (merged, spent) if spent < len(stale) else (stale, -len(stale))


def _search(apart: Floats, group: Any, due: Indices, method: str) -> None:
    """Find the nearest neighbours of the groups at `due`."""
    mass, tie_break = group["mass"].copy(), group["tie_break"].copy()
    spread = group["within"] / mass**2 / 2  # (1 - |μ|²) / 2
    step = max(1, _BLOCK // len(group))
    for start in range(0, len(due), step):
        rows = due[start : start + step]
        distance, both = apart[rows], mass[rows, None] * mass
        if method == "ward":
            # 2 W_A W_C / (W_A + W_C) |μ_A - μ_C|²
            #   = 4 / (W_A + W_C) (E(A, C) - W_A W_C (spread_A + spread_C))
            both *= spread[rows, None] + spread
            distance -= both
            distance /= (mass[rows, None] + mass) / 4
            np.maximum(distance, 0, out=distance)
        else:
            distance /= both  # E(A, C) / (W_A W_C)
        # Distances that differ by rounding alone must count as equal: round to the
        # nearest multiple of 8 units in the last place.
        bits = distance.view(np.int64)
        bits += 4
        bits &= -8
        least = distance.min(axis=-1)
        tied = distance == least[:, None]
        near = tied.argmax(axis=-1)
        # Break ties by a hash of the pair, which is the same from both sides (xor is
        # symmetric). A rule such as "the lowest index" would give many equal groups
        # the same neighbour, and only one pair would merge in a round.
        many = np.flatnonzero(np.count_nonzero(tied, axis=-1) > 1)
        pair_hash = tie_break[rows[many], None] ^ tie_break
        near[many] = np.where(tied[many], pair_hash, _LAST_TIE_BREAK).argmin(axis=-1)
        group["near"][rows], group["least"][rows] = near, least
    group["stale"][due] = False


def _merge(apart: Floats, group: Any, a: Indices, b: Indices) -> Floats:
    """Put each group at `b` into its partner at `a`; return the rows of the tree."""
    height = np.maximum(group["height"][a], group["height"][b])
    height = np.maximum(height, group["least"][a])  # rounding must not lower heights
    # E(A ∪ B, A ∪ B) = E(A, A) + E(B, B) + 2 E(A, B)
    group["within"][a] += group["within"][b] + 2 * apart[a, b]
    group["mass"][a] += group["mass"][b]
    group["size"][a] += group["size"][b]
    group["height"][a] = height
    group["alive"][b] = False
    rows = apart[a] + apart[b]
    corner = rows[:, a] + rows[:, b]  # E between two new groups
    rows[:, a] = (corner + corner.T) / 2  # exactly symmetric
    apart[a], apart[:, a], apart[:, b] = rows, rows.T, np.inf
    moved = ~group["alive"]
    moved[a] = True
    group["stale"] |= moved | moved[group["near"]]
    node = group["node"]
    return np.stack((node[a], node[b], height, group["size"][a]), axis=-1)


def _compact(apart: Floats, group: Any, merged: Indices) -> tuple[Floats, Any, Indices]:
    """Drop groups that are part of others once they are a quarter of all."""
    alive = group["alive"]
    if 4 * np.count_nonzero(alive) > 3 * len(group):
        return apart, group, merged
    new_index = np.cumsum(alive) - 1
    group = group[alive]
    group["near"] = new_index[group["near"]]
    return apart[np.ix_(alive, alive)], group, new_index[merged]


def _hash_indices(count: int) -> NDArray[np.uint32]:
    """Return distinct hashes of 0 .. count - 1 (the last step of MurmurHash3)."""
    x = np.arange(count, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ x >> np.uint32(16)


def _in_scipy_order(tree: Floats) -> Floats:
    """Sort merges by height, then by the time they were made, and renumber groups."""
    num_tokens = len(tree) + 1
    order = np.argsort(tree[:, 2], stable=True)
    # A child that is a merge has the number N + its row, which the sort has changed.
    node = np.arange(num_tokens + len(tree))
    node[num_tokens + order] = num_tokens + np.arange(len(tree))
    tree = tree[order]
    tree[:, :2] = np.sort(node[tree[:, :2].astype(np.intp)], axis=-1)
    return tree
