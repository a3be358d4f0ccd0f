import numpy as np
import oracle
import pytest
from conftest import assert_close
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.weighted_linkage import weighted_linkage

WEIGHTED = ("average", "ward")
PADDED_ROW = [-1, -1, np.inf, 0]


def groups_of(labels):
    return [list(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]


def masses(rng, shape):
    """Masses over two decades."""
    return 10 ** rng.uniform(-1, 1, shape)


def low_rank(rng, num_tokens, dim=16):
    rough = rng.standard_normal((num_tokens, 4)) @ rng.standard_normal((4, dim))
    return rough + 0.1 * rng.standard_normal((num_tokens, dim))


def ragged_mask(rng, batch, num_tokens):
    """Padding anywhere, a full sequence first and one of one token last."""
    mask = rng.random((batch, num_tokens)) < 0.6
    mask[0], mask[-1] = True, np.arange(num_tokens) == 3
    return mask


class TestCosineSimilarity:
    def test_more_tokens_than_one_product_takes(self, rng):
        tokens = rng.standard_normal((4100, 3))
        got = qm.cosine_similarity(tokens)
        assert np.array_equal(got, got.T)  # to the bit
        unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        for row in (0, 2047, 2048, 4095, 4096, 4099):
            np.testing.assert_allclose(got[row], unit @ unit[row], atol=1e-14)

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

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("method", LINKAGES)
    def test_mask_is_cutting_out(self, rng, method, weighted):
        if weighted and method not in WEIGHTED:
            return
        tokens, mask = rng.standard_normal((4, 11, 3)), ragged_mask(rng, 4, 11)
        mass = masses(rng, (4, 11)) if weighted else None
        tree = qm.linkage(tokens, method, mass=mass, mask=mask)
        assert tree.shape == (4, 10, 4)
        for b, place in enumerate(map(np.flatnonzero, mask)):
            kept = mass[b, place] if weighted else None
            cut = qm.linkage(tokens[b, place], method, mass=kept)
            rows, padding = np.split(tree[b], [len(cut)])
            np.testing.assert_array_equal(rows[:, 2:], cut[:, 2:])
            node = np.append(place, 11 + np.arange(len(cut)))  # of each node of `cut`
            np.testing.assert_array_equal(rows[:, :2], node[cut[:, :2].astype(int)])
            assert (padding == PADDED_ROW).all()

    def test_bad_input(self, rng):
        tokens = rng.standard_normal((2, 5, 3))
        for method in ("complete", "single"):
            with pytest.raises(ValueError, match=f'"average" or "ward", got .{method}'):
                qm.linkage(tokens, method, mass=np.ones((2, 5)))
        with pytest.raises(
            ValueError, match=r"`mass` must have shape \(B, N\) = \(2, 5"
        ):
            qm.linkage(tokens, mass=np.ones(5))
        with pytest.raises(ValueError, match="`mass` must be ≥ 0"):
            qm.linkage(tokens, mass=np.full((2, 5), -1.0))
        with pytest.raises(ValueError, match="`mass` must be finite"):
            qm.linkage(tokens, mass=np.full((2, 5), np.inf))
        with pytest.raises(TypeError, match="`mask` must be boolean"):
            qm.linkage(tokens, mask=np.ones((2, 5)))
        with pytest.raises(ValueError, match="`mask` must leave at least one token"):
            qm.linkage(tokens, mask=np.zeros((2, 5), bool))


@pytest.mark.parametrize("method", WEIGHTED)
class TestWeightedLinkage:
    @pytest.mark.parametrize("kind", ["gauss", "low rank", "orthogonal", "zeros"])
    def test_every_merge_is_the_cheapest(self, rng, method, kind):
        tokens = {
            "gauss": rng.standard_normal((24, 5)),
            "low rank": low_rank(rng, 24),
            "orthogonal": np.eye(24),
            "zeros": rng.standard_normal((24, 5)) * (np.arange(24) % 8 > 0)[:, None],
        }[kind]
        if method == "average" and kind in ("orthogonal", "zeros"):
            return  # equal distances: the order of merges is free
        mass = masses(rng, 24)
        mass[5] = 0  # counts as a millionth of the largest
        tree = qm.linkage(tokens, method, mass=mass)
        assert hierarchy.is_valid_linkage(tree)
        merges = oracle.weighted_agglomerate(tokens, method, mass)
        np.testing.assert_allclose(tree[:, 2], [h for *_, h in merges], rtol=1e-7)
        for num_groups in range(1, 25):
            labels = qm.cut_linkage(tree, num_groups=num_groups)
            assert groups_of(labels) == oracle.partition(merges, 24, num_groups)

    def test_every_merge_is_among_the_cheapest_of_many_equal(self, rng, method):
        tokens = np.round(rng.standard_normal((30, 3)))  # zero tokens, too
        mass = rng.integers(1, 3, 30).astype(np.float64)
        tree = qm.linkage(tokens, method, mass=mass)
        assert hierarchy.is_valid_linkage(tree)
        units = oracle._orthogonal_units(tokens)
        clusters = {i: [i] for i in range(30)}
        for row, (a, b, height, size) in enumerate(tree):
            pairs = [(i, j) for i in clusters for j in clusters if i < j]
            gaps = {
                (i, j): oracle.weighted_distance(
                    units, clusters[i], clusters[j], mass, method
                )
                for i, j in pairs
            }
            assert_close([gaps[a, b], height], [min(gaps.values())] * 2, "float32")
            clusters[30 + row] = clusters.pop(int(a)) + clusters.pop(int(b))
            assert size == len(clusters[30 + row])

    @pytest.mark.parametrize("num_tokens", [2, 3, 150])
    def test_unit_masses_are_plain(self, rng, method, num_tokens, dtype):
        tokens = rng.standard_normal((2, num_tokens, 12)).astype(dtype)
        plain, weighted = (
            qm.linkage(tokens, method, mass=mass)
            for mass in (None, np.ones((2, num_tokens), dtype))
        )
        np.testing.assert_allclose(weighted[..., 2], plain[..., 2], rtol=1e-9)
        np.testing.assert_array_equal(weighted[..., :2], plain[..., :2])
        np.testing.assert_array_equal(weighted[..., 3], plain[..., 3])

    def test_integer_masses_are_repeated_tokens(self, rng, method):
        tokens, repeats = low_rank(rng, 20), rng.integers(1, 5, 20)
        repeated = np.repeat(tokens, repeats, axis=0)
        tree = qm.linkage(tokens, method, mass=repeats.astype(np.float64))
        wanted = qm.linkage(repeated, method)[-19:, 2]  # the others merge the copies
        np.testing.assert_allclose(tree[:, 2], wanted, rtol=1e-6)
        for num_groups in (1, 3, 8, 20):
            labels = qm.cluster_tokens(
                tokens, num_groups, method=method, mass=repeats.astype(np.float64)
            )
            copies = qm.cluster_tokens(repeated, num_groups, method=method)
            np.testing.assert_array_equal(np.repeat(labels, repeats), copies)

    @pytest.mark.parametrize("scale", [1e-300, 1e-3, 1e6, 1e300])
    def test_scale_of_masses(self, rng, method, scale):
        tokens, mass = rng.standard_normal((12, 5)), masses(rng, 12)
        tree = qm.linkage(tokens, method, mass=mass)
        scaled = qm.linkage(tokens, method, mass=mass * scale)
        heights = tree[:, 2] * (np.sqrt(scale) if method == "ward" else 1)
        np.testing.assert_allclose(scaled[:, 2], heights, rtol=1e-9)
        np.testing.assert_array_equal(scaled[:, :2], tree[:, :2])
        cuts = [
            qm.cut_linkage(found, max_error=0.3, mass=weight)
            for found, weight in ((tree, mass), (scaled, mass * scale))
        ]
        if method == "ward":
            np.testing.assert_array_equal(*cuts)

    def test_no_mass_at_all_is_equal_masses(self, rng, method):
        tokens = rng.standard_normal((12, 5))
        trees = [
            qm.linkage(tokens, method, mass=x) for x in (np.zeros(12), np.ones(12))
        ]
        np.testing.assert_array_equal(*trees)

    def test_a_token_of_no_mass_joins_its_nearest(self, rng, method):
        tokens = np.repeat(np.eye(3), 4, axis=0) + 0.1 * rng.standard_normal((12, 3))
        mass = np.ones(12)
        mass[[0, 5]] = 0
        labels = qm.cluster_tokens(tokens, 3, method=method, mass=mass)
        np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))

    @pytest.mark.parametrize("unit", [True, False])
    def test_equal_distances_take_no_more_rounds(self, rng, method, unit):
        def rounds(distance):
            mass = np.ones(256) if unit else masses(np.random.default_rng(3), 256)
            tree, count = weighted_linkage(distance, mass / mass.max(), method)
            assert hierarchy.is_valid_linkage(tree)
            return count

        tokens = low_rank(rng, 256)
        usual = rounds(1 - qm.cosine_similarity(tokens))
        for rounding in (0.0, 1.5e-15, -1.5e-15):
            assert rounds(np.full((256, 256), rounding)) <= 3 * usual
        for copies in (tokens[-1], tokens[64:128]):  # of one token, of a quarter
            repeated = tokens.copy()
            repeated[:64] = copies
            assert rounds(1 - qm.cosine_similarity(repeated)) <= 3 * usual


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

    def test_mask_is_cutting_out(self, rng):
        tokens, mask = rng.standard_normal((4, 11, 3)), ragged_mask(rng, 4, 11)
        mass = masses(rng, (4, 11))
        tree = qm.linkage(tokens, "ward", mass=mass, mask=mask)
        counts = np.array([5, 3, 2, 1])
        by_k = qm.cut_linkage(tree, num_groups=counts, mask=mask)
        by_error = qm.cut_linkage(tree, max_error=0.3, mass=mass, mask=mask)
        for b, kept in enumerate(mask):
            cut = qm.linkage(tokens[b, kept], "ward", mass=mass[b, kept])
            wanted = qm.cut_linkage(cut, num_groups=int(counts[b]))
            np.testing.assert_array_equal(by_k[b, kept], wanted)
            wanted = qm.cut_linkage(cut, max_error=0.3, mass=mass[b, kept])
            np.testing.assert_array_equal(by_error[b, kept], wanted)
            assert (by_k[b, ~kept] == -1).all()
            assert (by_error[b, ~kept] == -1).all()

    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_by_mass(self, rng, max_error):
        tokens, mass = rng.standard_normal((30, 6)), masses(rng, 30)
        mass[3] = 0
        tree = qm.linkage(tokens, "ward", mass=mass)
        labels = qm.cut_linkage(tree, max_error=max_error, mass=mass)
        error = oracle.weighted_error(tokens, groups_of(labels), mass)
        assert error <= max_error + 1e-9
        if labels.max() > 0:
            fewer = groups_of(qm.cut_linkage(tree, num_groups=int(labels.max())))
            assert oracle.weighted_error(tokens, fewer, mass) > max_error

    def test_bad_mask(self, rng):
        tokens = rng.standard_normal((2, 6, 3))
        mask = np.array([[True] * 6, [True] * 3 + [False] * 3])
        tree = qm.linkage(tokens, mask=mask)
        with pytest.raises(ValueError, match="rows of padding: give the `mask`"):
            qm.cut_linkage(tree, num_groups=2)
        with pytest.raises(
            ValueError, match="3 merges in sequence 1, as `mask` keeps 4 tokens, got 2"
        ):
            qm.cut_linkage(tree, num_groups=2, mask=np.arange(6) < [[6], [4]])
        with pytest.raises(
            ValueError, match=r"`mask` must be the one .* in sequence 1, .* token 0"
        ):
            qm.cut_linkage(tree, num_groups=2, mask=np.arange(6) >= [[0], [3]])
        with pytest.raises(ValueError, match=r"1..3 \(its tokens\) for sequence 1"):
            qm.cut_linkage(tree, num_groups=4, mask=mask)
        with pytest.raises(
            ValueError, match=r"`mask` must have shape \(B, N\) = \(2, 6"
        ):
            qm.cut_linkage(tree, num_groups=2, mask=mask[:, :5])
        with pytest.raises(
            ValueError, match=r"`mass` must have shape \(B, N\) = \(2, 6"
        ):
            qm.cut_linkage(tree, max_error=0.2, mass=np.ones(6), mask=mask)
        tree[0, 1, 2] = np.inf
        with pytest.raises(ValueError, match=r"finite, got inf at index \(0, 1, 2\)"):
            qm.cut_linkage(tree, num_groups=2, mask=mask)


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

    def test_bad_mass(self, rng):
        tokens = rng.standard_normal((6, 3))
        for method in set(METHODS) - set(WEIGHTED):
            with pytest.raises(ValueError, match='`mass` is for method="average" or'):
                qm.cluster_tokens(tokens, 2, method=method, mass=np.ones(6))

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_masses_are_their_dendrogram_cut(self, rng, method, dtype):
        tokens = rng.standard_normal((3, 14, 4)).astype(dtype)
        mask, mass = ragged_mask(rng, 3, 14), masses(rng, (3, 14)).astype(dtype)
        counts = np.array([4, 2, 1])
        got = qm.cluster_tokens(tokens, counts, method=method, mass=mass, mask=mask)
        tree = qm.linkage(tokens, method, mass=mass, mask=mask)
        wanted = qm.cut_linkage(tree, num_groups=counts, mask=mask)
        np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("make", [low_rank, np.random.Generator.standard_normal])
    def test_masses_lower_the_weighted_error(self, make):
        """Measured: 0.82 and 0.83 of plain ward's on average, 0.98 at most."""
        ratios = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            tokens = make(rng, 60) if make is low_rank else make(rng, (60, 16))
            mass = masses(rng, 60)
            plain, weighted = (
                qm.cluster_tokens(tokens, 12, method="ward", mass=x)
                for x in (None, mass)
            )
            found = oracle.weighted_error(tokens, groups_of(weighted), mass)
            ratios.append(found / oracle.weighted_error(tokens, groups_of(plain), mass))
        assert np.mean(ratios) < 0.92
        assert np.max(ratios) < 1.1  # greedy: no merge is taken back


