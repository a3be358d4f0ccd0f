"""Limits instead of K: `max_error` and `max_distance` of `cluster_tokens`."""

import numpy as np
import oracle
import oracle_arrays
import pytest
from clustering_cases import WEIGHTED, groups_of, masses, ragged_mask

import qm_cupy as qm
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.metrics import METRICS

metrics = pytest.mark.parametrize("metric", METRICS)


def ward(tokens, **options):
    return qm.cluster_tokens(tokens, method="ward", **options)


def error_of(tokens, labels, mass, metric):
    """Return the squared error of labels (N,), with mass on average; -1 is padding."""
    x = oracle_arrays.unit(tokens) if metric == "cosine" else tokens
    total = 0.0
    for k in range(labels.max() + 1):
        members, weight = x[labels == k], mass[labels == k]
        mean = weight @ members / weight.sum()
        total += weight @ ((members - mean) ** 2).sum(-1)
    return total / mass[labels >= 0].sum()


class TestMaxError:
    @metrics
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_holds_and_one_group_fewer_exceeds_it(
        self, rng, max_error, weighted, metric
    ):
        tokens, mask = rng.standard_normal((4, 30, 6)), ragged_mask(rng, 4, 30)
        mass = masses(rng, (4, 30)) if weighted else None
        weight = np.ones((4, 30)) if mass is None else mass
        protect = np.zeros((4, 30), bool)
        protect[1:, ::7] = True  # row 0 has no protected token
        options = {"metric": metric, "mass": mass, "mask": mask, "protect": protect}
        max_error *= 6 if metric == "euclidean" else 1  # the mean of |x|² is 6
        labels = ward(tokens, max_error=max_error, **options)
        counts = labels.max(axis=-1) + 1
        fewest = np.maximum((mask & protect).sum(-1) + (mask & ~protect).any(-1), 1)
        fewer = ward(tokens, num_groups=np.maximum(counts - 1, fewest), **options)
        same = ward(tokens, num_groups=counts, **options)
        np.testing.assert_array_equal(labels, same)
        for b in range(4):
            got = error_of(tokens[b], labels[b], weight[b], metric)
            assert got <= max_error + 1e-9
            if counts[b] > fewest[b]:
                assert error_of(tokens[b], fewer[b], weight[b], metric) > max_error

    def test_error_bound_by_hand(self):
        # Two orthogonal tokens have distance √2. Their merge adds (√2)² / 2 = 1 to the
        # squared error, which is 0.5 for each of the two tokens.
        tree = qm.linkage(np.eye(2), "ward")
        assert tree[0, 2] ** 2 / 2 > 1  # √2 is rounded up here
        np.testing.assert_array_equal(ward(np.eye(2), max_error=0.5), [0, 0])
        np.testing.assert_array_equal(ward(np.eye(2), max_error=0.499), [0, 1])

    def test_protected_tokens_count_in_the_divisor(self):
        # Tokens 0 and 2 are orthogonal: an error of 1, divided by 4 tokens.
        tokens = np.array([[1.0, 0], [1, 0], [0, 5], [1, 0]])
        protect = np.array([False, True, False, True])
        together, apart = [1, 0, 1, 2], [0, 1, 2, 3]
        for max_error, wanted in ((0.25, together), (0.2499, apart)):
            got = ward(tokens, max_error=max_error, protect=protect)
            np.testing.assert_array_equal(got, wanted)
        # With masses 1, 6, 1, 0 the sum is 8. Token 3 counts as a millionth.
        mass = np.array([1.0, 6, 1, 0])
        for max_error, wanted in ((0.125, together), (0.12499, apart)):
            got = ward(tokens, max_error=max_error, protect=protect, mass=mass)
            np.testing.assert_array_equal(got, wanted)
        # Padding does not count.
        mask = np.array([True, True, True, False])
        for max_error, wanted in ((0.3334, [1, 0, 1, -1]), (0.3333, [0, 1, 2, -1])):
            got = ward(tokens, max_error=max_error, protect=protect, mask=mask)
            np.testing.assert_array_equal(got, wanted)

    def test_only_protected_tokens(self):
        protect = np.ones(3, bool)
        for limit in ({"max_error": 1}, {"max_distance": 9}):
            got = ward(np.ones((3, 2)), protect=protect, **limit)
            np.testing.assert_array_equal(got, [0, 1, 2])

    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_masses_of_zero_count_as_a_millionth(self, rng, max_error):
        tokens, mass = rng.standard_normal((30, 6)), masses(rng, 30)
        mass[3] = 0
        labels = ward(tokens, max_error=max_error, mass=mass)
        error = oracle.weighted_error(tokens, groups_of(labels), mass)
        assert error <= max_error + 1e-9
        if labels.max() > 0:
            one_fewer = groups_of(ward(tokens, num_groups=labels.max(), mass=mass))
            assert oracle.weighted_error(tokens, one_fewer, mass) > max_error

    @pytest.mark.parametrize("scale", [1e-300, 1e-10, 1e10, 1e300])
    def test_the_scale_of_masses_does_not_matter(self, rng, scale):
        tokens, mass = rng.standard_normal((20, 4)), masses(rng, 20)
        protect = np.arange(20) == 5
        wanted = ward(tokens, max_error=0.3, mass=mass, protect=protect)
        got = ward(tokens, max_error=0.3, mass=mass * scale, protect=protect)
        np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("scale", [1e-200, 1e-7, 1e7, 1e200])
    def test_error_has_no_unit_of_its_own(self, scale):
        """A fixed tolerance for rounding would merge small tokens."""
        tokens = np.random.default_rng(1).standard_normal((12, 3))
        tree = qm.linkage(tokens, "ward", metric="euclidean")
        errors = np.cumsum(tree[:, 2] ** 2 / 2) / 12
        for num_groups in (12, 9, 4, 1):
            bound = 0 if num_groups == 12 else errors[11 - num_groups] * (1 + 1e-6)
            labels = ward(tokens, max_error=bound, metric="euclidean")
            assert labels.max() + 1 == num_groups
            if scale in (1e-7, 1e7):  # the square of the others is not a float64
                labels = ward(
                    tokens * scale, max_error=bound * scale**2, metric="euclidean"
                )
                assert labels.max() + 1 == num_groups
        labels = ward(tokens * scale, max_error=0, metric="euclidean")
        assert labels.max() + 1 == 12


