import numpy as np
import oracle
import pytest
from clustering_cases import WEIGHTED, groups_of, low_rank, masses
from conftest import assert_close
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy.stages.clustering import weighted_linkage as module
from qm_cupy.stages.clustering.weighted_linkage import weighted_linkage


@pytest.mark.parametrize("method", WEIGHTED)
class TestWeightedLinkage:
    @pytest.mark.parametrize("case", ["gauss", "low rank", "orthogonal", "zeros"])
    def test_every_merge_is_the_cheapest(self, rng, method, case):
        tokens = {
            "gauss": rng.standard_normal((24, 5)),
            "low rank": low_rank(rng, 24),
            "orthogonal": np.eye(24),
            "zeros": rng.standard_normal((24, 5)) * (np.arange(24) % 8 > 0)[:, None],
        }[case]
        if method == "average" and case in ("orthogonal", "zeros"):
            return  # with equal distances, any order of merges is right
        mass = masses(rng, 24)
        mass[5] = 0  # counts as a millionth of the largest
        tree = qm.linkage(tokens, method, mass=mass)
        assert hierarchy.is_valid_linkage(tree)
        # The oracle merges the closest pair of groups, one pair after another.
        merges = oracle.weighted_agglomerate(tokens, method, mass)
        np.testing.assert_allclose(tree[:, 2], [h for *_, h in merges], rtol=1e-7)
        for num_groups in range(1, 25):
            labels = qm.cut_linkage(tree, num_groups=num_groups)
            assert groups_of(labels) == oracle.partition(merges, 24, num_groups)

    def test_every_merge_is_among_the_cheapest_of_many_equal(self, rng, method):
        tokens = np.round(rng.standard_normal((30, 3)))  # zero tokens occur, too
        mass = rng.integers(1, 3, 30).astype(np.float64)
        tree = qm.linkage(tokens, method, mass=mass)
        assert hierarchy.is_valid_linkage(tree)
        units = oracle.orthogonal_units(tokens)
        clusters = {i: [i] for i in range(30)}
        # Many pairs have the same least distance, and any of them may merge. So each
        # merge is compared with the least distance of all pairs.
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
    def test_unit_masses_give_the_linkage_without_masses(
        self, rng, method, num_tokens, dtype
    ):
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
        wanted = qm.linkage(repeated, method)[-19:, 2]  # without merges of copies
        np.testing.assert_allclose(tree[:, 2], wanted, rtol=1e-6)
        for num_groups in (1, 3, 8, 20):
            labels = qm.cluster_tokens(
                tokens, num_groups, method=method, mass=repeats.astype(np.float64)
            )
            copies = qm.cluster_tokens(repeated, num_groups, method=method)
            np.testing.assert_array_equal(np.repeat(labels, repeats), copies)

    # Masses are divided by the largest one, so no scale may overflow or vanish.
    @pytest.mark.parametrize("scale", [1e-300, 1e-3, 1e6, 1e300])
    def test_the_scale_of_masses_only_scales_ward_heights(self, rng, method, scale):
        tokens, mass = rng.standard_normal((12, 5)), masses(rng, 12)
        tree = qm.linkage(tokens, method, mass=mass)
        scaled = qm.linkage(tokens, method, mass=mass * scale)
        heights = tree[:, 2] * (np.sqrt(scale) if method == "ward" else 1)
        np.testing.assert_allclose(scaled[:, 2], heights, rtol=1e-9)
        np.testing.assert_array_equal(scaled[:, :2], tree[:, :2])

    def test_masses_of_zero_count_as_equal_masses(self, rng, method):
        tokens = rng.standard_normal((12, 5))
        trees = [
            qm.linkage(tokens, method, mass=x) for x in (np.zeros(12), np.ones(12))
        ]
        np.testing.assert_array_equal(*trees)

    def test_a_token_of_mass_zero_joins_its_nearest_neighbour(self, rng, method):
        # Three clear groups of four tokens each. Two of the tokens have mass 0.
        tokens = np.repeat(np.eye(3), 4, axis=0) + 0.1 * rng.standard_normal((12, 3))
        mass = np.ones(12)
        mass[[0, 5]] = 0
        labels = qm.cluster_tokens(tokens, 3, method=method, mass=mass)
        np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))

    @pytest.mark.parametrize("equal_masses", [True, False])
    def test_equal_distances_do_not_need_many_rounds(self, rng, method, equal_masses):
        def rounds(distance):
            mass = (
                np.ones(256) if equal_masses else masses(np.random.default_rng(3), 256)
            )
            tree, count = weighted_linkage(distance, mass / mass.max(), method)
            assert hierarchy.is_valid_linkage(tree)
            return count

        tokens = low_rank(rng, 256)
        usual_rounds = rounds(1 - qm.cosine_similarity(tokens))
        # All distances are equal, exactly or to rounding. If ties went to the lower
        # index, each merge would need its own round.
        for rounding in (0.0, 1.5e-15, -1.5e-15):
            assert rounds(np.full((256, 256), rounding)) <= 3 * usual_rounds
        # Groups of equal tokens: one token 64 more times, and 64 tokens twice.
        for copies in (tokens[-1], tokens[64:128]):
            repeated = tokens.copy()
            repeated[:64] = copies
            assert rounds(1 - qm.cosine_similarity(repeated)) <= 3 * usual_rounds


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("pairs", [False, True])
def test_blocks_change_no_bits(rng, monkeypatch, method, pairs):
    """Merges of long sequences are computed in blocks, to save memory."""
    tokens = rng.standard_normal((90, 6))
    if pairs:  # one round merges half of the groups
        tokens[1::2] = tokens[::2]
    mass = masses(rng, 90)
    whole = qm.linkage(tokens, method, mass=mass)
    for entries in (1, 200, 500):
        monkeypatch.setattr(module, "_COPIED", entries)
        np.testing.assert_array_equal(qm.linkage(tokens, method, mass=mass), whole)
