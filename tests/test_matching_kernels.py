"""The groupings, interpreted, against their definitions, written out plainly.

Launchers are called directly, on NumPy arrays that pass for CUDA's.
"""

import numpy as np
import pytest
from kernel_cases import dtypes, masked, random, whatever_shape
from recorded import recording
from scipy.cluster import hierarchy
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering.bipartite import bipartite_groups_cuda
from qm_cupy.stages.clustering.contiguous import contiguous_groups_cuda
from qm_cupy.stages.clustering.cut_linkage import cut_linkage_cuda
from qm_cupy.stages.clustering.labels import number_groups_cuda
from qm_cupy.stages.clustering.nearest import (
    nearest_anchors_cuda,
    nearest_groups_cuda,
    top_norm_anchors_cuda,
)

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [1, 2, 31, 33, 129, 257]
SHARES = [0.0, 0.3, 0.8, 1.0]  # of the tokens, to be left as groups
LONG = [*SIZES, 1100]  # more than a block has threads

sizes = pytest.mark.parametrize("num_tokens", SIZES)
long_sizes = pytest.mark.parametrize("num_tokens", LONG)
orders = pytest.mark.parametrize("order", ["last", "first"])


def masks_of(batch, num_tokens, masked=True):
    """Return padding at the left, with holes, and of all; a fifth are protected."""
    rng = np.random.default_rng(5)
    mask = rng.random((batch, num_tokens)) < 0.7
    mask[0] = np.arange(num_tokens) >= num_tokens // 3
    mask[-1] = False
    protect = rng.random((batch, num_tokens)) < 0.2
    return (mask, protect) if masked else (None, None)


def fill(mask, shape, value):
    return np.full(shape, value) if mask is None else mask


def counts_of(valid, protect, share):
    """Return K (B,): the protected tokens and a share of the others."""
    fixed = (valid & protect).sum(-1)
    free = valid.sum(-1) - fixed
    return fixed + np.ceil(free * share).astype(np.int64)


def given(counts):
    """Return K as a launcher takes it."""
    return cuda.device_counts(np.asarray(counts, np.int64))


def labels_of(roots, valid, order="last"):
    """Number the groups of one sequence by their last or first member."""
    place = {}
    for i in np.flatnonzero(valid):
        if order == "last" or roots[i] not in place:
            place[roots[i]] = i
    ranks = {root: rank for rank, root in enumerate(sorted(place, key=place.get))}
    return np.array([ranks[roots[i]] if valid[i] else -1 for i in range(len(roots))])


def unit(x):
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


@long_sizes
@orders
def test_number_groups(num_tokens, order):
    rng = np.random.default_rng(num_tokens)
    roots = rng.integers(-1, 2 * num_tokens, (4, num_tokens)).astype(np.int32)
    roots[1] //= 7
    roots[2] = 2 * num_tokens - 1
    roots[3, ::2] = rng.choice([-7, 2 * num_tokens, 2**31 - 1, -(2**31)])
    got = number_groups_cuda(roots, order)
    assert got.dtype == np.int32
    valid = (roots >= 0) & (roots < 2 * num_tokens)
    for b in range(4):
        wanted = labels_of(roots[b], valid[b], order)
        np.testing.assert_array_equal(got[b], wanted)
    np.testing.assert_array_equal(number_groups_cuda(roots[1], order), got[1])


def dendrogram_of(x, mask, mass):
    """Return a ward dendrogram of the valid tokens, at places of the sequence."""
    num_tokens = len(x)
    place = np.flatnonzero(mask)
    rows = np.tile([-1.0, -1, np.inf, 0], (num_tokens - 1, 1))
    if len(place) > 1:
        tree = hierarchy.linkage(unit(x[place]), "ward")
        node = np.concatenate((place, num_tokens + np.arange(len(tree))))
        rows[: len(tree), :2] = node[tree[:, :2].astype(int)]
        rows[: len(tree), 2:] = tree[:, 2:]
    if mass is not None:
        rows[:, 2] *= np.sqrt(mass.max())
    return rows


