import numpy as np
import oracle
import pytest
from conftest import assert_close
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.clustering import LINKAGES, METHODS


def groups_of(labels):
    return [list(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]


class TestCosineSimilarity:
    def test_oracle(self, rng, dtype):
        tokens = rng.standard_normal((2, 9, 5)).astype(dtype)
        tokens[0, 3] = 0
        got = qm.cosine_similarity(tokens)
        assert got.dtype == np.result_type(dtype, np.float32)
        for b in range(2):
            assert_close(got[b], oracle.cosine_similarity(tokens[b]), dtype)

    def test_exactly_symmetric_with_a_unit_diagonal(self, rng):
        tokens = rng.standard_normal((130, 65)).astype(np.float32)
        got = qm.cosine_similarity(tokens)
        np.testing.assert_array_equal(got, got.T)
        np.testing.assert_array_equal(np.diagonal(got), np.ones(130))

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_does_not_overflow(self, rng, scale):
        tokens = rng.standard_normal((5, 4))
        scaled = (tokens * scale).astype(np.float32)
        assert_close(qm.cosine_similarity(scaled), qm.cosine_similarity(tokens), "f4")


class TestLinkage:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_heights_and_partitions_against_the_oracle(self, rng, method):
        for num_tokens in (2, 3, 24):
            tokens = rng.standard_normal((num_tokens, 5))
            merges = oracle.agglomerate(tokens, method)
            tree = qm.linkage(tokens, method)
            assert_close(tree[:, 2], [height for _, _, height in merges], "float32")
            for num_groups in range(1, num_tokens + 1):
                labels = qm.cut_linkage(tree, num_groups=num_groups)
                wanted = oracle.partition(merges, num_tokens, num_groups)
                assert groups_of(labels) == wanted

    @pytest.mark.parametrize("method", LINKAGES)
    def test_distances_are_found_in_float64(self, dtype, method):
        """Nearly parallel tokens, 1 - cos from 5e-7 on."""
        slopes = np.array([0, 1, 3, 7, 15, 31], dtype) / 1024
        tokens = np.stack([np.ones_like(slopes), slopes], axis=-1)
        wanted = [height for _, _, height in oracle.agglomerate(tokens, method)]
        got = qm.linkage(tokens, method)[:, 2]
        np.testing.assert_allclose(got, wanted, rtol=1e-8)

    def test_scipy_reads_it(self, rng):
        tree = qm.linkage(rng.standard_normal((20, 3)).astype(np.float32), "ward")
        assert tree.dtype == np.float64
        assert hierarchy.is_valid_linkage(tree)
        wanted = hierarchy.cut_tree(tree, 6)[:, 0]
        labels = qm.cut_linkage(tree, num_groups=6)
        assert len(set(zip(wanted, labels, strict=True))) == 6

    def test_equal_tokens(self):
        tree = qm.linkage(np.ones((6, 3)), "ward")
        assert_close(tree[:, 2], np.zeros(5))
        labels = qm.cut_linkage(tree, num_groups=4)
        assert sorted(set(labels)) == [0, 1, 2, 3]

    @pytest.mark.parametrize("shape", [(2, 1, 3), (0, 5, 3), (0, 1, 3), (1, 3)])
    def test_one_token_and_no_sequence(self, shape):
        tree = qm.linkage(np.ones(shape))
        assert tree.shape == (*shape[:-2], shape[-2] - 1, 4)
        labels = qm.cut_linkage(tree, num_groups=1)
        np.testing.assert_array_equal(labels, np.zeros(shape[:-1]))

    def test_unknown_method_lists_those_there_are(self):
        with pytest.raises(
            ValueError, match='"average", "ward", "complete" or "single"'
        ):
            qm.linkage(np.ones((3, 2)), "centroid")


class TestCutLinkage:
    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_is_met_and_tight(self, rng, max_error):
        tokens = rng.standard_normal((30, 6))
        tree = qm.linkage(tokens, "ward")
        labels = qm.cut_linkage(tree, max_error=max_error)
        num_groups = labels.max() + 1
        assert oracle.ward_error(tokens, groups_of(labels)) <= max_error + 1e-9
        if num_groups > 1:
            fewer = qm.cut_linkage(tree, num_groups=num_groups - 1)
            assert oracle.ward_error(tokens, groups_of(fewer)) > max_error

    def test_error_bound_is_met_to_rounding(self):
        tree = qm.linkage(np.eye(2), "ward")
        assert tree[0, 2] ** 2 / 2 > 1  # √2 rounded up
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.5), [0, 0])
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.499), [0, 1])

    def test_batch_cut_at_its_own_k(self, rng):
        tree = qm.linkage(rng.standard_normal((3, 12, 4)))
        labels = qm.cut_linkage(tree, num_groups=np.array([1, 5, 12]))
        assert labels.dtype == np.int32
        assert list(labels.max(axis=-1) + 1) == [1, 5, 12]
        np.testing.assert_array_equal(labels[2], np.arange(12))

    def test_orders(self):
        tree = qm.linkage(np.array([[1.0, 0], [0, 1], [0, 2], [3, 0]]))
        last = qm.cut_linkage(tree, num_groups=2)
        first = qm.cut_linkage(tree, num_groups=2, order="first")
        np.testing.assert_array_equal(last, [1, 0, 0, 1])
        np.testing.assert_array_equal(first, [0, 1, 1, 0])

    def test_bad_input(self, rng):
        tree = qm.linkage(rng.standard_normal((5, 4)))
        with pytest.raises(ValueError, match="exactly one of"):
            qm.cut_linkage(tree)
        with pytest.raises(ValueError, match="exactly one of"):
            qm.cut_linkage(tree, num_groups=2, max_error=0.1)
        with pytest.raises(ValueError, match=r"`num_groups` must lie in 1..5"):
            qm.cut_linkage(tree, num_groups=6)
        with pytest.raises(ValueError, match=r"\(N - 1, 4\)"):
            qm.cut_linkage(tree[:, :3], num_groups=2)
        with pytest.raises(ValueError, match="earlier rows"):
            qm.cut_linkage(tree[::-1], num_groups=2)
        for node in (0, 5):  # a token, and the group of the first row
            twice = np.array(
                [[0, 1, 0, 2], [2, 5, 0, 3], [3, node, 0, 2], [4, 7, 0, 5]]
            )
            with pytest.raises(ValueError, match=r"`dendrogram` must merge .*once"):
                qm.cut_linkage(np.stack([tree, twice.astype(float)]), num_groups=2)


