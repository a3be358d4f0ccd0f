import numpy as np
import pytest
from clustering_cases import WEIGHTED, groups_of, masses, ragged_mask
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.metrics import METRICS


def distances_around(heights):
    """Return 0, every height, one distance below all, between each two, and above."""
    between = (heights[1:] + heights[:-1]) / 2
    return np.concatenate([[0, heights[0] / 2, heights[-1] + 1], heights, between])


class TestCutLinkage:
    @pytest.mark.parametrize("method", LINKAGES)
    @pytest.mark.parametrize("metric", METRICS)
    def test_max_distance_against_scipy(self, rng, method, metric):
        tokens = rng.standard_normal((20, 4))
        tokens[5:8] = tokens[4]  # merges at height 0, and at the same height
        tree = qm.linkage(tokens, method, metric=metric)
        for distance in distances_around(tree[:, 2]):
            labels = qm.cut_linkage(tree, max_distance=distance)
            wanted = hierarchy.fcluster(tree, distance, "distance")
            # SciPy numbers the groups in another order.
            assert groups_of(labels) == sorted(groups_of(wanted - 1), key=max)

    def test_max_distance_by_hand(self):
        # Row 0 merges tokens 1 and 2 at height 1, row 1 merges token 0 and this group
        # at 3, and row 2 merges token 3 at 3.
        tree = np.array([[1.0, 2, 1, 2], [0, 4, 3, 3], [3, 5, 3, 4]])
        for distance, wanted in (
            (0, [0, 1, 2, 3]),
            (0.99, [0, 1, 2, 3]),
            (1, [0, 1, 1, 2]),
            (np.float32(2.5), [0, 1, 1, 2]),
            (np.nextafter(3, 0), [0, 1, 1, 2]),
            (3, [0, 0, 0, 0]),
            (np.inf, [0, 0, 0, 0]),
        ):
            got = qm.cut_linkage(tree, max_distance=distance)
            np.testing.assert_array_equal(got, wanted)
            assert got.dtype == np.int32
        higher = tree + np.array([0, 0, 2, 0])
        got = qm.cut_linkage(np.stack([tree, higher]), max_distance=3)
        np.testing.assert_array_equal(got, [[0, 0, 0, 0], [0, 1, 1, 2]])
        np.testing.assert_array_equal(
            qm.cut_linkage(tree, max_distance=1, order="first"), [0, 1, 1, 2]
        )

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_max_distance_of_masked_dendrograms(self, rng, method):
        tokens, mask = rng.standard_normal((4, 11, 3)), ragged_mask(rng, 4, 11)
        mass = masses(rng, (4, 11))
        tree = qm.linkage(tokens, method, mass=mass, mask=mask)
        for distance in (0, 0.3, 1, 3, np.inf):
            labels = qm.cut_linkage(tree, max_distance=distance, mask=mask)
            for b, valid in enumerate(mask):
                alone = qm.linkage(tokens[b, valid], method, mass=mass[b, valid])
                wanted = qm.cut_linkage(alone, max_distance=distance)
                np.testing.assert_array_equal(labels[b, valid], wanted)
                assert (labels[b, ~valid] == -1).all()

    @pytest.mark.parametrize("heights", [[-0.5, 1, 2], [0, 2, 1], [0, 1, 1 - 1e-12]])
    def test_heights_that_fall_are_refused(self, heights):
        tree = np.array([[0.0, 1, 0, 2], [2, 4, 0, 3], [3, 5, 0, 4]])
        wrong = tree.copy()
        wrong[:, 2] = heights
        for call in ({"num_groups": 2}, {"max_distance": 0.5}):
            with pytest.raises(ValueError, match=r"`dendrogram` must have heights"):
                qm.cut_linkage(wrong, **call)
        message = r"got -0.5 in row 0" if heights[0] < 0 else r"after \d.0 in row 2"
        with pytest.raises(ValueError, match=message + " of sequence 1: give the"):
            qm.cut_linkage(np.stack([tree, wrong]), num_groups=2)

    def test_nan_heights_are_refused_without_finite_checks(self):
        tree = np.array([[0.0, 1, 0, 2], [2, 3, np.nan, 3]])
        with pytest.raises(ValueError, match=r"finite, got nan at index \(1, 2\)"):
            qm.cut_linkage(tree, num_groups=2)
        with (
            qm.check_finite(False),
            pytest.raises(
                ValueError, match=r"never fall, got nan after 0\.0 in row 1:"
            ),
        ):
            qm.cut_linkage(tree, num_groups=2)

    def test_inversions_of_centroid_linkage_are_refused(self):
        # The corners of a triangle with sides of about 1: the third corner is nearer to
        # the middle of a side (0.87) than the side is long.
        corners = np.array([[0, 0], [1, 0], [0.5, 0.9]])
        tree = hierarchy.linkage(corners, "centroid")
        assert tree[1, 2] < tree[0, 2]
        with pytest.raises(
            ValueError, match=r"0.89+ after 1.0 in row 1.*not supported"
        ):
            qm.cut_linkage(tree, num_groups=2)

    def test_each_sequence_has_its_own_k(self, rng):
        tree = qm.linkage(rng.standard_normal((3, 12, 4)))
        labels = qm.cut_linkage(tree, num_groups=np.array([1, 5, 12]))
        assert labels.dtype == np.int32
        assert list(labels.max(axis=-1) + 1) == [1, 5, 12]
        np.testing.assert_array_equal(labels[2], np.arange(12))  # K = N: no merge

    def test_groups_in_the_order_of_last_and_first_members(self):
        # The groups are {0, 3} and {1, 2}. {0, 3} has the earlier first member and the
        # later last member.
        tree = qm.linkage(np.array([[1.0, 0], [0, 1], [0, 2], [3, 0]]))
        last = qm.cut_linkage(tree, num_groups=2)
        first = qm.cut_linkage(tree, num_groups=2, order="first")
        np.testing.assert_array_equal(last, [1, 0, 0, 1])
        np.testing.assert_array_equal(first, [0, 1, 1, 0])

    def test_bad_input(self, rng):
        tree = qm.linkage(rng.standard_normal((5, 4)))
        with pytest.raises(ValueError, match=r"exactly one of.*got neither"):
            qm.cut_linkage(tree)
        with pytest.raises(ValueError, match=r"exactly one of.*got both"):
            qm.cut_linkage(tree, num_groups=2, max_distance=0.1)
        # A dendrogram does not know the error of its cuts.
        with pytest.raises(TypeError, match="max_error"):
            qm.cut_linkage(tree, max_error=0.1)
        for distance in (-1, -1e-300, np.nan):
            with pytest.raises(ValueError, match="`max_distance` must lie in"):
                qm.cut_linkage(tree, max_distance=distance)
        for distance in ("1", True, [1.0]):
            with pytest.raises(TypeError, match="`max_distance` must be a number"):
                qm.cut_linkage(tree, max_distance=distance)
        with pytest.raises(ValueError, match=r"`num_groups` must lie in 1..5"):
            qm.cut_linkage(tree, num_groups=6)
        with pytest.raises(ValueError, match=r"\(N - 1, 4\)"):
            qm.cut_linkage(tree[:, :3], num_groups=2)
        with pytest.raises(ValueError, match="earlier rows"):
            qm.cut_linkage(tree[::-1], num_groups=2)  # merges groups of later rows
        # Row 2 merges a node for the second time: token 0, or group 5, which row 0
        # made.
        for node in (0, 5):
            twice = np.array(
                [[0, 1, 0, 2], [2, 5, 0, 3], [3, node, 0, 2], [4, 7, 0, 5]]
            )
            with pytest.raises(ValueError, match=r"`dendrogram` must merge .*once"):
                qm.cut_linkage(np.stack([tree, twice.astype(float)]), num_groups=2)

    def test_masked_labels_equal_those_of_the_valid_tokens(self, rng):
        tokens, mask = rng.standard_normal((4, 11, 3)), ragged_mask(rng, 4, 11)
        tree = qm.linkage(tokens, "ward", mask=mask)
        counts = np.array([5, 3, 2, 1])
        labels = qm.cut_linkage(tree, num_groups=counts, mask=mask)
        for b, valid in enumerate(mask):
            tree_without_padding = qm.linkage(tokens[b, valid], "ward")
            wanted = qm.cut_linkage(tree_without_padding, num_groups=int(counts[b]))
            np.testing.assert_array_equal(labels[b, valid], wanted)
            assert (labels[b, ~valid] == -1).all()

    def test_bad_mask(self, rng):
        tokens = rng.standard_normal((2, 6, 3))
        mask = np.array([[True] * 6, [True] * 3 + [False] * 3])
        tree = qm.linkage(tokens, mask=mask)
        with pytest.raises(ValueError, match="rows of padding: give the `mask`"):
            qm.cut_linkage(tree, num_groups=2)
        with pytest.raises(
            ValueError,
            match="3 merges in sequence 1, because `mask` keeps 4 tokens, got 2",
        ):
            qm.cut_linkage(tree, num_groups=2, mask=np.arange(6) < [[6], [4]])
        with pytest.raises(
            ValueError, match=r"`mask` must be the one .* in sequence 1, .* token 0"
        ):
            qm.cut_linkage(tree, num_groups=2, mask=np.arange(6) >= [[0], [3]])
        with pytest.raises(ValueError, match=r"1..3 \(its tokens\) for sequence 1"):
            qm.cut_linkage(tree, num_groups=4, mask=mask)
        with pytest.raises(
            ValueError, match=r"`mask` must have shape .* \(B, N\) = \(2, 6"
        ):
            qm.cut_linkage(tree, num_groups=2, mask=mask[:, :5])
        # An infinite height is allowed only in a row of padding.
        tree[0, 1, 2] = np.inf
        with pytest.raises(ValueError, match=r"finite, got inf at index \(0, 1, 2\)"):
            qm.cut_linkage(tree, num_groups=2, mask=mask)