def cut(rows, merges):
    """Return a root for each token after the first merges."""
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
    each = np.maximum(valid.sum(-1) // [1, 2, 3, 4], 1)
    for counts in (each, np.full(4, 1)):
        got = cut_linkage_cuda(rows, *given(counts), mask=mask, order=order)
        for b in range(4):
            merges = max(valid[b].sum() - counts[b], 0)
            wanted = labels_of(cut(rows[b], merges), valid[b], order)
            np.testing.assert_array_equal(got[b], wanted)
            assert got[b].max() + 1 == (counts[b] if valid[b].any() else 0)
    one = cut_linkage_cuda(rows[0], None, 1, mask=None if mask is None else mask[0])
    np.testing.assert_array_equal(one, np.where(valid[0], 0, -1))


@sizes
def test_cut_linkage_of_a_chain(num_tokens):
    """As deep as a dendrogram can be: every merge takes in one more token."""
    row = np.arange(num_tokens - 1)
    groups = np.where(row > 0, num_tokens + row - 1, 0)
    rows = np.stack((row + 1, groups, row / num_tokens, row + 2), axis=-1).astype(float)
    for num_groups in (1, num_tokens // 3 + 1):
        got = cut_linkage_cuda(rows, None, num_groups)
        merges = num_tokens - num_groups
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
        mass[1] *= 1e30
        mass[2] = 0  # then all count as 1
        mass[:, ::5] = 0  # a millionth of the largest
    weight = np.ones(valid.shape) if mass is None else mass.astype(np.float64)
    weight = np.where(valid, weight, 0)
    peak = weight.max(-1, keepdims=True)
    weight = np.where(peak > 0, np.maximum(weight, 1e-6 * peak), 1)
    rows = np.stack([dendrogram_of(x[b], valid[b], weight[b]) for b in range(4)])
    for bound in (0.0, 0.1, 0.5, 1e6):
        got = cut_linkage_cuda(rows, None, 0, bound, mass, mask)
        for b in range(4):
            error = np.cumsum(rows[b, :, 2] ** 2 / 2)
            total = weight[b][valid[b]].sum()
            merges = int(np.sum(error <= (bound + 1e-12) * total))
            wanted = labels_of(cut(rows[b], merges), valid[b])
            np.testing.assert_array_equal(got[b], wanted)


@long_sizes
def test_cut_linkage_of_what_is_no_dendrogram(num_tokens):
    """Ids out of range, twice or in a circle: any labels, but the same ones always."""
    rng = np.random.default_rng(1)
    ids = rng.choice([-3, 0.5, 1e300, -1e300, np.nan, np.inf], (5, num_tokens - 1, 4))
    circle = num_tokens + np.arange(num_tokens - 1)
    ids[1, :, :2] = circle[:, None]  # each row is its own child
    ids[2, :, :2] = circle[::-1, None]
    ids[3, :, :2] = rng.integers(0, 2 * num_tokens, (num_tokens - 1, 2))
    ids[3, :, 2] = 0.5
    ids[3, num_tokens // 3 :, 2] = np.nan  # no error is within a bound any more
    ids[4, :, :2], ids[4, :, 2] = 0, -1e200
    labels = []
    for name in ("basic", "optimized"):
        with qm.use_kernels(name):
            for counts in ([-1, 0, 1, 2**31 - 1, 1], [1] * 5):
                counts = np.array(counts, np.int32)
                labels.append(cut_linkage_cuda(ids, counts, num_tokens))
            labels.append(cut_linkage_cuda(ids, None, 0, 1e9))
    assert all(got.min() >= 0 and got.max() < num_tokens for got in labels)
    for basic, other in zip(labels[:3], labels[3:], strict=True):
        np.testing.assert_array_equal(basic, other)


@dtypes
@sizes
@masked
def test_nearest_groups(dtype, num_tokens, masked):
    batch, dim = 3, 37
    mask, protect = masks_of(batch, num_tokens, masked)
    valid = fill(mask, (batch, num_tokens), True)
    alone = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, ::7] = tokens[:, :1]  # ties, and anchors that have twins
    tokens[:, 3::9] = 0
    rng = np.random.default_rng(2)
    counts = counts_of(valid, alone, 0.3)
    anchors = np.full((batch, max(counts.max(), 1)), -1)
    for b in range(batch):
        free = rng.permutation(np.flatnonzero(valid[b] & ~alone[b]))
        chosen = np.concatenate((np.flatnonzero(alone[b]), free))[: counts[b]]
        anchors[b, : counts[b]] = rng.permutation(chosen)
    got = nearest_groups_cuda(tokens, anchors, None, mask, protect)
    assert got.dtype == np.int32
    for b in range(batch):
        x, chosen = unit(tokens[b]), np.sort(anchors[b, : counts[b]])
        free = chosen[~alone[b, chosen]]
        for i in range(num_tokens):
            if not valid[b, i]:
                assert got[b, i] == -1
            elif i in chosen:
                assert got[b, i] == i
            else:
                similarity = x[free] @ x[i]
                assert got[b, i] in free
                at = similarity[np.searchsorted(free, got[b, i])]
                assert at >= similarity.max() - 1e-6
                if (tokens[b, i] == 0).all():  # as similar to all: the earliest
                    assert got[b, i] == free[0]
                twins = free[(free % 7 == 0) & x[free].any(-1)]
                if i % 7 == 0 and x[i].any() and twins.size:
                    assert got[b, i] == twins[0]
    each = counts.astype(np.int32)
    again = nearest_groups_cuda(tokens, np.maximum(anchors, 0), each, mask, protect)
    np.testing.assert_array_equal(again, got)
    one = (None if m is None else m[0] for m in (mask, protect))
    one = nearest_groups_cuda(tokens[0], anchors[0], None, *one)
    np.testing.assert_array_equal(one, got[0])


@dtypes
@sizes
@masked
def test_default_anchors(dtype, num_tokens, masked):
    mask, protect = masks_of(3, num_tokens, masked)
    valid = fill(mask, (3, num_tokens), True)
    alone = fill(protect, valid.shape, False) & valid
    tokens = random((3, num_tokens, 6), dtype)
    tokens[:, 1::3] = tokens[:, :1]  # of equal norms the earlier
    counts = counts_of(valid, alone, 0.4)
    got = top_norm_anchors_cuda(tokens, *given(counts), mask, protect)
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    norms[:, 1::3] = norms[:, :1]
    norms = np.where(alone, np.inf, np.where(valid, norms, -np.inf))
    for b in range(3):
        wanted = np.sort(np.argsort(-norms[b], stable=True)[: counts[b]])
        np.testing.assert_array_equal(got[b, : counts[b]], wanted)
        assert (got[b, counts[b] :] == -1).all()


def bipartite(x, num_groups):
    """Return a root for each token of ToMe's matching, repeated."""
    groups = [[i] for i in range(len(x))]
    while len(groups) > max(num_groups, 1):
        mean = unit(np.stack([x[g].sum(0) for g in groups]))
        similarity = mean[::2] @ mean[1::2].T
        merges = min(len(groups) - num_groups, len(groups) // 2)
        for even in np.argsort(-similarity.max(-1), stable=True)[:merges]:
            groups[2 * similarity[even].argmax() + 1] += groups[2 * even]
            groups[2 * even] = None
        groups = sorted((g for g in groups if g), key=max)
    roots = np.empty(len(x), int)
    for k, group in enumerate(groups):
        roots[group] = k
    return roots


def contiguous(x, alone, num_groups):
    """Return a root for each token of the cheapest neighbours, merged one by one."""
    zero = ~x.any(-1)
    x = np.concatenate((x, np.eye(len(x))[:, zero]), axis=-1)
    groups = [[i] for i in range(len(x))]

    def cost(a, b):
        if alone[a[0]] or alone[b[0]]:
            return np.inf
        gap = x[a].mean(0) - x[b].mean(0)
        return len(a) * len(b) / (len(a) + len(b)) * (gap @ gap)

    costs = [cost(a, b) for a, b in zip(groups[:-1], groups[1:], strict=True)]
    while len(groups) > num_groups and min(costs, default=np.inf) < np.inf:
        a = int(np.argmin(costs))
        groups[a] += groups.pop(a + 1)
        del costs[a]
        if a < len(costs):
            costs[a] = cost(groups[a], groups[a + 1])
        if a > 0:
            costs[a - 1] = cost(groups[a - 1], groups[a])
    return np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def matched(method, x, valid, alone, num_groups):
    """Return the labels of one sequence by either of the two."""
    roots, x = np.full(len(x), -1), unit(x)
    if method == "contiguous":
        roots[valid] = contiguous(x[valid], alone[valid], num_groups)
        return labels_of(roots, valid)
    free = valid & ~alone
    roots[free] = bipartite(x[free], num_groups - (valid & alone).sum())
    roots[alone] = len(x) + np.flatnonzero(alone)
    return labels_of(roots, valid)


MATCHINGS = {"bipartite": bipartite_groups_cuda, "contiguous": contiguous_groups_cuda}
matchings = pytest.mark.parametrize("method", MATCHINGS)


@dtypes
@sizes
@masked
@matchings
def test_matching(method, dtype, num_tokens, masked):
    batch, dim = 3, 32 if num_tokens % 2 else 37
    mask, protect = masks_of(batch, num_tokens, masked)
    valid = fill(mask, (batch, num_tokens), True)
    alone = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, 1:] += tokens[:, :-1] // 2
    for share in SHARES:
        counts = np.maximum(counts_of(valid, alone, share), 1)
        options = {"fewest": int(counts.min())} if method == "bipartite" else {}
        roots = MATCHINGS[method](tokens, *given(counts), mask, protect, **options)
        assert roots.dtype == np.int32
        got = number_groups_cuda(roots, "last")
        for b in range(batch):
            wanted = matched(method, tokens[b], valid[b], alone[b], counts[b])
            np.testing.assert_array_equal(got[b], wanted)
    one = (None if m is None else m[0] for m in (mask, protect))
    one = MATCHINGS[method](tokens[0], None, int(counts[0]), *one)
    np.testing.assert_array_equal(number_groups_cuda(one, "last"), got[0])


@matchings
def test_matching_of_opposite_tokens(method):
    """Few groups, of few dimensions, may have no partner that is like them at all."""
    rng = np.random.default_rng(6)
    tokens = rng.standard_normal((60, 9, 2)).astype(np.float32)
    valid = rng.random((60, 9)) < 0.5
    valid[:, :3] = True
    roots = MATCHINGS[method](tokens, *given(np.full(60, 2)), valid, None)
    got, nobody = number_groups_cuda(roots, "last"), np.zeros(9, np.bool_)
    for b in range(60):
        wanted = matched(method, tokens[b], valid[b], nobody, 2)
        np.testing.assert_array_equal(got[b], wanted)


@dtypes
@matchings
def test_matching_of_equal_and_zero_tokens(method, dtype):
    """Unit axes, whose products are exact: ties go to the left."""
    tokens = np.zeros((3, 65, 9), dtype)
    tokens[0, :, 4] = 1
    tokens[1, np.arange(65), np.arange(65) % 9] = 4
    tokens[1, ::4] = 0
    for counts in ([33, 33, 33], [40, 64, 65]):
        options = {"fewest": 40} if method == "bipartite" else {}
        roots = MATCHINGS[method](tokens, *given(counts), **options)
        got = number_groups_cuda(roots, "last")
        for b in (0, 2) if method == "contiguous" else (0, 1, 2):
            everyone = np.ones(65, np.bool_)
            wanted = matched(method, tokens[b], everyone, ~everyone, counts[b])
            if b == 0 or method == "bipartite":
                np.testing.assert_array_equal(got[b], wanted)
            assert got[b].max() + 1 == counts[b]


@dtypes
def test_the_first_bipartite_step_compares_tokens_in_their_own_dtype(
    dtype, monkeypatch
):
    """16-bit tokens go to tensor cores; unit tokens and means are wider."""
    seen = []

    def note(launch):
        name = whatever_shape(launch.kernel)
        if name in ("nearest_anchors", "unit_tokens"):
            seen.append((name, launch.dtype))

    monkeypatch.setattr(cuda, "launch", recording(note))
    tokens = random((1, 40, 8), dtype)
    own, wide = np.dtype(dtype), cuda.accumulation_dtype(dtype)
    for num_groups, steps in ((30, 1), (20, 1), (6, 3)):
        seen.clear()
        bipartite_groups_cuda(tokens, None, num_groups)
        names = [own.name, *[wide.name] * (steps - 1)]
        products = [("nearest_anchors", name) for name in names]
        late = own.itemsize == 2  # then one step alone needs no unit tokens
        if not late or steps > 1:
            products.insert(int(late), ("unit_tokens", own.name))
        assert seen == products


@matchings
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matching_of_a_long_sequence(method, dtype):
    """Longer than a block, and in double than what shared memory holds."""
    num_tokens = LONG[-1]
    x = random((2, num_tokens, 4), dtype)
    x[1, num_tokens // 2 :] = x[1, num_tokens // 2]
    num_groups = num_tokens - min(num_tokens // 3, 60)
    got = number_groups_cuda(MATCHINGS[method](x, None, num_groups), "last")
    everyone = np.ones(num_tokens, np.bool_)
    wanted = matched(method, x[0], everyone, ~everyone, num_groups)
    np.testing.assert_array_equal(got[0], wanted)
    assert got[1].max() + 1 == num_groups


def test_neighbours_of_a_long_sequence_that_cost_the_same_merge_from_the_left():
    num_tokens, merges = LONG[-1], 20
    tokens = np.zeros((1, num_tokens, 4), np.float32)
    tokens[..., 1] = 1
    roots = contiguous_groups_cuda(tokens, None, num_tokens - merges)
    wanted = np.maximum(np.arange(num_tokens) - merges, 0)
    np.testing.assert_array_equal(number_groups_cuda(roots, "last"), [wanted])


@matchings
def test_matching_of_large_and_small_tokens(method):
    """Directions count: neither squares that overflow nor ones that vanish."""
    tokens = random((1, 33, 8), np.float32)
    scale = np.resize(np.float32([1e30, 1e-30, 1]), 33)[:, None]
    wanted = MATCHINGS[method](tokens, None, 9)
    np.testing.assert_array_equal(MATCHINGS[method](tokens * scale, None, 9), wanted)


def test_protected_tokens_part_what_is_contiguous():
    """Where K cannot be reached there are more groups, none across a protected one."""
    tokens, protect = random((1, 7, 3), np.float32), np.zeros((1, 7), np.bool_)
    protect[0, [2, 3]] = True
    mask = np.array([[True, True, True, True, False, True, True]])
    roots = contiguous_groups_cuda(tokens, None, 1, mask, protect)
    labels = number_groups_cuda(roots, "first")
    np.testing.assert_array_equal(labels, [[0, 0, 1, 2, -1, 3, 3]])


@dtypes
def test_wild_values_stay_within_the_arrays(dtype):
    batch, num_tokens = 4, 67
    mask, protect = masks_of(batch, num_tokens)
    tokens = random((batch, num_tokens, 9), dtype)
    tokens[1, 3:40:3] = np.nan
    tokens[2] = np.inf
    tokens[2, 5, 2] = np.nan
    wild = np.array([-(2**31), 2**31 - 1, 0, 50], np.int32)
    every = np.ones_like(mask)
    all_masks = (mask, protect), (None, None), (mask, every), (None, every)
    all_counts = (wild, 40), (None, 1), (None, 10**9), (None, 0)
    for masks in all_masks:
        for counts, most in all_counts:
            for match in MATCHINGS.values():
                labels = number_groups_cuda(match(tokens, counts, most, *masks), "last")
                assert labels.max() < num_tokens
        top = top_norm_anchors_cuda(tokens, wild, 40, *masks)
        assert top.min() >= -1
        assert top.max() < num_tokens
        rng = np.random.default_rng(3)
        anchors = rng.choice([-(2**31), -1, 2**31 - 1, 67, 66, 0, 5, 5], (batch, 40))
        for counts in (wild, None):
            roots = nearest_groups_cuda(tokens, anchors, counts, *masks)
            assert roots.min() >= -1
            assert roots.max() < num_tokens


@dtypes
@sizes
def test_similarity_with_the_nearest_anchor(dtype, num_tokens):
    tokens, anchors = random((2, num_tokens, 37), dtype), random((2, 129, 37), dtype, 1)
    tokens[:, num_tokens // 2], anchors[:, 4] = 0, 0
    mask, _ = masks_of(2, num_tokens)
    counts = np.array([129, 70], np.int32)
    norms = np.linalg.norm(anchors.astype(np.float64), axis=-1)
    norms = norms.astype(cuda.accumulation_dtype(dtype))
    norms[:, ::3] = -1  # these are none
    got, similarity = nearest_anchors_cuda(
        tokens, anchors, counts, mask, norms, similarity=True
    )
    wanted = np.matmul(unit(tokens), np.swapaxes(unit(anchors), -1, -2))
    wanted[norms[:, None] * np.ones(wanted.shape) < 0] = -np.inf
    wanted[1, :, 70:] = -np.inf
    tolerance = 1e-12 if dtype == np.float64 else 2e-6
    best = np.where(mask, wanted.max(-1), -np.inf)
    np.testing.assert_allclose(similarity, best, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(got == -1, ~mask)
    at = np.take_along_axis(wanted, np.maximum(got, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(at[mask], best[mask], rtol=0, atol=tolerance)
    none = np.full_like(norms, -1)
    got, similarity = nearest_anchors_cuda(
        tokens, anchors, None, None, none, similarity=True
    )
    assert (got == -1).all()
    assert (similarity == -np.inf).all()


@dtypes
def test_a_token_that_is_not_a_number_has_the_first_anchor(dtype):
    tokens, anchors = random((1, 33, 9), dtype), random((1, 4, 9), dtype, 1)
    wanted, _ = nearest_anchors_cuda(tokens, anchors)
    tokens[0, 5], wanted[0, 5] = np.nan, 0
    got, _ = nearest_anchors_cuda(tokens, anchors)
    np.testing.assert_array_equal(got, wanted)


def test_empty_batches_launch_nothing():
    tokens = np.zeros((0, 5, 3), np.float32)
    for match in MATCHINGS.values():
        assert match(tokens, None, 2).shape == (0, 5)
    assert nearest_groups_cuda(tokens, np.zeros((0, 2), int)).shape == (0, 5)
    assert top_norm_anchors_cuda(tokens, None, 2).shape == (0, 2)
    assert number_groups_cuda(np.zeros((0, 5), int), "last").shape == (0, 5)
    assert cut_linkage_cuda(np.zeros((0, 4, 4)), None, 2).shape == (0, 5)
