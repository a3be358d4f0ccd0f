"""The kernels of `cut_linkage`, interpreted."""

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
from qm_cupy.stages.clustering.cut_linkage import cut_linkage_cuda

pytestmark = pytest.mark.usefixtures("kernels")


def dendrogram_of(x, mask, mass):
    """Return a ward dendrogram of the valid tokens, named by their padded positions."""
    num_tokens = len(x)
    position = np.flatnonzero(mask)
    rows = np.tile([-1.0, -1, np.inf, 0], (num_tokens - 1, 1))
    if len(position) > 1:
        tree = hierarchy.linkage(unit(x[position]), "ward")
        node = np.concatenate((position, num_tokens + np.arange(len(tree))))
        rows[: len(tree), :2] = node[tree[:, :2].astype(int)]
        rows[: len(tree), 2:] = tree[:, 2:]
    # Heights of a dendrogram with masses grow with their root. The tree itself is that
    # of equal masses: a cut only adds up heights.
    if mass is not None:
        rows[:, 2] *= np.sqrt(mass.max())
    return rows


def cut(rows, merges):
    """Return a root for each token after the first `merges` rows."""
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
    rows = np.stack([dendrogram_of(x[b], valid[b], None) for b in range(4)])
    counts_of_sequences = np.maximum(valid.sum(-1) // [1, 2, 3, 4], 1)
    for counts in (counts_of_sequences, np.full(4, 1)):
        got = cut_linkage_cuda(rows, *kernel_counts(counts), mask=mask, order=order)
        for b in range(4):
            merges = max(valid[b].sum() - counts[b], 0)
            wanted = labels_of(cut(rows[b], merges), valid[b], order)
            np.testing.assert_array_equal(got[b], wanted)
            # Exactly K groups, or none in a sequence of padding.
            assert got[b].max() + 1 == (counts[b] if valid[b].any() else 0)
    one = cut_linkage_cuda(rows[0], None, 1, mask=None if mask is None else mask[0])
    np.testing.assert_array_equal(one, np.where(valid[0], 0, -1))


@sizes
def test_cut_linkage_of_a_chain(num_tokens):
    """The deepest dendrogram: every merge adds one token to the same group."""
    row = np.arange(num_tokens - 1)
    groups = np.where(row > 0, num_tokens + row - 1, 0)
    rows = np.stack((row + 1, groups, row / num_tokens, row + 2), axis=-1).astype(float)
    for num_groups in (1, num_tokens // 3 + 1):
        got = cut_linkage_cuda(rows, None, num_groups)
        merges = num_tokens - num_groups
        # Tokens 0 .. merges are group 0, all others are alone.
        wanted = np.maximum(np.arange(num_tokens) - merges, 0)
        np.testing.assert_array_equal(got, wanted)


@long_sizes
@masked
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cut_linkage_within_an_error(num_tokens, masked, weighted):
    mask, _ = masks_of(4, num_tokens, masked)
    valid = fill(mask, (4, num_tokens), True)
    x = random((4, num_tokens, 5), np.float64)
    mass = abs(random((4, num_tokens), np.float32, 1)) if weighted else None
    if weighted:
        mass[1] *= 1e30  # the error is relative: no overflow
        mass[2] = 0  # then all tokens count as 1
        mass[:, ::5] = 0  # a millionth of the largest
    weight = np.ones(valid.shape) if mass is None else mass.astype(np.float64)
    weight = np.where(valid, weight, 0)
    peak = weight.max(-1, keepdims=True)
    weight = np.where(peak > 0, np.maximum(weight, 1e-6 * peak), 1)
    rows = np.stack([dendrogram_of(x[b], valid[b], weight[b]) for b in range(4)])
    for bound in (0.0, 0.1, 0.5, 1e6):
        got = cut_linkage_cuda(rows, None, 0, bound, mass, mask)
        for b in range(4):
            # sum of h² / 2 <= (bound + ERROR_ROUNDING) * sum of masses
            error = np.cumsum(rows[b, :, 2] ** 2 / 2)
            total = weight[b][valid[b]].sum()
            merges = int(np.sum(error <= (bound + 1e-12) * total))
            wanted = labels_of(cut(rows[b], merges), valid[b])
            np.testing.assert_array_equal(got[b], wanted)


@long_sizes
def test_cut_linkage_of_what_is_no_dendrogram(num_tokens):
    """Wrong ids (out of range, twice, in a cycle) give some labels, always the same."""
    rng = np.random.default_rng(1)
    ids = rng.choice([-3, 0.5, 1e300, -1e300, np.nan, np.inf], (5, num_tokens - 1, 4))
    circle = num_tokens + np.arange(num_tokens - 1)
    ids[1, :, :2] = circle[:, None]  # each row is its own child
    ids[2, :, :2] = circle[::-1, None]
    ids[3, :, :2] = rng.integers(0, 2 * num_tokens, (num_tokens - 1, 2))
    ids[3, :, 2] = 0.5
    ids[3, num_tokens // 3 :, 2] = np.nan  # from here on no error is within a bound
    ids[4, :, :2], ids[4, :, 2] = 0, -1e200
    labels = []
    for name in ("basic", "optimized"):
        with qm.use_kernels(name):
            for counts in ([-1, 0, 1, 2**31 - 1, 1], [1] * 5):
                counts = np.array(counts, np.int32)
                labels.append(cut_linkage_cuda(ids, counts, num_tokens))
            labels.append(cut_linkage_cuda(ids, None, 0, 1e9))
    assert all(got.min() >= 0 and got.max() < num_tokens for got in labels)
    # Basic and optimized kernels agree even here.
    for basic, other in zip(labels[:3], labels[3:], strict=True):
        np.testing.assert_array_equal(basic, other)
