import numpy as np
import oracle
import pytest
from clustering_cases import groups_of, masses, ragged_mask

import qm_cupy as qm


class TestCutLinkage:
    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_holds_and_one_group_fewer_exceeds_it(self, rng, max_error):
        tokens = rng.standard_normal((30, 6))
        tree = qm.linkage(tokens, "ward")
        labels = qm.cut_linkage(tree, max_error=max_error)
        num_groups = labels.max() + 1
        assert oracle.ward_error(tokens, groups_of(labels)) <= max_error + 1e-9
        if num_groups > 1:
            one_fewer = qm.cut_linkage(tree, num_groups=num_groups - 1)
            assert oracle.ward_error(tokens, groups_of(one_fewer)) > max_error

    def test_error_bound_allows_for_rounding(self):
        # Two orthogonal tokens have distance √2. Their merge adds (√2)² / 2 = 1 to the
        # squared error, which is 0.5 for each of the two tokens.
        tree = qm.linkage(np.eye(2), "ward")
        assert tree[0, 2] ** 2 / 2 > 1  # √2 is rounded up here
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.5), [0, 0])
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.499), [0, 1])

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
        with pytest.raises(ValueError, match="exactly one of"):
            qm.cut_linkage(tree)
        with pytest.raises(ValueError, match="exactly one of"):
            qm.cut_linkage(tree, num_groups=2, max_error=0.1)
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
        mass = masses(rng, (4, 11))
        tree = qm.linkage(tokens, "ward", mass=mass, mask=mask)
        counts = np.array([5, 3, 2, 1])
        labels_by_k = qm.cut_linkage(tree, num_groups=counts, mask=mask)
        labels_by_error = qm.cut_linkage(tree, max_error=0.3, mass=mass, mask=mask)
        for b, valid in enumerate(mask):
            tree_without_padding = qm.linkage(
                tokens[b, valid], "ward", mass=mass[b, valid]
            )
            wanted = qm.cut_linkage(tree_without_padding, num_groups=int(counts[b]))
            np.testing.assert_array_equal(labels_by_k[b, valid], wanted)
            wanted = qm.cut_linkage(
                tree_without_padding, max_error=0.3, mass=mass[b, valid]
            )
            np.testing.assert_array_equal(labels_by_error[b, valid], wanted)
            assert (labels_by_k[b, ~valid] == -1).all()
            assert (labels_by_error[b, ~valid] == -1).all()

    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_with_masses(self, rng, max_error):
        tokens, mass = rng.standard_normal((30, 6)), masses(rng, 30)
        mass[3] = 0  # counts as a millionth of the largest
        tree = qm.linkage(tokens, "ward", mass=mass)
        labels = qm.cut_linkage(tree, max_error=max_error, mass=mass)
        error = oracle.weighted_error(tokens, groups_of(labels), mass)
        assert error <= max_error + 1e-9
        if labels.max() > 0:
            one_fewer = groups_of(qm.cut_linkage(tree, num_groups=int(labels.max())))
            assert oracle.weighted_error(tokens, one_fewer, mass) > max_error

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
        with pytest.raises(
            ValueError, match=r"`mass` must have shape \(B, N\) = \(2, 6"
        ):
            qm.cut_linkage(tree, max_error=0.2, mass=np.ones(6), mask=mask)
        # An infinite height is allowed only in a row of padding.
        tree[0, 1, 2] = np.inf
        with pytest.raises(ValueError, match=r"finite, got inf at index \(0, 1, 2\)"):
            qm.cut_linkage(tree, num_groups=2, mask=mask)
