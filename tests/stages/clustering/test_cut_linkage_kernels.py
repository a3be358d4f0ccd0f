"""The kernels of `cut_linkage`, run by an interpreter on the CPU.

In a dendrogram (N - 1, 4), nodes 0..N-1 are tokens, and row r merges two nodes into
node N + r at a height. A root is the topmost node of a token after some merges.
"""

import numpy as np
import pytest
from grouping_cases import (
    fill,
    kernel_counts,
    labels_of,
    long_sizes,
    masks_of,
    orders,
    sizes,
)
from kernel_cases import masked, random
from oracle_arrays import unit
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.stages.clustering.checks import Limits
from qm_cupy.stages.clustering.cut_linkage import cut_linkage_cuda

pytestmark = pytest.mark.usefixtures("kernels")


def dendrogram_of(x, mask, peak=1.0):
    """Return a ward dendrogram; tokens have the numbers of the padded sequence.

    `peak` is the largest mass.
    """
    num_tokens = len(x)
    position = np.flatnonzero(mask)
    rows = np.tile([-1.0, -1, np.inf, 0], (num_tokens - 1, 1))
    if len(position) > 1:
        tree = hierarchy.linkage(unit(x[position]), "ward")
        node = np.concatenate((position, num_tokens + np.arange(len(tree))))
        rows[: len(tree), :2] = node[tree[:, :2].astype(int)]
        rows[: len(tree), 2:] = tree[:, 2:]
    # With masses, heights are proportional to the root of the largest mass. The merges
    # stay those of equal masses, because a cut only adds up or compares heights.
    rows[:, 2] *= np.sqrt(peak)
    return rows


def roots_after(rows, merges):
    """Return the root of each token after the first `merges` rows."""
    num_tokens = len(rows) + 1
    roots = np.arange(num_tokens)
    for r in range(merges):
        roots[np.isin(roots, rows[r, :2])] = num_tokens + r
    return roots