class TestMaxDistance:
    @metrics
    @pytest.mark.parametrize("method", LINKAGES)
    def test_dendrograms_are_cut_at_the_distance(self, rng, method, metric):
        tokens, mask = rng.standard_normal((4, 14, 3)), ragged_mask(rng, 4, 14)
        options = {"method": method, "metric": metric}
        if method in WEIGHTED:
            options["mass"] = masses(rng, (4, 14))
        tree = qm.linkage(tokens, **options, mask=mask)
        heights = tree[0, :, 2]
        for distance in (0, *heights[[0, 6, 12]], heights[:2].mean(), np.inf):
            got = qm.cluster_tokens(tokens, max_distance=distance, mask=mask, **options)
            wanted = qm.cut_linkage(tree, max_distance=distance, mask=mask)
            np.testing.assert_array_equal(got, wanted)

    @metrics
    @pytest.mark.parametrize("method", [*LINKAGES, "contiguous"])
    def test_protected_tokens_stay_alone(self, rng, method, metric):
        tokens = rng.standard_normal((12, 3))
        protect = np.isin(np.arange(12), [0, 1, 11])
        options = {"method": method, "metric": metric}
        for distance in (0, 0.8, 1.5, np.inf):
            got = qm.cluster_tokens(
                tokens, max_distance=distance, protect=protect, **options
            )
            free = qm.cluster_tokens(tokens[~protect], max_distance=distance, **options)
            # The protected tokens are at both ends, so that the others keep their order
            # and, for "contiguous", their neighbours.
            wanted = np.concatenate([[0, 1], free + 2, [free.max() + 3]])
            np.testing.assert_array_equal(got, wanted)

    @metrics
    def test_contiguous_groups_against_brute_force(self, rng, metric):
        for _ in range(20):
            tokens = np.cumsum(rng.standard_normal((13, 2)), axis=0)
            mask, protected = rng.random(13) < 0.8, rng.random(13) < 0.15
            if not mask.any():
                continue
            x = oracle_arrays.unit(tokens) if metric == "cosine" else tokens
            for distance in (0, *rng.uniform(0, 3, 4), np.inf):
                got = qm.cluster_tokens(
                    tokens,
                    max_distance=distance,
                    method="contiguous",
                    metric=metric,
                    mask=mask,
                    protect=protected,
                )
                wanted = contiguous_within(x[mask], distance, protected[mask])
                assert groups_of(got[mask]) == wanted
                assert (got[~mask] == -1).all()

    def test_contiguous_groups_by_hand(self):
        # Tokens on a line. 0 and 1 merge at distance 1. The distance of {0, 1} and 3 is
        # √(2 · 2 · 1 / 3) · 2.5 = 2.887: its square is 25/3.
        tokens = np.array([[0.0], [1.0], [3.0], [2.0]])
        protect = np.arange(4) == 3
        for distance, wanted in (
            (0, [0, 1, 2, 3]),
            (np.nextafter(1, 0), [0, 1, 2, 3]),
            (1, [0, 0, 1, 2]),
            (2.88, [0, 0, 1, 2]),
            (2.89, [0, 0, 0, 1]),
            (np.inf, [0, 0, 0, 1]),
        ):
            for scale in (1, 2.0**-900, 2.0**900):
                got = qm.cluster_tokens(
                    tokens * scale,
                    max_distance=distance * scale,
                    method="contiguous",
                    metric="euclidean",
                    protect=protect,
                )
                np.testing.assert_array_equal(got, wanted)

    @metrics
    @pytest.mark.parametrize("method", [*LINKAGES, "contiguous"])
    def test_equal_tokens_merge_at_distance_zero(self, rng, method, metric):
        tokens = np.repeat(rng.standard_normal((3, 40)), [700, 1, 500], axis=0)
        got = qm.cluster_tokens(tokens, max_distance=0, method=method, metric=metric)
        np.testing.assert_array_equal(got, np.repeat([0, 1, 2], [700, 1, 500]))

    @pytest.mark.parametrize("method", [*LINKAGES, "contiguous"])
    def test_each_sequence_has_its_own_k(self, rng, method):
        tokens = np.stack([np.ones((6, 4)), rng.standard_normal((6, 4))])
        got = qm.cluster_tokens(tokens, max_distance=1e-3, method=method)
        np.testing.assert_array_equal(got, [[0] * 6, np.arange(6)])
        empty = qm.cluster_tokens(tokens[:0], max_distance=1, method=method)
        assert empty.shape == (0, 6)


