import numpy as np
import oracle
import pytest
from clustering_cases import groups_of, masses, ragged_mask

import qm_cupy as qm


class TestCutLinkage:
    @pytest.mark.parametrize("max_error", [0, 0.05, 0.3, 0.7, 1.0])
    def test_error_bound_is_met_and_tight(self, rng, max_error):
        tokens = rng.standard_normal((30, 6))
        tree = qm.linkage(tokens, "ward")
        labels = qm.cut_linkage(tree, max_error=max_error)
        # Within the bound, and one group fewer would exceed it.
        num_groups = labels.max() + 1
        assert oracle.ward_error(tokens, groups_of(labels)) <= max_error + 1e-9
        if num_groups > 1:
            fewer = qm.cut_linkage(tree, num_groups=num_groups - 1)
            assert oracle.ward_error(tokens, groups_of(fewer)) > max_error

    def test_error_bound_is_met_to_rounding(self):
        # Two orthogonal tokens at distance √2: merging them costs 2 / 2 = 1, which is
        # 0.5 for each token.
        tree = qm.linkage(np.eye(2), "ward")
        assert tree[0, 2] ** 2 / 2 > 1  # √2 rounded up
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.5), [0, 0])
        np.testing.assert_array_equal(qm.cut_linkage(tree, max_error=0.499), [0, 1])

    def test_batch_cut_at_its_own_k(self, rng):
        tree = qm.linkage(rng.standard_normal((3, 12, 4)))
        labels = qm.cut_linkage(tree, num_groups=np.array([1, 5, 12]))
        assert labels.dtype == np.int32
        assert list(labels.max(axis=-1) + 1) == [1, 5, 12]
        np.testing.assert_array_equal(labels[2], np.arange(12))  # K = N: no merge

    def test_orders(self):
        # Groups {0, 3} and {1, 2}: the first has the earlier first member and the later
        # last member.
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
        for node in (0, 5):  # a token, and the group of the first row
            twice = np.array(
                [[0, 1, 0, 2], [2, 5, 0, 3], [3, node, 0, 2], [4, 7, 0, 5]]
            )
            with pytest.raises(ValueError, match=r"`dendrogram` must merge .*once"):
                qm.cut_linkage(np.stack([tree, twice.astype(float)]), num_groups=2)

    def test_mask_is_cutting_out(self, rng):
        # The labels of valid tokens are those of the sequence without its padding.
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
        mass[3] = 0  # counts as a millionth of the largest
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
            ValueError, match=r"`mask` must have shape \(B, N\) = \(2, 6"
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