class TestProtect:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("order", ["last", "first"])
    def test_the_others_are_grouped_without_them(self, rng, method, order):
        tokens, mask = rng.standard_normal((4, 16, 4)), ragged_mask(rng, 4, 16)
        protect = np.zeros((4, 16), bool)
        protect[:, [0, 1, 7]] = True  # some of them padding
        counts = np.where(mask.sum(axis=-1) == 1, 1, 7)
        options = {"method": method, "order": order}
        got = qm.cluster_tokens(tokens, counts, protect=protect, mask=mask, **options)
        assert (got[~mask] == -1).all()
        for b in range(4):
            free = mask[b] & ~protect[b]
            alone = mask[b] & protect[b]
            labels, first = np.unique(got[b, mask[b]], return_index=True)
            np.testing.assert_array_equal(labels, np.arange(counts[b]))
            last = [np.flatnonzero(got[b] == k)[-1] for k in labels]
            assert (np.diff(first if order == "first" else last) > 0).all()
            assert not set(got[b, alone]) & set(got[b, free])
            assert len(set(got[b, alone])) == alone.sum()
            if method != "contiguous" and free.any():
                rest = qm.cluster_tokens(
                    tokens[b, free], int(counts[b]) - int(alone.sum()), **options
                )
                groups = [set(np.flatnonzero(rest == k)) for k in set(rest)]
                assert groups == [
                    set(np.flatnonzero(got[b, free] == k))
                    for k in sorted(set(got[b, free]))
                ]

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_their_mass_does_not_matter(self, rng, method):
        tokens, mass = rng.standard_normal((12, 4)), masses(rng, 12)
        protect = np.arange(12) == 4
        heavy = np.where(protect, 1e30, mass)
        labels = [
            qm.cluster_tokens(tokens, 5, method=method, mass=x, protect=protect)
            for x in (mass, heavy)
        ]
        np.testing.assert_array_equal(*labels)

    @pytest.mark.parametrize("num_groups", [7, 8, 9, 12, 17])
    def test_contiguous_groups_never_span_them(self, rng, num_groups):
        tokens, protected = rng.standard_normal((17, 4)), [0, 5, 6, 12]
        protect = np.isin(np.arange(17), protected)
        labels = qm.cluster_tokens(
            tokens, num_groups, method="contiguous", protect=protect
        )
        wanted = oracle.contiguous(tokens, num_groups, protected)
        assert groups_of(labels) == wanted

    def test_contiguous_neighbours_across_padding_merge(self, rng):
        mask = np.arange(6) != 2
        protect = ~mask  # protected padding is padding
        labels = qm.cluster_tokens(
            np.ones((6, 2)), 1, method="contiguous", mask=mask, protect=protect
        )
        np.testing.assert_array_equal(labels, [0, 0, -1, 0, 0, 0])

    def test_default_anchors_are_they_and_the_longest_others(self, rng):
        tokens = rng.standard_normal((2, 12, 4))
        protect = np.arange(12) < [[2], [1]]
        tokens[protect] *= 1e-3
        longest = np.where(protect, np.inf, np.linalg.norm(tokens, axis=-1))
        anchors = qm.select_tokens(np.minimum(longest, 1e9), 5)
        wanted, got = (
            qm.cluster_tokens(tokens, 5, method="nearest", protect=protect, anchors=x)
            for x in (anchors, None)
        )
        np.testing.assert_array_equal(got, wanted)
        for b in range(2):
            assert np.isin(np.flatnonzero(protect[b]), anchors[b]).all()

    def test_no_token_joins_a_protected_anchor(self):
        tokens = np.array([[1.0, 0], [1, 0.1], [0, 1], [1, 0]])
        protect = np.array([True, False, False, False])
        labels = qm.cluster_tokens(
            tokens, 2, method="nearest", anchors=np.array([0, 2]), protect=protect
        )
        np.testing.assert_array_equal(labels, [0, 1, 1, 1])

    @pytest.mark.parametrize("method", METHODS)
    def test_equal_tokens_and_all_tokens(self, method):
        protect = np.array([True, True, False, False, False, True])
        labels = qm.cluster_tokens(np.ones((6, 2)), 4, method=method, protect=protect)
        np.testing.assert_array_equal(labels, [0, 1, 2, 2, 2, 3])
        labels = qm.cluster_tokens(
            np.ones((6, 2)), 6, method=method, protect=np.ones(6, bool)
        )
        np.testing.assert_array_equal(labels, np.arange(6))
        none = qm.cluster_tokens(
            np.ones((6, 2)), 4, method=method, protect=np.zeros(6, bool)
        )
        plain = qm.cluster_tokens(np.ones((6, 2)), 4, method=method)
        np.testing.assert_array_equal(none, plain)

    @pytest.mark.parametrize("method", METHODS)
    def test_too_few_groups(self, rng, method):
        tokens = rng.standard_normal((2, 7, 3))
        protect = np.array([[True] + [False] * 6, [True] * 3 + [False] * 4])
        for num_groups in (2, 3):
            with pytest.raises(
                ValueError,
                match=f"at least 4 for sequence 1, got {num_groups}: the 3 protected "
                "tokens leave no group for the others",
            ):
                qm.cluster_tokens(tokens, num_groups, method=method, protect=protect)
        with pytest.raises(ValueError, match="at least 7, got 6: the 7 protected"):
            qm.cluster_tokens(tokens[0], 6, method=method, protect=np.ones(7, bool))
        mask = np.arange(7) < [[7], [3]]  # none but protected tokens left
        counts = np.array([2, 3])
        labels = qm.cluster_tokens(
            tokens, counts, method=method, protect=protect, mask=mask
        )
        np.testing.assert_array_equal(labels[1], [0, 1, 2, -1, -1, -1, -1])

    def test_bad_input(self, rng):
        tokens = rng.standard_normal((2, 7, 3))
        protect = np.zeros((2, 7), bool)
        protect[0, [2, 4]], protect[1, [0, 1]] = True, True
        with pytest.raises(
            ValueError, match="at least 5, got 3: 2 protected tokens leave 3 runs"
        ):
            qm.cluster_tokens(tokens[0], 3, method="contiguous", protect=protect[0])
        with pytest.raises(TypeError, match="`protect` must be boolean, got int64"):
            qm.cluster_tokens(tokens, 3, protect=protect.astype(np.int64))
        with pytest.raises(ValueError, match=r"`protect` must have shape \(B, N\)"):
            qm.cluster_tokens(tokens, 3, protect=protect[0])
        with pytest.raises(
            ValueError, match=r"include the protected tokens \[0 1\], got \[0 2 3\]"
        ):
            qm.cluster_tokens(
                tokens,
                3,
                method="nearest",
                anchors=np.array([[2, 4, 5], [0, 2, 3]]),
                protect=protect,
            )
