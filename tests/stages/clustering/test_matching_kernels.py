"""The kernels of bipartite and contiguous groups, against the oracle.

An interpreter runs the kernels on the CPU. A root is the number of a token's group
before the groups are numbered 0..K-1.
"""

import numpy as np
import oracle_arrays
import pytest
from grouping_cases import (
    LONG,
    counts_of,
    fill,
    kernel_counts,
    labels_of,
    masks_of,
    sizes,
)
from kernel_cases import dtypes, masked, random, without_shape
from recorded import recording
from seam import cuda

from qm_cupy.stages.clustering.bipartite import bipartite_groups_cuda
from qm_cupy.stages.clustering.contiguous import contiguous_groups_cuda
from qm_cupy.stages.clustering.cut_linkage import cut_linkage_cuda
from qm_cupy.stages.clustering.labels import number_groups_cuda
from qm_cupy.stages.clustering.nearest import nearest_groups_cuda, top_norm_anchors_cuda

pytestmark = pytest.mark.usefixtures("kernels")

FRACTIONS = [0.0, 0.3, 0.8, 1.0]  # groups to keep, as a fraction of the tokens

MATCHINGS = {"bipartite": bipartite_groups_cuda, "contiguous": contiguous_groups_cuda}
matchings = pytest.mark.parametrize("method", MATCHINGS)


def matched(method, x, valid, protected, num_groups):
    """Return the labels of one sequence by the oracle of a method."""
    roots, free = np.full(len(x), -1), valid
    if method == "contiguous":
        cuts = np.flatnonzero(protected[valid])
        groups = oracle_arrays.contiguous(x[valid], num_groups, cuts)
    else:
        # Protected tokens do not merge. Their roots are numbers that no group has.
        free = valid & ~protected
        roots[protected] = len(x) + np.flatnonzero(protected)
        num_groups -= (valid & protected).sum()
        groups = oracle_arrays.bipartite(x[free], num_groups)
    position = np.flatnonzero(free)
    for k, group in enumerate(groups):
        roots[position[group]] = k
    return labels_of(roots, valid)


@dtypes
@sizes
@masked
@matchings
def test_matching(method, dtype, num_tokens, masked):
    batch, dim = 3, 32 if num_tokens % 2 else 37
    mask, protect = masks_of(batch, num_tokens, masked)
    valid = fill(mask, (batch, num_tokens), True)
    protected = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    # Neighbours are similar, so that the contiguous groups are clear.
    tokens[:, 1:] += tokens[:, :-1] // 2
    for fraction in FRACTIONS:
        counts = np.maximum(counts_of(valid, protected, fraction), 1)
        # The smallest K determines how many steps the launcher makes.
        options = {"fewest": int(counts.min())} if method == "bipartite" else {}
        roots = MATCHINGS[method](
            tokens, *kernel_counts(counts), mask, protect, **options
        )
        assert roots.dtype == np.int32
        got = number_groups_cuda(roots, "last")
        for b in range(batch):
            wanted = matched(method, tokens[b], valid[b], protected[b], counts[b])
            np.testing.assert_array_equal(got[b], wanted)
    sequence_masks = (None if m is None else m[0] for m in (mask, protect))
    sequence_masks = MATCHINGS[method](tokens[0], None, int(counts[0]), *sequence_masks)
    np.testing.assert_array_equal(number_groups_cuda(sequence_masks, "last"), got[0])


@dtypes
@sizes
@masked
def test_contiguous_groups_within_a_distance(dtype, num_tokens, masked):
    batch, dim = 3, 32 if num_tokens % 2 else 37
    mask, protect = masks_of(batch, num_tokens, masked)
    valid = fill(mask, (batch, num_tokens), True)
    protected = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, 1:] += tokens[:, :-1] // 2  # neighbours are similar
    for distance in (0.5, 1.0, 1.4, 1.9, np.inf):
        roots = contiguous_groups_cuda(
            tokens, None, 1, mask, protect, max_distance=distance
        )
        got = number_groups_cuda(roots, "last")
        for b in range(batch):
            groups = oracle_arrays.contiguous(
                tokens[b][valid[b]],
                1,
                np.flatnonzero(protected[b][valid[b]]),
                max_distance=distance,
            )
            wanted = np.full(num_tokens, -1)
            for k, group in enumerate(groups):
                wanted[np.flatnonzero(valid[b])[group]] = k
            np.testing.assert_array_equal(got[b], wanted)


