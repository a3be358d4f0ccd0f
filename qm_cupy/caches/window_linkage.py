"""Ward dendrograms of many short windows of tokens at once, on the CPU.

A long cache is merged in windows, so that time and memory are linear in its length.
There are W windows of n tokens, with the vectors x_i and the masses w_i > 0. A and B
are clusters of one window, W_A is the sum of the masses of A, and μ_A is the weighted
mean of its vectors. The squared distance of ward linkage is

    d²(A, B) = 2 W_A W_B / (W_A + W_B) ‖μ_A - μ_B‖²

as in `linkage`. A merge of A and B changes the distances to every C (Lance–Williams):

    d²(A ∪ B, C) = ((W_A + W_C) d²(A, C) + (W_B + W_C) d²(B, C) - W_C d²(A, B))
                   / (W_A + W_B + W_C)

`weighted_linkage` computes the same dendrogram of one long sequence. For a short
sequence, most of its time is the overhead of NumPy's calls. Here each call works on the
clusters of many windows.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..arrays.shapes import row_blocks
from ..progress import report

Floats = NDArray[np.floating[Any]]  # float32, or float64 for float64 vectors
Indices = NDArray[np.intp]

_ENTRIES = 1 << 18  # distances in memory at once, which stay in a cache of the CPU
_PRODUCTS = 1 << 18  # of a matrix product, for which OpenBLAS starts no threads
# A squared distance below the first fraction of the squared norms may come from
# rounding alone, and counts as 0. Then it is the second fraction of the largest one.
# The third is that of a difference between equal distances (see `_ward_distances`).
_NOISE = {4: 2.0**-19, 8: 2.0**-46}
_LEAST = {4: 2.0**-60, 8: 2.0**-80}
_TIE_BREAK = {4: 2.0**-18, 8: 2.0**-40}


class Merges(NamedTuple):
    """The dendrograms of windows: when each token's cluster is absorbed, and by which.

    A cluster has the number of its first token in the window. Every token but the first
    one of a window is the number of a cluster that is absorbed exactly once.
    """

    into: NDArray[np.int32]
    """(W, n): the number of the cluster that absorbs the cluster of this number."""
    height: Floats
    """(W, n): ward's distance of this merge; infinite if there is none, as for padding
    and for the first token."""


def window_linkage(
    vectors: NDArray[Any], mass: NDArray[Any], valid: NDArray[np.bool_]
) -> Merges:
    """Return all merges of windows (W, n, d) of tokens with masses (W, n) > 0.

    `valid` (W, n) is False for padding, whose vectors and masses have any finite value.
    """
    count, size = mass.shape
    dtype = accumulation_dtype(vectors.dtype)
    merges = Merges(
        np.tile(np.arange(size, dtype=np.int32), (count, 1)),
        np.full((count, size), np.inf, dtype),
    )
    for rows in row_blocks(count, size * size, _ENTRIES):
        x, masses = vectors[rows].astype(dtype), mass[rows].astype(dtype)
        # The distances do not depend on the origin. Near it, fewer digits cancel.
        x -= x.mean(axis=1, keepdims=True)
        part = Merges(merges.into[rows], merges.height[rows])  # views
        _link(x, masses, valid[rows], part)
        report(rows.stop / count)
    return merges


def _link(
    vectors: Floats, mass: Floats, valid: NDArray[np.bool_], merges: Merges
) -> None:
    """Write the merges of a few windows to `merges`.

    A round merges all pairs of clusters that are each other's nearest neighbours. Ward
    linkage is reducible: a union is not nearer to a third cluster than the nearer of
    its two parts was. So later merges do not separate such a pair.
    """
    squared = _ward_distances(vectors, mass, valid)  # (W, n, n); infinite: no pair
    number = np.tile(np.arange(mass.shape[1]), (len(mass), 1))  # of each cluster
    masses = np.where(valid, mass, mass.dtype.type(0))
    height = np.zeros(mass.shape, mass.dtype)
    while True:
        near = squared.argmin(axis=-1)  # (W, n)
        least = np.take_along_axis(squared, near[..., None], -1)[..., 0]
        mutual = np.take_along_axis(near, near, -1) == np.arange(near.shape[1])
        # Each pair once, as a < b. A cluster without a neighbour has the distance inf.
        window, a = np.nonzero(
            mutual & (np.arange(near.shape[1]) < near) & np.isfinite(least)
        )
        if not len(a):
            return
        b = near[window, a]
        # Rounding must not make a cluster lower than its parts.
        top = np.maximum(height[window, a], height[window, b])
        top = np.maximum(top, np.sqrt(least[window, a]))
        height[window, a] = top
        absorbed = number[window, b]
        merges.into[window, absorbed] = number[window, a]
        merges.height[window, absorbed] = top
        _update(squared, masses, window, a, b, least[window, a])
        squared, masses, number, height = _compact(squared, masses, number, height)


def _ward_distances(vectors: Floats, mass: Floats, valid: NDArray[np.bool_]) -> Floats:
    """Return the squared distances of ward linkage of all pairs (W, n, n)."""
    width = vectors.dtype.itemsize
    norms = np.einsum("wid,wid->wi", vectors, vectors)
    squared = _products(vectors)
    squared *= -2
    sums = norms[:, :, None] + norms[:, None, :]
    squared += sums
    sums *= _NOISE[width]
    squared[squared < sums] = 0
    largest = squared.max(axis=(1, 2), keepdims=True, initial=0)
    tiny = np.finfo(squared.dtype).tiny
    np.maximum(squared, np.maximum(largest * _LEAST[width], tiny), out=squared)
    total = mass[:, :, None] + mass[:, None, :]
    squared *= 2 * mass[:, :, None] * (mass[:, None, :] / total)
    # Equal distances of many pairs would give all clusters the same neighbour, and one
    # merge in each round. A different factor for each pair makes them different.
    factor = 1 + _TIE_BREAK[width] * _pair_hashes(squared.shape[1])
    squared *= factor.astype(squared.dtype)
    # Both triangles have different rounding, so use the upper one for both.
    upper = np.triu(np.ones(squared.shape[1:], np.bool_), 1)
    squared[~(upper & valid[:, :, None] & valid[:, None, :])] = np.inf
    return np.minimum(squared, squared.swapaxes(1, 2))


def _products(vectors: Floats) -> Floats:
    """Return x_i · x_j of all pairs (W, n, n).

    A product of a few rows at a time is too small for threads of BLAS, whose start
    would take longer than the product.
    """
    count, size, dim = vectors.shape
    out = np.empty((count, size, size), vectors.dtype)
    columns = vectors.swapaxes(1, 2).copy()
    step = max(1, _PRODUCTS // max(1, size * dim))
    for start in range(0, size, step):
        rows = slice(start, start + step)
        np.matmul(vectors[:, rows], columns, out=out[:, rows])
    return out


def _pair_hashes(size: int) -> Floats:
    """Return numbers within [0, 1) (n, n), different for the pairs of a row."""
    row, column = np.indices((size, size), dtype=np.uint32)
    x = row * np.uint32(0x9E3779B9) ^ column * np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(13)
    return x / 2.0**32


def _update(
    squared: Floats, masses: Floats, window: Indices, a: Indices, b: Indices, d: Floats
) -> None:
    """Merge cluster b into cluster a, for each pair of `window`, `a` and `b`.

    `d` has d²(A, B) of each pair. First the rows of the unions change, then the columns
    of all clusters, so that both unions of two pairs are taken into account.
    """
    mass_a, mass_b = masses[window, a, None], masses[window, b, None]

    def lance_williams(to_a: Floats, to_b: Floats) -> Floats:
        mass_c = masses[window]  # (pairs, n)
        to_a *= mass_a + mass_c
        to_b *= mass_b + mass_c
        to_a += to_b
        to_a -= mass_c * d[:, None]
        to_a /= mass_a + mass_b + mass_c
        return np.maximum(to_a, 0, out=to_a)  # rounding can make it negative

    squared[window, a] = lance_williams(squared[window, a], squared[window, b])
    masses[window, a] += masses[window, b]
    masses[window, b] = 0
    columns = lance_williams(squared[window, :, a], squared[window, :, b])
    squared[window, :, a] = columns
    # The entry of two unions and its mirror image have different rounding.
    columns = np.minimum(columns, squared[window, a])
    squared[window, a] = columns
    squared[window, :, a] = columns
    squared[window, b] = np.inf
    squared[window, :, b] = np.inf


def _compact(
    squared: Floats, masses: Floats, number: Indices, height: Floats
) -> tuple[Floats, Floats, Indices, Floats]:
    """Drop absorbed clusters, if every window can drop at least a quarter of its own.

    Without this, the time of each round would be that of the first one.
    """
    alive = masses > 0
    size = int(np.count_nonzero(alive, axis=-1).max())
    if 4 * size > 3 * masses.shape[1]:
        return squared, masses, number, height
    # A stable sort keeps the order of the clusters that stay.
    kept = np.argsort(~alive, axis=-1, kind="stable")[:, :size]  # (W, size)
    window = np.arange(len(masses))[:, None]
    squared = squared[window[..., None], kept[:, :, None], kept[:, None, :]]
    return squared, masses[window, kept], number[window, kept], height[window, kept]