@long_sizes
@masked
@orders
def test_cut_linkage_at_a_number_of_groups(num_tokens, masked, order):
    mask, _ = masks_of(4, num_tokens, masked)
    valid = fill(mask, (4, num_tokens), True)
    x = random((4, num_tokens, 5), np.float64)
    rows = np.stack([dendrogram_of(x[b], valid[b]) for b in range(4)])
    counts_of_sequences = np.maximum(valid.sum(-1) // [1, 2, 3, 4], 1)
    for counts in (counts_of_sequences, np.full(4, 1)):
        got = cut_linkage_cuda(rows, *kernel_counts(counts), mask=mask, order=order)
        for b in range(4):
            merges = max(valid[b].sum() - counts[b], 0)
            wanted = labels_of(roots_after(rows[b], merges), valid[b], order)
            np.testing.assert_array_equal(got[b], wanted)
            # There are exactly K groups, or no group in a sequence of padding.
            assert got[b].max() + 1 == (counts[b] if valid[b].any() else 0)
    sequence_labels = cut_linkage_cuda(
        rows[0], None, 1, mask=None if mask is None else mask[0]
    )
    np.testing.assert_array_equal(sequence_labels, np.where(valid[0], 0, -1))


@sizes
def test_cut_linkage_of_a_chain(num_tokens):
    """The deepest dendrogram: every merge adds one token to the same group."""
    row = np.arange(num_tokens - 1)
    groups = np.where(row > 0, num_tokens + row - 1, 0)
    rows = np.stack((row + 1, groups, row / num_tokens, row + 2), axis=-1).astype(float)
    for num_groups in (1, num_tokens // 3 + 1):
        got = cut_linkage_cuda(rows, None, num_groups)
        merges = num_tokens - num_groups
        # Tokens 0 .. merges are group 0. Every later token is a group of its own.
        wanted = np.maximum(np.arange(num_tokens) - merges, 0)
        np.testing.assert_array_equal(got, wanted)


@long_sizes
@masked
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cut_linkage_within_an_error(num_tokens, masked, weighted):
    mask, protect = masks_of(4, num_tokens, masked)
    valid = fill(mask, (4, num_tokens), True)
    free = valid & ~fill(protect, (4, num_tokens), False)
    x = random((4, num_tokens, 5), np.float64)
    mass = abs(random((4, num_tokens), np.float32, 1)) if weighted else None
    if weighted:
        mass[1] *= 1e30  # sums of such masses must not overflow
        mass[2] = 0  # if all masses are 0, each token counts as 1
        mass[:, ::5] = 0  # counts as a millionth of the largest
    weight = np.ones(valid.shape) if mass is None else mass.astype(np.float64)
    # The largest mass is that of the free tokens.
    peak = np.where(free, weight, 0).max(-1, keepdims=True)
    weight = np.where(peak > 0, np.maximum(weight, 1e-6 * peak), 1)
    peak[peak == 0] = 1
    rows = np.stack([dendrogram_of(x[b], free[b], peak[b, 0]) for b in range(4)])
    for bound in (0.0, 0.1, 0.5, 1e6):
        limits = Limits(bound, None)
        got = cut_linkage_cuda(rows, None, 1, limits, mass, mask, protect)
        for b in range(4):
            # With heights h: Σ h² / 2 <= bound · sum of masses, plus ERROR_ROUNDING
            # (1e-12) of the sum over all merges.
            error = np.cumsum(rows[b, :, 2] ** 2 / 2)
            error = error[np.isfinite(error)]  # without padded rows
            total = weight[b][valid[b]].sum()
            limit = bound * total + 1e-12 * error.max(initial=0)
            merges = int(np.sum(error <= limit))
            wanted = labels_of(roots_after(rows[b], merges), valid[b])
            np.testing.assert_array_equal(got[b], wanted)


@long_sizes
@masked
def test_cut_linkage_at_a_distance(num_tokens, masked):
    mask, protect = masks_of(4, num_tokens, masked)
    valid = fill(mask, (4, num_tokens), True)
    free = valid & ~fill(protect, (4, num_tokens), False)
    x = random((4, num_tokens, 5), np.float64)
    x[1, num_tokens // 2 :] = x[1, num_tokens // 2]  # many merges at height 0
    rows = np.stack([dendrogram_of(x[b], free[b]) for b in range(4)])
    # The last distances are a height of sequence 0, and just below it.
    height = rows[0, num_tokens // 3, 2] if num_tokens > 3 else 0.5
    for distance in (0.0, 0.7, np.inf, height, np.nextafter(height, 0)):
        limits = Limits(None, distance)
        got = cut_linkage_cuda(rows, None, 1, limits, None, mask, protect)
        for b in range(4):
            # Infinite heights are those of padded rows.
            merges = np.sum((rows[b, :, 2] <= distance) & np.isfinite(rows[b, :, 2]))
            wanted = labels_of(roots_after(rows[b], merges), valid[b])
            np.testing.assert_array_equal(got[b], wanted)


@long_sizes
def test_cut_linkage_of_wrong_dendrograms(num_tokens):
    """A GPU does not check dendrograms: wrong nodes give labels within 0..N-1.

    Nodes are out of range, merged twice, or part of a cycle. The basic and the
    optimized kernels must return the same labels.
    """
    rng = np.random.default_rng(1)
    ids = rng.choice([-3, 0.5, 1e300, -1e300, np.nan, np.inf], (5, num_tokens - 1, 4))
    own_nodes = num_tokens + np.arange(num_tokens - 1)
    ids[1, :, :2] = own_nodes[:, None]  # each row is its own child
    ids[2, :, :2] = own_nodes[::-1, None]
    ids[3, :, :2] = rng.integers(0, 2 * num_tokens, (num_tokens - 1, 2))
    ids[3, :, 2] = 0.5
    # From the first NaN on nothing is within a bound, lower heights after it neither.
    ids[3, num_tokens // 3 : num_tokens // 2, 2] = np.nan
    ids[4, :, :2], ids[4, :, 2] = 0, -1e200
    labels = []
    for name in ("basic", "optimized"):
        with qm.use_kernels(name):
            for counts in ([-1, 0, 1, 2**31 - 1, 1], [1] * 5):
                counts = np.array(counts, np.int32)
                labels.append(cut_linkage_cuda(ids, counts, num_tokens))
            for limits in (Limits(1e9, None), Limits(None, 1e9), Limits(None, np.inf)):
                labels.append(cut_linkage_cuda(ids, None, 1, limits))
    assert all(got.min() >= 0 and got.max() < num_tokens for got in labels)
    for basic, other in zip(labels[:5], labels[5:], strict=True):
        np.testing.assert_array_equal(basic, other)