class TestClusterTokens:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_linkages_are_their_dendrogram_cut(self, rng, dtype, method):
        tokens = rng.standard_normal((2, 15, 4)).astype(dtype)
        got = qm.cluster_tokens(tokens, 4, method=method)
        tree = qm.linkage(tokens, method)
        np.testing.assert_array_equal(got, qm.cut_linkage(tree, num_groups=4))

    @pytest.mark.parametrize("num_groups", [1, 2, 5, 9, 16, 17])
    def test_bipartite_oracle(self, rng, num_groups):
        tokens = rng.standard_normal((17, 4))
        tokens[6] = 0
        labels = qm.cluster_tokens(tokens, num_groups, method="bipartite")
        assert groups_of(labels) == oracle.bipartite(tokens, num_groups)

    def test_bipartite_oracle_among_many_ties(self, rng):
        tokens = np.eye(3)[rng.integers(0, 3, 400)]
        tokens[1::2, 2] = 0  # so that some of the even places have no partner
        labels = qm.cluster_tokens(tokens, 300, method="bipartite")
        assert groups_of(labels) == oracle.bipartite(tokens, 300)

    @pytest.mark.parametrize("num_groups", [1, 2, 5, 9, 16, 17])
    def test_contiguous_oracle(self, rng, num_groups):
        tokens = rng.standard_normal((17, 4))
        tokens[[6, 7]] = 0
        labels = qm.cluster_tokens(tokens, num_groups, method="contiguous")
        assert groups_of(labels) == oracle.contiguous(tokens, num_groups)
        assert (np.diff(labels) >= 0).all()

    @pytest.mark.parametrize("anchors", [[3], [0, 16], [9, 2, 5, 11]])
    def test_nearest_oracle(self, rng, anchors):
        tokens = rng.standard_normal((17, 4))
        tokens[5] = tokens[2]  # an anchor's twin is still an anchor
        labels = qm.cluster_tokens(
            tokens, len(anchors), method="nearest", anchors=np.array(anchors)
        )
        assert groups_of(labels) == oracle.nearest(tokens, anchors)

    @pytest.mark.parametrize("anchors", [[0, 2], [2, 0]])
    def test_nearest_goes_to_the_earlier_of_equal_anchors(self, anchors):
        tokens = np.array([[1.0, 0], [1, 1], [0, 1]])
        labels = qm.cluster_tokens(
            tokens, 2, method="nearest", anchors=np.array(anchors)
        )
        np.testing.assert_array_equal(labels, [0, 0, 1])

    def test_nearest_takes_the_longest_by_default(self, rng):
        tokens = rng.standard_normal((2, 12, 4))
        norms = np.linalg.norm(tokens, axis=-1)
        wanted = qm.cluster_tokens(
            tokens, 3, method="nearest", anchors=qm.select_tokens(norms, 3)
        )
        got = qm.cluster_tokens(tokens, 3, method="nearest")
        np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("order", ["last", "first"])
    def test_mask_is_cutting_out_with_k_per_sequence(self, rng, method, order):
        tokens = rng.standard_normal((3, 14, 4))
        mask = rng.random((3, 14)) < 0.6
        mask[:, :5] = [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
        counts = np.array([4, 1, 3])
        got = qm.cluster_tokens(tokens, counts, method=method, mask=mask, order=order)
        for b in range(3):
            cut = qm.cluster_tokens(
                tokens[b, mask[b]], int(counts[b]), method=method, order=order
            )
            np.testing.assert_array_equal(got[b, mask[b]], cut)
            assert (got[b, ~mask[b]] == -1).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_degenerate_tokens(self, method):
        zeros, equal = np.zeros((9, 3)), np.ones((9, 3))
        for tokens in (zeros, equal, np.concatenate([zeros, equal])):
            labels = qm.cluster_tokens(tokens, 4, method=method)
            assert sorted(set(labels)) == [0, 1, 2, 3]

    @pytest.mark.parametrize("method", METHODS)
    def test_empty_batch(self, method):
        assert qm.cluster_tokens(np.ones((0, 5, 3)), 2, method=method).shape == (0, 5)

    def test_bad_input(self, rng):
        tokens = rng.standard_normal((2, 6, 3))
        cluster = qm.cluster_tokens
        with pytest.raises(ValueError, match='"nearest", "bipartite" or "contiguous"'):
            cluster(tokens, 2, method="kmeans")
        with pytest.raises(ValueError, match='`order` must be "last" or "first"'):
            cluster(tokens, 2, order="any")
        with pytest.raises(ValueError, match=r"must lie in 1..6 \(its tokens\), got 7"):
            cluster(tokens, 7)
        with pytest.raises(ValueError, match=r"must lie in 1..6 \(its tokens\), got 0"):
            cluster(tokens, 0)
        with pytest.raises(
            TypeError, match="`num_groups` must be an integer, got float"
        ):
            cluster(tokens, 2.0)
        with pytest.raises(ValueError, match=r"`num_groups` must have shape \(B\)"):
            cluster(tokens, np.array([2, 3, 4]))
        mask = np.array([[True] * 6, [True] * 2 + [False] * 4])
        with pytest.raises(ValueError, match=r"1..2 \(its tokens\) for sequence 1"):
            cluster(tokens, 3, mask=mask)
        nearest = {"method": "nearest", "mask": mask}
        with pytest.raises(ValueError, match="must be distinct"):
            cluster(tokens, 2, anchors=np.array([[0, 1], [1, 1]]), **nearest)
        with pytest.raises(ValueError, match="that `mask` keeps"):
            cluster(tokens, 2, anchors=np.array([[0, 1], [1, 4]]), **nearest)
        with pytest.raises(ValueError, match=r"must lie in 0..5"):
            cluster(tokens, 2, anchors=np.array([[0, 6], [0, 1]]), **nearest)
        with pytest.raises(ValueError, match=r"shape \(B, K\) = \(2, 2\)"):
            cluster(tokens, 2, anchors=np.array([[0], [0]]), **nearest)
        with pytest.raises(ValueError, match='are for method="nearest"'):
            cluster(tokens, 2, anchors=np.array([[0, 1], [0, 1]]))
