import numpy as np
import oracle
import pytest
from clustering_cases import WEIGHTED, groups_of, low_rank, masses, ragged_mask

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES


class TestClusterTokens:
    @pytest.mark.parametrize("method", LINKAGES)
    def test_linkage_labels_are_cuts_of_the_dendrogram(self, rng, dtype, method):
        tokens = rng.standard_normal((2, 15, 4)).astype(dtype)
        got = qm.cluster_tokens(tokens, 4, method=method)
        tree = qm.linkage(tokens, method)
        np.testing.assert_array_equal(got, qm.cut_linkage(tree, num_groups=4))

    @pytest.mark.parametrize("num_groups", [1, 2, 5, 9, 16, 17])
    def test_bipartite_oracle(self, rng, num_groups):
        tokens = rng.standard_normal((17, 4))
        tokens[6] = 0  # its similarity with every other token is 0
        labels = qm.cluster_tokens(tokens, num_groups, method="bipartite")
        assert groups_of(labels) == oracle.bipartite(tokens, num_groups)

    def test_bipartite_oracle_among_many_ties(self, rng):
        tokens = np.eye(3)[rng.integers(0, 3, 400)]
        # At odd positions, axis 2 becomes zero. So a token of axis 2 at an even
        # position has similarity 0 with all of them.
        tokens[1::2, 2] = 0
        labels = qm.cluster_tokens(tokens, 300, method="bipartite")
        assert groups_of(labels) == oracle.bipartite(tokens, 300)

    @pytest.mark.parametrize("num_groups", [1, 2, 5, 9, 16, 17])
    def test_contiguous_oracle(self, rng, num_groups):
        tokens = rng.standard_normal((17, 4))
        tokens[[6, 7]] = 0  # each counts as a unit vector orthogonal to all others
        labels = qm.cluster_tokens(tokens, num_groups, method="contiguous")
        assert groups_of(labels) == oracle.contiguous(tokens, num_groups)
        assert (np.diff(labels) >= 0).all()  # a group has no gaps

    @pytest.mark.parametrize("anchors", [[3], [0, 16], [9, 2, 5, 11]])
    def test_nearest_oracle(self, rng, anchors):
        tokens = rng.standard_normal((17, 4))
        # In the last case, anchors 2 and 5 are equal tokens: each must keep its group.
        tokens[5] = tokens[2]
        labels = qm.cluster_tokens(
            tokens, len(anchors), method="nearest", anchors=np.array(anchors)
        )
        assert groups_of(labels) == oracle.nearest(tokens, anchors)

    @pytest.mark.parametrize("anchors", [[0, 2], [2, 0]])
    def test_nearest_joins_the_earlier_of_equally_similar_anchors(self, anchors):
        # Token 1 is equally similar to the anchors 0 and 2. It must join anchor 0 for
        # both orders of the argument `anchors`.
        tokens = np.array([[1.0, 0], [1, 1], [0, 1]])
        labels = qm.cluster_tokens(
            tokens, 2, method="nearest", anchors=np.array(anchors)
        )
        np.testing.assert_array_equal(labels, [0, 0, 1])

    def test_default_anchors_of_nearest_have_the_largest_norms(self, rng):
        tokens = rng.standard_normal((2, 12, 4))
        norms = np.linalg.norm(tokens, axis=-1)
        wanted = qm.cluster_tokens(
            tokens, 3, method="nearest", anchors=qm.select_tokens(norms, 3)
        )
        got = qm.cluster_tokens(tokens, 3, method="nearest")
        np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("order", ["last", "first"])
    def test_masked_labels_equal_those_of_valid_tokens(self, rng, method, order):
        tokens = rng.standard_normal((3, 14, 4))
        # Padding is anywhere, at the start too. The first five entries make at least
        # four tokens valid, because the largest K is 4.
        mask = rng.random((3, 14)) < 0.6
        mask[:, :5] = [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
        counts = np.array([4, 1, 3])
        got = qm.cluster_tokens(tokens, counts, method=method, mask=mask, order=order)
        for b in range(3):
            without_padding = qm.cluster_tokens(
                tokens[b, mask[b]], int(counts[b]), method=method, order=order
            )
            np.testing.assert_array_equal(got[b, mask[b]], without_padding)
            assert (got[b, ~mask[b]] == -1).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_equal_and_zero_tokens_form_exactly_k_groups(self, method):
        # Many distances are equal here, so that ties decide which groups merge.
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
        # Wrong anchors: twice the same position, in the padding, after the sequence,
        # too few, and for another method.
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
    def test_weighted_labels_are_cuts_of_the_dendrogram(self, rng, method, dtype):
        tokens = rng.standard_normal((3, 14, 4)).astype(dtype)
        mask, mass = ragged_mask(rng, 3, 14), masses(rng, (3, 14)).astype(dtype)
        counts = np.array([4, 2, 1])
        got = qm.cluster_tokens(tokens, counts, method=method, mass=mass, mask=mask)
        tree = qm.linkage(tokens, method, mass=mass, mask=mask)
        wanted = qm.cut_linkage(tree, num_groups=counts, mask=mask)
        np.testing.assert_array_equal(got, wanted)

    @pytest.mark.parametrize("make", [low_rank, np.random.Generator.standard_normal])
    def test_masses_lower_the_weighted_error(self, make):
        """The error must be below 0.92 of the error of ward without masses, on average.

        Measured: 0.82 and 0.83 on average for the two cases of tokens, at most 0.98.
        """
        ratios = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            tokens = make(rng, 60) if make is low_rank else make(rng, (60, 16))
            mass = masses(rng, 60)
            plain, weighted = (
                qm.cluster_tokens(tokens, 12, method="ward", mass=x)
                for x in (None, mass)
            )
            error = oracle.weighted_error(tokens, groups_of(weighted), mass)
            ratios.append(error / oracle.weighted_error(tokens, groups_of(plain), mass))
        assert np.mean(ratios) < 0.92
        # Ward is greedy: it never undoes a merge. So masses may raise the error of a
        # single case.
        assert np.max(ratios) < 1.1


class TestProtect:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("order", ["last", "first"])
    def test_other_tokens_are_grouped_without_protected_ones(self, rng, method, order):
        tokens, mask = rng.standard_normal((4, 16, 4)), ragged_mask(rng, 4, 16)
        protect = np.zeros((4, 16), bool)
        protect[:, [0, 1, 7]] = True  # some of these are padding
        counts = np.where(mask.sum(axis=-1) == 1, 1, 7)
        options = {"method": method, "order": order}
        got = qm.cluster_tokens(tokens, counts, protect=protect, mask=mask, **options)
        assert (got[~mask] == -1).all()
        for b in range(4):
            free = mask[b] & ~protect[b]
            protected = mask[b] & protect[b]
            # There are exactly K labels, in the order of first or last members.
            labels, first = np.unique(got[b, mask[b]], return_index=True)
            np.testing.assert_array_equal(labels, np.arange(counts[b]))
            last = [np.flatnonzero(got[b] == k)[-1] for k in labels]
            assert (np.diff(first if order == "first" else last) > 0).all()
            # A group of a protected token has no other token.
            assert not set(got[b, protected]) & set(got[b, free])
            assert len(set(got[b, protected])) == protected.sum()
            # The other tokens form the same groups as if the sequence had no protected
            # tokens. Contiguous groups may differ: no group spans a protected token.
            if method != "contiguous" and free.any():
                free_labels = qm.cluster_tokens(
                    tokens[b, free], int(counts[b]) - int(protected.sum()), **options
                )
                free_groups = [
                    set(np.flatnonzero(free_labels == k)) for k in set(free_labels)
                ]
                assert free_groups == [
                    set(np.flatnonzero(got[b, free] == k))
                    for k in sorted(set(got[b, free]))
                ]

    @pytest.mark.parametrize("method", WEIGHTED)
    def test_the_mass_of_protected_tokens_does_not_matter(self, rng, method):
        tokens, mass = rng.standard_normal((12, 4)), masses(rng, 12)
        protect = np.arange(12) == 4
        # Masses below a millionth of the largest mass are raised to it. If the mass
        # 1e30 of the protected token counted, all other masses would become equal.
        heavy = np.where(protect, 1e30, mass)
        labels = [
            qm.cluster_tokens(tokens, 5, method=method, mass=x, protect=protect)
            for x in (mass, heavy)
        ]
        np.testing.assert_array_equal(*labels)

    # The 4 protected tokens need 4 groups. The others form 3 runs, {1..4}, {7..11} and
    # {13..16}, which need at least 3 groups.
    @pytest.mark.parametrize("num_groups", [7, 8, 9, 12, 17])
    def test_contiguous_groups_never_span_protected_tokens(self, rng, num_groups):
        tokens, protected = rng.standard_normal((17, 4)), [0, 5, 6, 12]
        protect = np.isin(np.arange(17), protected)
        labels = qm.cluster_tokens(
            tokens, num_groups, method="contiguous", protect=protect
        )
        wanted = oracle.contiguous(tokens, num_groups, protected)
        assert groups_of(labels) == wanted

    def test_contiguous_tokens_on_both_sides_of_padding_merge(self, rng):
        mask = np.arange(6) != 2
        protect = ~mask  # token 2 is both: padding wins
        labels = qm.cluster_tokens(
            np.ones((6, 2)), 1, method="contiguous", mask=mask, protect=protect
        )
        np.testing.assert_array_equal(labels, [0, 0, -1, 0, 0, 0])

    def test_default_anchors_include_protected_tokens(self, rng):
        tokens = rng.standard_normal((2, 12, 4))
        protect = np.arange(12) < [[2], [1]]
        tokens[protect] *= 1e-3  # so small that only `protect` selects them
        # `select_tokens` accepts only finite scores: 1e9 is above every norm.
        scores = np.where(protect, np.inf, np.linalg.norm(tokens, axis=-1))
        anchors = qm.select_tokens(np.minimum(scores, 1e9), 5)
        wanted, got = (
            qm.cluster_tokens(tokens, 5, method="nearest", protect=protect, anchors=x)
            for x in (anchors, None)
        )
        np.testing.assert_array_equal(got, wanted)
        for b in range(2):
            assert np.isin(np.flatnonzero(protect[b]), anchors[b]).all()

    def test_no_token_joins_a_protected_anchor(self):
        # Token 3 equals the protected token 0, and token 1 is similar to it. Both must
        # join anchor 2, the only one that is not protected.
        tokens = np.array([[1.0, 0], [1, 0.1], [0, 1], [1, 0]])
        protect = np.array([True, False, False, False])
        labels = qm.cluster_tokens(
            tokens, 2, method="nearest", anchors=np.array([0, 2]), protect=protect
        )
        np.testing.assert_array_equal(labels, [0, 1, 1, 1])

    @pytest.mark.parametrize("method", METHODS)
    def test_protected_tokens_among_equal_tokens(self, method):
        # All distances are 0, so only `protect` keeps tokens 0, 1 and 5 separate.
        protect = np.array([True, True, False, False, False, True])
        labels = qm.cluster_tokens(np.ones((6, 2)), 4, method=method, protect=protect)
        np.testing.assert_array_equal(labels, [0, 1, 2, 2, 2, 3])
        # Every token is protected, then none.
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
    def test_k_must_allow_a_group_for_each_protected_token(self, rng, method):
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
        mask = np.arange(7) < [[7], [3]]  # row 1 keeps only protected tokens
        counts = np.array([2, 3])
        labels = qm.cluster_tokens(
            tokens, counts, method=method, protect=protect, mask=mask
        )
        np.testing.assert_array_equal(labels[1], [0, 1, 2, -1, -1, -1, -1])

    def test_bad_input(self, rng):
        tokens = rng.standard_normal((2, 7, 3))
        protect = np.zeros((2, 7), bool)
        # Tokens 2 and 4 separate {0, 1}, {3} and {5, 6}: 2 + 3 groups at least.
        protect[0, [2, 4]], protect[1, [0, 1]] = True, True
        with pytest.raises(
            ValueError, match=r"at least 5, got 3: the 2 protected tokens .* 3 runs"
        ):
            qm.cluster_tokens(tokens[0], 3, method="contiguous", protect=protect[0])
        with pytest.raises(TypeError, match=r"`protect` must be boolean .* got int64"):
            qm.cluster_tokens(tokens, 3, protect=protect.astype(np.int64))
        with pytest.raises(TypeError, match=r"boolean or have .* got float64"):
            qm.cluster_tokens(tokens, 3, protect=protect.astype(float))
        wrong = r"`protect` must have shape \(N\) = \(7,\) or \(B, N\) = \(2, 7\), got"
        with pytest.raises(ValueError, match=wrong):
            qm.cluster_tokens(tokens, 3, protect=protect[0, :6])
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
