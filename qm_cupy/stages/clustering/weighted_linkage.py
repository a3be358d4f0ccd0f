from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

_BLOCK = 1 << 16  # distances looked at together, so that they stay in the cache
_OVERHEAD = 16  # of a search, in rows
_LAST_LOT = np.uint32(2**32 - 1)
_GROUP = np.dtype(
    [
        ("alive", np.bool_),  # not yet part of another
        ("node", np.intp),  # N + the row that made it, or its token
        ("size", np.float64),
        ("mass", np.float64),  # W
        ("within", np.float64),  # E(A, A)
        ("height", np.float64),
        ("near", np.intp),  # its nearest neighbour,
        ("stale", np.bool_),  # unless that has merged since
        ("least", np.float64),  # the distance of that, squared for ward
        ("lot", np.uint32),  # decides between equal distances
    ]
)


def weighted_linkage(distance: Floats, mass: Floats, method: str) -> tuple[Floats, int]:
    """Merge reciprocal nearest neighbours, all pairs of a round at once.

    Takes 1 - cos (N, N), which it writes over, and masses > 0 (N,), for "average" or
    "ward". Returns the dendrogram and the number of rounds. Merging two groups brings
    neither nearer to a third, so all such pairs are merges of the dendrogram.
    """
    num_tokens, apart = len(mass), distance
    apart[apart < 2.0**-46] = 0  # equal tokens, but for rounding
    apart *= mass[:, None] * mass  # E(A, C)
    np.fill_diagonal(apart, np.inf)
    group = np.zeros(num_tokens, _GROUP)
    group["node"] = due = np.arange(num_tokens)
    group["alive"], group["size"], group["mass"] = True, 1, mass
    group["lot"] = _scattered(num_tokens)
    tree, made = np.empty((num_tokens - 1, 4)), 0
    rounds, spent = 0, -num_tokens
    while made < num_tokens - 1:
        while len(due):  # and after them the neighbours found, if they have lost theirs
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
        due, spent = _due(group, a, spent)
    if method == "ward":
        np.sqrt(tree[:, 2], out=tree[:, 2])
    return _in_scipy_order(tree), rounds


def _mutual_pairs(group: Any) -> tuple[Places, Places]:
    near, place = group["near"], np.arange(len(group))
    found = ~(group["stale"] | group["stale"][near])
    a = np.flatnonzero(found & (near[near] == place) & (place < near))
    return a, near[a]


def _due(group: Any, merged: Places, spent: int) -> tuple[Places, int]:
    """Return whose neighbours to find next: of groups just made, or of all at times.

    Where all are nearest to one group, all lose it when it merges, round after round:
    from time to time is then enough.
    """
    if len(merged) == 0:  # lots drawn before a merge can run in a circle: draw again
        return np.flatnonzero(group["alive"]), 0
    stale = np.flatnonzero(group["alive"] & group["stale"])
    return (merged, spent) if spent < len(stale) else (stale, -len(stale))


def _search(apart: Floats, group: Any, due: Places, method: str) -> None:
    """Find the nearest neighbours of the groups at `due`."""
    mass, lot = group["mass"].copy(), group["lot"].copy()
    spread = group["within"] / mass**2 / 2  # (1 - |μ|²) / 2
    step = max(1, _BLOCK // len(group))
    for start in range(0, len(due), step):
        rows = due[start : start + step]
        distance, both = apart[rows], mass[rows, None] * mass
        if method == "ward":  # 2 W_A W_C / (W_A + W_C) |μ_A - μ_C|²
            both *= spread[rows, None] + spread
            distance -= both
            distance /= (mass[rows, None] + mass) / 4
            np.maximum(distance, 0, out=distance)
        else:
            distance /= both
        bits = distance.view(np.int64)
        bits += 4  # equal but for rounding is equal: to the nearest multiple
        bits &= -8  # of 8 units in the last place
        least = distance.min(axis=-1)
        tied = distance == least[:, None]
        near = tied.argmax(axis=-1)
        many = np.flatnonzero(np.count_nonzero(tied, axis=-1) > 1)
        lots = lot[rows[many], None] ^ lot  # the same from both sides
        near[many] = np.where(tied[many], lots, _LAST_LOT).argmin(axis=-1)
        group["near"][rows], group["least"][rows] = near, least
    group["stale"][due] = False


def _merge(apart: Floats, group: Any, a: Places, b: Places) -> Floats:
    """Put each group at `b` into its partner at `a`; return the rows of the tree."""
    height = np.maximum(group["height"][a], group["height"][b])
    height = np.maximum(height, group["least"][a])  # never down, not by rounding
    group["within"][a] += group["within"][b] + 2 * apart[a, b]
    group["mass"][a] += group["mass"][b]
    group["size"][a] += group["size"][b]
    group["height"][a] = height
    group["alive"][b] = False
    rows = apart[a] + apart[b]
    corner = rows[:, a] + rows[:, b]
    rows[:, a] = (corner + corner.T) / 2  # exactly symmetric
    apart[a], apart[:, a], apart[:, b] = rows, rows.T, np.inf
    moved = ~group["alive"]
    moved[a] = True
    group["stale"] |= moved | moved[group["near"]]
    node = group["node"]
    return np.stack((node[a], node[b], height, group["size"][a]), axis=-1)


def _compact(apart: Floats, group: Any, merged: Places) -> tuple[Floats, Any, Places]:
    """Drop groups that are part of others once they are a quarter of all."""
    alive = group["alive"]
    if 4 * np.count_nonzero(alive) > 3 * len(group):
        return apart, group, merged
    place = np.cumsum(alive) - 1
    group = group[alive]
    group["near"] = place[group["near"]]
    return apart[np.ix_(alive, alive)], group, place[merged]


def _scattered(count: int) -> NDArray[np.uint32]:
    """Return distinct numbers without a pattern (the last step of MurmurHash3)."""
    x = np.arange(count, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ x >> np.uint32(16)


def _in_scipy_order(tree: Floats) -> Floats:
    """Sort merges by height, equal ones as they were made, and number groups anew."""
    num_tokens = len(tree) + 1
    order = np.argsort(tree[:, 2], stable=True)
    node = np.arange(num_tokens + len(tree))
    node[num_tokens + order] = num_tokens + np.arange(len(tree))
    tree = tree[order]
    tree[:, :2] = np.sort(node[tree[:, :2].astype(np.intp)], axis=-1)
    return tree