def test_contiguous_groups_at_exactly_the_distance():
    """Neighbours are orthogonal, so that their distance is √2, or equal."""
    tokens = np.eye(4, dtype=np.float32)[None, [0, 1, 1, 2, 3]]
    below = np.nextafter(np.sqrt(2), 0)
    for distance, wanted in (
        (0.0, [0, 1, 1, 2, 3]),
        (below, [0, 1, 1, 2, 3]),
        # 2 and 3 merge at √2. The next pair is 0 and {1, 1}: √(2 · 2/3 · 2) = 1.633.
        # The last merge is at the smaller distance √(2 · 6/5 · 19/18) = 1.59.
        (np.sqrt(2), [0, 1, 1, 2, 2]),
        (1.63, [0, 1, 1, 2, 2]),
        (1.64, [0, 0, 0, 0, 0]),
        (np.inf, [0, 0, 0, 0, 0]),
    ):
        roots = contiguous_groups_cuda(tokens, None, 1, max_distance=distance)
        np.testing.assert_array_equal(number_groups_cuda(roots, "last"), [wanted])


def test_contiguous_groups_of_many_equal_tokens_have_distance_zero():
    tokens = np.repeat(random((2, 24), np.float32), [150, 107], axis=0)[None]
    for metric in ("cosine", "euclidean"):
        options = {"metric": metric, "max_distance": 0.0}
        roots = contiguous_groups_cuda(tokens, None, 1, **options)
        wanted = np.repeat([0, 1], [150, 107])
        np.testing.assert_array_equal(number_groups_cuda(roots, "last"), [wanted])


@matchings
def test_matching_of_opposite_tokens(method):
    """In two dimensions, the most similar partner may have a negative similarity."""
    rng = np.random.default_rng(6)
    tokens = rng.standard_normal((60, 9, 2)).astype(np.float32)
    valid = rng.random((60, 9)) < 0.5
    valid[:, :3] = True
    roots = MATCHINGS[method](tokens, *kernel_counts(np.full(60, 2)), valid, None)
    got, none_protected = number_groups_cuda(roots, "last"), np.zeros(9, np.bool_)
    for b in range(60):
        wanted = matched(method, tokens[b], valid[b], none_protected, 2)
        np.testing.assert_array_equal(got[b], wanted)


@dtypes
@matchings
def test_matching_of_equal_and_zero_tokens(method, dtype):
    """Tokens lie on the axes, so that products are exact. Ties go to the left.

    In some cases only the number of groups is compared.
    """
    tokens = np.zeros((3, 65, 9), dtype)
    # Sequence 0: equal tokens. 1: nine axes in turn, but every fourth token is zero.
    # 2: only zeros.
    tokens[0, :, 4] = 1
    tokens[1, np.arange(65), np.arange(65) % 9] = 4
    tokens[1, ::4] = 0
    for counts in ([33, 33, 33], [40, 64, 65]):
        options = {"fewest": 40} if method == "bipartite" else {}
        roots = MATCHINGS[method](tokens, *kernel_counts(counts), **options)
        got = number_groups_cuda(roots, "last")
        for b in (0, 2) if method == "contiguous" else (0, 1, 2):
            all_valid = np.ones(65, np.bool_)
            wanted = matched(method, tokens[b], all_valid, ~all_valid, counts[b])
            if b == 0 or method == "bipartite":
                np.testing.assert_array_equal(got[b], wanted)
            assert got[b].max() + 1 == counts[b]  # exactly K groups


@dtypes
def test_the_first_bipartite_step_compares_tokens_in_their_own_dtype(
    dtype, monkeypatch
):
    """16-bit tokens go to tensor cores; unit tokens and means have a wider dtype.

    `launches` records the dtypes of two kernels, in the order of their launches.
    """
    launches = []

    def record(launch):
        name = without_shape(launch.kernel)
        if name in ("nearest_anchors", "unit_tokens"):
            launches.append((name, launch.dtype))

    monkeypatch.setattr(cuda, "launch", recording(record))
    tokens = random((1, 40, 8), dtype)
    own, acc_dtype = np.dtype(dtype), cuda.accumulation_dtype(dtype)
    for num_groups, steps in ((30, 1), (20, 1), (6, 3)):
        launches.clear()
        bipartite_groups_cuda(tokens, None, num_groups)
        # The first step compares tokens, later steps compare means of unit tokens.
        names = [own.name, *[acc_dtype.name] * (steps - 1)]
        products = [("nearest_anchors", name) for name in names]
        units_are_late = own.itemsize == 2  # computed after the first step
        if not units_are_late or steps > 1:
            products.insert(int(units_are_late), ("unit_tokens", own.name))
        assert launches == products


