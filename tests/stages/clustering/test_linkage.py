import numpy as np
import oracle
import pytest
from clustering_cases import WEIGHTED, groups_of, masses, ragged_mask
from conftest import assert_close
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.stages.clustering import linkage
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.metrics import METRICS

PADDED_ROW = [-1, -1, np.inf, 0]


class TestLinkage:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_heights_and_partitions_against_the_oracle(self, rng, method):
        for num_tokens in (2, 3, 24):
            tokens = rng.standard_normal((num_tokens, 5))
            merges = oracle.agglomerate(tokens, method)
            tree = qm.linkage(tokens, method)
            assert_close(tree[:, 2], [height for _, _, height in merges], "float32")
            # Cuts at every K compare the whole tree. Merges of equal height may have
            # another order.
            for num_groups in range(1, num_tokens + 1):
                labels = qm.cut_linkage(tree, num_groups=num_groups)
                wanted = oracle.partition(merges, num_tokens, num_groups)
                assert groups_of(labels) == wanted

    @pytest.mark.parametrize("method", LINKAGES)
    def test_distances_are_computed_in_float64(self, dtype, method):
        """The tokens are nearly parallel: their least distance 1 - cos is 5e-7.

        In float32, 1 - cos would lose most of its digits.
        """
        second = np.array([0, 1, 3, 7, 15, 31], dtype) / 1024
        tokens = np.stack([np.ones_like(second), second], axis=-1)
        wanted = [height for _, _, height in oracle.agglomerate(tokens, method)]
        got = qm.linkage(tokens, method)[:, 2]
        np.testing.assert_allclose(got, wanted, rtol=1e-8)

    def test_scipy_accepts_the_dendrogram(self, rng):
        tree = qm.linkage(rng.standard_normal((20, 3)).astype(np.float32), "ward")
        assert tree.dtype == np.float64
        assert hierarchy.is_valid_linkage(tree)
        wanted = hierarchy.cut_tree(tree, 6)[:, 0]
        labels = qm.cut_linkage(tree, num_groups=6)
        # The groups are the same six, perhaps with other numbers: there are exactly six
        # pairs of a label of SciPy and a label of ours.
        assert len(set(zip(wanted, labels, strict=True))) == 6

    def test_equal_tokens(self):
        # All distances are 0. There must still be N - 1 merges and exactly K groups.
        tree = qm.linkage(np.ones((6, 3)), "ward")
        assert_close(tree[:, 2], np.zeros(5))
        labels = qm.cut_linkage(tree, num_groups=4)
        assert sorted(set(labels)) == [0, 1, 2, 3]

    @pytest.mark.parametrize("shape", [(2, 1, 3), (0, 5, 3), (0, 1, 3), (1, 3)])
    def test_sequence_of_one_token_and_empty_batch(self, shape):
        tree = qm.linkage(np.ones(shape))
        assert tree.shape == (*shape[:-2], shape[-2] - 1, 4)
        labels = qm.cut_linkage(tree, num_groups=1)
        np.testing.assert_array_equal(labels, np.zeros(shape[:-1]))

    def test_unknown_method_lists_the_methods(self):
        with pytest.raises(
            ValueError, match='"average", "ward", "complete" or "single"'
        ):
            qm.linkage(np.ones((3, 2)), "centroid")

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("method", LINKAGES)
    def test_masked_merges_equal_those_of_the_valid_tokens(self, rng, method, weighted):
        if weighted and method not in WEIGHTED:
            return
        tokens, mask = rng.standard_normal((4, 11, 3)), ragged_mask(rng, 4, 11)
        mass = masses(rng, (4, 11)) if weighted else None
        tree = qm.linkage(tokens, method, mass=mass, mask=mask)
        assert tree.shape == (4, 10, 4)
        for b, position in enumerate(map(np.flatnonzero, mask)):
            valid_mass = mass[b, position] if weighted else None
            # The merges are those of the sequence without padding, but tokens and
            # groups have the numbers of the padded sequence.
            tree_without_padding = qm.linkage(
                tokens[b, position], method, mass=valid_mass
            )
            rows, padding = np.split(tree[b], [len(tree_without_padding)])
            np.testing.assert_array_equal(rows[:, 2:], tree_without_padding[:, 2:])
            padded_number = np.append(
                position, 11 + np.arange(len(tree_without_padding))
            )  # name of each node of `tree_without_padding`
            np.testing.assert_array_equal(
                rows[:, :2], padded_number[tree_without_padding[:, :2].astype(int)]
            )
            assert (padding == PADDED_ROW).all()

    @pytest.mark.parametrize("method", LINKAGES)
    @pytest.mark.parametrize("metric", METRICS)
    def test_rounding_never_lowers_a_height(self, rng, method, metric):
        # Almost the corners of a simplex: all distances are nearly equal.
        for spread in (0, 1e-16, 1e-12):
            tokens = np.eye(20) + spread * rng.standard_normal((5, 20, 20))
            for mass in (None, masses(rng, (5, 20)) * 1e30):
                if mass is not None and method not in WEIGHTED:
                    continue
                tree = qm.linkage(tokens, method, metric=metric, mass=mass)
                assert (tree[..., 2] >= 0).all()
                assert (np.diff(tree[..., 2]) >= 0).all()
                qm.cut_linkage(tree, num_groups=3)  # accepts these heights

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


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("metric", METRICS)
def test_long_sequences_use_the_memory_of_the_matrix(rng, monkeypatch, method, metric):
    tokens = rng.standard_normal((60, 5))
    wanted = qm.linkage(tokens, method, metric=metric)
    monkeypatch.setattr(linkage, "IN_PLACE", 0)
    got = qm.linkage(tokens, method, metric=metric)
    np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("num_tokens", [2, 3, 50])
def test_entries_above_the_diagonal(rng, monkeypatch, num_tokens):
    square = rng.standard_normal((num_tokens, num_tokens))
    wanted = square[np.triu_indices(num_tokens, 1)]
    monkeypatch.setattr(linkage, "IN_PLACE", 0)
    np.testing.assert_array_equal(linkage.above_diagonal(square), wanted, strict=True)