def contiguous_within(x, max_distance, protected):
    """Merge the nearest neighbours while √(2 · ward's cost) is at most the distance."""
    groups = [[i] for i in range(len(x))]
    while len(groups) > 1:
        distances = []
        for a, b in zip(groups[:-1], groups[1:], strict=True):
            factor = 2 * len(a) * len(b) / (len(a) + len(b))
            gap = x[a].mean(axis=0) - x[b].mean(axis=0)
            alone = protected[a].any() or protected[b].any()
            distances.append(np.nan if alone else np.sqrt(factor * (gap @ gap)))
        if np.isnan(distances).all() or np.nanmin(distances) > max_distance:
            break
        left = int(np.nanargmin(distances))
        groups[left : left + 2] = [groups[left] + groups[left + 1]]
    return groups


class TestArguments:
    def test_numbers_of_any_real_type(self, rng):
        tokens = rng.standard_normal((12, 4))
        for one in (1, np.float32(1), np.int8(1), np.array(1.0), np.array(1)):
            for name, method in (("max_error", "ward"), ("max_distance", "average")):
                got = qm.cluster_tokens(tokens, method=method, **{name: one})
                wanted = qm.cluster_tokens(tokens, method=method, **{name: 1.0})
                np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("name", ["max_error", "max_distance"])
    def test_wrong_limits(self, rng, name):
        tokens = rng.standard_normal((12, 4))
        for wrong in (-1, -1e-300, np.nan, np.float32(-0.5)):
            with pytest.raises(ValueError, match=f"`{name}` must lie in"):
                ward(tokens, **{name: wrong})
        for wrong in ("0.1", True, np.array([0.1]), np.array(True), 1j):
            with pytest.raises(TypeError, match=f"`{name}` must be a number"):
                ward(tokens, **{name: wrong})

    def test_exactly_one_of_three(self, rng):
        tokens = rng.standard_normal((12, 4))
        three = "exactly one of `num_groups`, `max_error` and `max_distance`, got "
        for options, got in (
            ({}, "none"),
            ({"num_groups": 2, "max_error": 1}, "`num_groups` and `max_error`"),
            ({"max_distance": 2, "max_error": 1}, "`max_error` and `max_distance`"),
        ):
            with pytest.raises(ValueError, match=three + got):
                ward(tokens, **options)

    @pytest.mark.parametrize(
        "method", ["average", "complete", "single", "contiguous", "nearest"]
    )
    def test_max_error_is_for_ward(self, rng, method):
        with pytest.raises(
            ValueError, match=r"`max_error` is for .*ward.*`num_groups`"
        ):
            qm.cluster_tokens(rng.standard_normal((9, 4)), max_error=1, method=method)

    @pytest.mark.parametrize("method", ["nearest", "bipartite"])
    def test_methods_that_need_k(self, rng, method):
        with pytest.raises(ValueError, match=f'is not for method="{method}".*num_gr'):
            qm.cluster_tokens(
                rng.standard_normal((9, 4)), max_distance=1, method=method
            )