@matchings
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matching_of_a_long_sequence(method, dtype):
    """There are more tokens than threads of a block.

    In float64, the arrays of `contiguous` do not fit in shared memory either.
    """
    num_tokens = LONG[-1]
    x = random((2, num_tokens, 4), dtype)
    # Sequence 1 has many ties: only the number of its groups is compared.
    x[1, num_tokens // 2 :] = x[1, num_tokens // 2]
    num_groups = num_tokens - min(num_tokens // 3, 60)
    got = number_groups_cuda(MATCHINGS[method](x, None, num_groups), "last")
    all_valid = np.ones(num_tokens, np.bool_)
    wanted = matched(method, x[0], all_valid, ~all_valid, num_groups)
    np.testing.assert_array_equal(got[0], wanted)
    assert got[1].max() + 1 == num_groups


def test_neighbours_of_a_long_sequence_that_cost_the_same_merge_from_the_left():
    num_tokens, merges = LONG[-1], 20
    # All tokens are equal, so each merge costs 0, and the leftmost pair merges first:
    # the first group takes all merged tokens.
    tokens = np.zeros((1, num_tokens, 4), np.float32)
    tokens[..., 1] = 1
    roots = contiguous_groups_cuda(tokens, None, num_tokens - merges)
    wanted = np.maximum(np.arange(num_tokens) - merges, 0)
    np.testing.assert_array_equal(number_groups_cuda(roots, "last"), [wanted])


@matchings
def test_matching_of_large_and_small_tokens(method):
    """The groups depend only on directions: no square may overflow or become 0."""
    tokens = random((1, 33, 8), np.float32)
    scale = np.resize(np.float32([1e30, 1e-30, 1]), 33)[:, None]
    wanted = MATCHINGS[method](tokens, None, 9)
    np.testing.assert_array_equal(MATCHINGS[method](tokens * scale, None, 9), wanted)


def test_protected_tokens_separate_contiguous_groups():
    """If K is too small, there are more groups, and no group spans a protected token.

    The public function would raise an error. The launcher does not check `protect`.
    """
    tokens, protect = random((1, 7, 3), np.float32), np.zeros((1, 7), np.bool_)
    protect[0, [2, 3]] = True
    mask = np.array([[True, True, True, True, False, True, True]])
    roots = contiguous_groups_cuda(tokens, None, 1, mask, protect)
    labels = number_groups_cuda(roots, "first")
    # The groups are {0, 1}, {2}, {3} and {5, 6}: 4 groups instead of 1.
    np.testing.assert_array_equal(labels, [[0, 0, 1, 2, -1, 3, 3]])


@dtypes
def test_wrong_values_give_roots_within_the_arrays(dtype):
    batch, num_tokens = 4, 67
    mask, protect = masks_of(batch, num_tokens)
    tokens = random((batch, num_tokens, 9), dtype)
    tokens[1, 3:40:3] = np.nan
    tokens[2] = np.inf
    tokens[2, 5, 2] = np.nan
    # Counts that are out of range, and masks that protect every token.
    wrong_counts = np.array([-(2**31), 2**31 - 1, 0, 50], np.int32)
    all_protected = np.ones_like(mask)
    all_masks = (
        (mask, protect),
        (None, None),
        (mask, all_protected),
        (None, all_protected),
    )
    all_counts = (wrong_counts, 40), (None, 1), (None, 10**9), (None, 0)
    for masks in all_masks:
        for counts, max_groups in all_counts:
            for match in MATCHINGS.values():
                labels = number_groups_cuda(
                    match(tokens, counts, max_groups, *masks), "last"
                )
                assert labels.max() < num_tokens
        # Default anchors are positions of tokens, or -1. Wrong anchors of the caller
        # must not give wrong roots.
        default_anchors = top_norm_anchors_cuda(tokens, wrong_counts, 40, *masks)
        assert default_anchors.min() >= -1
        assert default_anchors.max() < num_tokens
        rng = np.random.default_rng(3)
        anchors = rng.choice([-(2**31), -1, 2**31 - 1, 67, 66, 0, 5, 5], (batch, 40))
        for counts in (wrong_counts, None):
            roots = nearest_groups_cuda(tokens, anchors, counts, *masks)
            assert roots.min() >= -1
            assert roots.max() < num_tokens


def test_empty_batches_launch_nothing():
    tokens = np.zeros((0, 5, 3), np.float32)
    for match in MATCHINGS.values():
        assert match(tokens, None, 2).shape == (0, 5)
    assert nearest_groups_cuda(tokens, np.zeros((0, 2), int)).shape == (0, 5)
    assert top_norm_anchors_cuda(tokens, None, 2).shape == (0, 2)
    assert number_groups_cuda(np.zeros((0, 5), int), "last").shape == (0, 5)
    assert cut_linkage_cuda(np.zeros((0, 4, 4)), None, 2).shape == (0, 5)
