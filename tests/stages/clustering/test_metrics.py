"""Groups and dendrograms by Euclidean distance, against SciPy and the oracle."""

import numpy as np
import oracle
import pytest
from clustering_cases import WEIGHTED, groups_of, masses
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.metrics import (
    METRICS,
    half_squared_distances,
    metric_vectors,
)

euclidean = {"metric": "euclidean"}


def tokens_of(*shape, seed=0):
    """Tokens of very different lengths, so that cosines would give other groups."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * rng.lognormal(size=(*shape[:-1], 1))


class TestLinkage:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_is_that_of_scipy(self, method):
        tokens = tokens_of(3, 40, 6)
        trees = qm.linkage(tokens, method, **euclidean)
        for tree, x in zip(trees, tokens, strict=True):
            wanted = hierarchy.linkage(pdist(x), method)
            np.testing.assert_array_equal(tree[:, [0, 1, 3]], wanted[:, [0, 1, 3]])
            np.testing.assert_allclose(tree[:, 2], wanted[:, 2], rtol=1e-12)

    def test_by_hand(self):
        # 0 and 3 merge at distance 3; their mean 1.5 has distance 8.5 from 10.
        tokens = np.array([[0.0], [3.0], [10.0]])
        heights = {
            "single": [3, 7],
            "complete": [3, 10],
            "average": [3, 8.5],
            "ward": [3, 8.5 * np.sqrt(2 * 2 / 3)],
        }
        for method, wanted in heights.items():
            tree = qm.linkage(tokens, method, **euclidean)
            np.testing.assert_allclose(tree[:, 2], wanted)

    @pytest.mark.parametrize("method", LINKAGES)
    def test_a_common_offset_changes_nothing(self, method):
        tokens = tokens_of(30, 5)
        tree = qm.linkage(tokens, method, **euclidean)
        moved = qm.linkage(tokens + 1e6, method, **euclidean)
        # The offset rounds the tokens to multiples of 1e-10.
        np.testing.assert_allclose(moved[:, 2], tree[:, 2], rtol=1e-8)
        np.testing.assert_array_equal(moved[:, [0, 1, 3]], tree[:, [0, 1, 3]])

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_huge_and_tiny_tokens(self, scale):
        tokens = tokens_of(20, 4)
        tree = qm.linkage(tokens, "ward", **euclidean)
        scaled = qm.linkage(tokens * scale, "ward", **euclidean)
        np.testing.assert_allclose(scaled[:, 2], tree[:, 2] * scale, rtol=1e-12)

    @pytest.mark.parametrize("method", LINKAGES)
    def test_equal_tokens_have_distance_zero(self, method):
        tokens = np.repeat(tokens_of(5, 70), 7, axis=0) + 3
        tree = qm.linkage(tokens, method, **euclidean)
        assert (tree[:30, 2] == 0).all()
        assert (tree[30:, 2] > 0).all()
        assert (qm.linkage(np.ones((6, 3)), method, **euclidean)[:, 2] == 0).all()
        assert (qm.linkage(np.zeros((6, 3)), method, **euclidean)[:, 2] == 0).all()

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_masses_against_the_oracle(self, rng, method):
        tokens, mass = tokens_of(18, 4), masses(rng, (18,))
        merges = oracle.weighted_agglomerate(tokens, method, mass, "euclidean")
        tree = qm.linkage(tokens, method, mass=mass, **euclidean)
        heights = [height for _, _, height in merges]
        np.testing.assert_allclose(tree[:, 2], heights, rtol=1e-9)
        for num_groups in (2, 5, 11):
            labels = qm.cut_linkage(tree, num_groups=num_groups)
            assert groups_of(labels) == oracle.partition(merges, 18, num_groups)

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_distances_are_exactly_symmetric(self, method):
        """Otherwise neighbours can form a cycle, and no pair merges.

        The tokens are almost the corners of a simplex: all distances are nearly equal.
        """
        for seed in range(40):
            rng = np.random.default_rng(seed)
            dim = int(rng.integers(4, 24))
            x = rng.standard_normal(dim) + np.eye(dim) * 1e-5
            x = np.vstack([x, -x[:1]])
            for metric in METRICS:
                vectors, _ = metric_vectors(x, metric)
                distance = half_squared_distances(vectors, metric)
                np.testing.assert_array_equal(distance, distance.T)
            tree = qm.linkage(x, method, mass=np.ones(dim + 1), **euclidean)
            assert hierarchy.is_valid_linkage(tree)

    def test_an_outlier_leaves_distances_that_are_not_zero(self):
        tokens = np.array([[1e5], [0.0], [1.0], [3.0]])
        tree = qm.linkage(tokens, "average", **euclidean)
        np.testing.assert_allclose(tree[:2, 2], [1, 2.5], rtol=1e-4)

    def test_distances_beyond_float64(self):
        tokens = np.array([[1.7e308, 1.7e308], [-1.7e308, -1.7e308], [0, 0]])
        with pytest.raises(ValueError, match="`tokens` are too large"):
            qm.linkage(tokens, **euclidean)

    def test_mask(self):
        tokens = tokens_of(2, 12, 3)
        mask = np.arange(12) >= np.array([[0], [4]])
        tree = qm.linkage(tokens, "average", mask=mask, **euclidean)
        alone = qm.linkage(tokens[1, 4:], "average", **euclidean)
        np.testing.assert_array_equal(tree[1, :7, 2], alone[:, 2])

    def test_unknown_metric_lists_the_metrics(self):
        for call in (qm.linkage, lambda x, **o: qm.cluster_tokens(x, 1, **o)):
            with pytest.raises(ValueError, match=r'`metric` .*"cosine" or "euclidean"'):
                call(np.ones((3, 2)), metric="manhattan")


class TestClusterTokens:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_dendrograms_against_scipy(self, method):
        tokens = tokens_of(30, 5)
        tree = hierarchy.linkage(pdist(tokens), method)
        for num_groups in (1, 4, 13):
            labels = qm.cluster_tokens(tokens, num_groups, method=method, **euclidean)
            wanted = hierarchy.cut_tree(tree, num_groups)[:, 0]
            pairs = set(zip(labels.tolist(), wanted.tolist(), strict=True))
            assert len(pairs) == num_groups

    def test_nearest_against_the_oracle(self):
        tokens, anchors = tokens_of(40, 5), np.array([3, 17, 20, 31])
        labels = qm.cluster_tokens(
            tokens, 4, method="nearest", anchors=anchors, **euclidean
        )
        assert groups_of(labels) == oracle.nearest(tokens, anchors, "euclidean")
        assert groups_of(labels) != oracle.nearest(tokens, anchors)

    def test_contiguous_against_the_oracle(self):
        tokens, protect = tokens_of(40, 5), np.arange(40) == 11
        tokens[5:9] = 0
        for num_groups in (3, 9, 30):
            labels = qm.cluster_tokens(
                tokens, num_groups, method="contiguous", protect=protect, **euclidean
            )
            wanted = oracle.contiguous(tokens, num_groups, [11], "euclidean")
            assert groups_of(labels) == wanted

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("step", [None, 1, 4, 100])
    def test_bipartite_against_the_oracle(self, metric, step):
        tokens = tokens_of(41, 5)
        options = {"method": "bipartite", "metric": metric, "step": step}
        for num_groups in (1, 7, 30):
            labels = qm.cluster_tokens(tokens, num_groups, **options)
            limit = {} if step is None else {"step": step}
            wanted = oracle.bipartite(tokens, num_groups, metric, **limit)
            assert groups_of(labels) == wanted

    @pytest.mark.parametrize("method", METHODS)
    def test_an_offset_and_a_scale_change_nothing(self, method):
        tokens = tokens_of(2, 25, 4)
        # The anchors of "nearest" are the tokens of largest norm by default.
        options = {"method": method, **euclidean}
        if method == "nearest":
            options["anchors"] = np.tile([1, 4, 9, 12, 20], (2, 1))
        labels = qm.cluster_tokens(tokens, 5, **options)
        moved = qm.cluster_tokens(tokens * 1e150 + 1e152, 5, **options)
        np.testing.assert_array_equal(moved, labels)

    def test_step_by_hand(self):
        # Tokens 0, 2 and 4 are even. Their distances to the nearest odd token are 1.3
        # (to 1), 1.5 (to 3) and 0.5 (to 3). One step of two merges joins 4 to 3 and 0
        # to 1. In steps of one merge, 4 joins 3 first. The mean of both is 11.25, so
        # then 2 is nearer to this group (1.25) than 0 is to 1.
        tokens = np.array([[0.0], [1.3], [10.0], [11.5], [11.0]])
        options = {"method": "bipartite", **euclidean}
        labels = qm.cluster_tokens(tokens, 3, **options)
        np.testing.assert_array_equal(labels, [0, 0, 1, 2, 2])
        labels = qm.cluster_tokens(tokens, 3, step=1, **options)
        np.testing.assert_array_equal(labels, [0, 1, 2, 2, 2])

    def test_errors_of_step(self):
        tokens = np.ones((4, 2))
        with pytest.raises(ValueError, match='`step` is for method="bipartite"'):
            qm.cluster_tokens(tokens, 2, step=3)
        for step in (0, -4):
            with pytest.raises(ValueError, match="`step` must be at least 1"):
                qm.cluster_tokens(tokens, 2, method="bipartite", step=step)
        for step in (1.0, True, "2"):
            with pytest.raises(TypeError, match="`step` must be an integer"):
                qm.cluster_tokens(tokens, 2, method="bipartite", step=step)
