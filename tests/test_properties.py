"""Properties of all inputs, checked on random ones."""

import numpy as np
import oracle_arrays
import pytest
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.labels import ORDERS
from qm_cupy.stages.clustering.linkage import LINKAGES

seeds = st.integers(0, 2**32 - 1)
methods = st.sampled_from(METHODS)


@st.composite
def problems(draw, max_tokens=24):
    """Draw tokens, sometimes with zero or equal ones, and K."""
    rng = np.random.default_rng(draw(seeds))
    num_tokens = draw(st.integers(1, max_tokens))
    tokens = rng.standard_normal((num_tokens, draw(st.integers(1, 6))))
    if draw(st.booleans()):
        tokens = np.round(tokens)  # zeros, equal tokens, equal distances
    return tokens, draw(st.integers(1, num_tokens))


@given(problems(), methods, st.sampled_from(ORDERS))
def test_there_are_k_groups_in_order_and_none_is_empty(problem, method, order):
    tokens, num_groups = problem
    labels = qm.cluster_tokens(tokens, num_groups, method=method, order=order)
    present, first = np.unique(labels, return_index=True)
    np.testing.assert_array_equal(present, np.arange(num_groups))
    last = qm.group_positions(labels, num_groups)
    # The order of the groups is that of their last or of their first members.
    assert (np.diff(last if order == "last" else first) > 0).all()
    assert qm.group_sizes(labels, num_groups).sum() == len(tokens)


@given(problems(), methods)
def test_causal(problem, method):
    """With order="last" no group contains a token later than its own position."""
    tokens, num_groups = problem
    labels = qm.cluster_tokens(tokens, num_groups, method=method)
    positions = qm.group_positions(labels, num_groups)
    assert (np.arange(len(tokens)) <= positions[labels]).all()


# Similarity does not depend on positions, so a permutation moves labels with tokens.
# Ties would: they go by index.
@given(seeds, st.integers(2, 24), st.sampled_from(LINKAGES), st.data())
def test_clustering_is_permutation_equivariant(seed, num_tokens, method, data):
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((num_tokens, 5))  # no two distances equal
    num_groups = data.draw(st.integers(1, num_tokens))
    shuffle = rng.permutation(num_tokens)
    labels = qm.cluster_tokens(tokens, num_groups, method=method)
    moved = qm.cluster_tokens(tokens[shuffle], num_groups, method=method)
    same_group = labels[:, None] == labels
    np.testing.assert_array_equal(
        # Group numbers may change, so pairs in the same group are compared.
        moved[:, None] == moved,
        same_group[np.ix_(shuffle, shuffle)],
    )


@given(problems(), methods, seeds)
def test_merge_of_constants_is_constant(problem, method, seed):
    tokens, num_groups = problem
    labels = qm.cluster_tokens(tokens, num_groups, method=method)
    mass = np.random.default_rng(seed).random(len(tokens))
    constant = np.full((len(tokens), 3), 0.7)
    merged = qm.merge_tokens(constant, labels, num_groups, mass=mass)
    # The weighted mean of equal values is that value, up to rounding.
    np.testing.assert_allclose(merged, 0.7, rtol=1e-14)


# Merge and unmerge together are a projection: every token becomes its group's mean.
@given(problems(), seeds)
def test_unmerge_after_merge_is_idempotent(problem, seed):
    tokens, num_groups = problem
    labels = qm.cluster_tokens(tokens, num_groups)
    mass = np.random.default_rng(seed).random(len(tokens))

    def project(x):
        merged = qm.merge_tokens(x, labels, num_groups, mass=mass)
        return qm.unmerge_tokens(merged, labels)

    once = project(tokens)
    np.testing.assert_allclose(project(once), once, rtol=1e-12, atol=1e-13)


@given(problems(), methods)
def test_all_groups_kept_is_the_identity(problem, method):
    tokens, _ = problem
    merged = qm.quickmerge(tokens, len(tokens), method=method)
    np.testing.assert_array_equal(merged.labels, np.arange(len(tokens)))
    # Bit for bit: a group of one token is that token.
    np.testing.assert_array_equal(merged.tokens, tokens)


@given(seeds, st.integers(1, 40), st.floats(1e-3, 1e3))
def test_probabilities_sum_to_one(seed, num_tokens, temperature):
    saliency = np.random.default_rng(seed).random((3, num_tokens))
    soft = qm.gumbel_softmax(saliency, temperature=temperature, seed=seed)
    np.testing.assert_allclose(soft.sum(axis=-1), 1, rtol=1e-12)
    assert (soft >= 0).all()


# Ones for exactly K tokens, whatever the noise is.
@given(seeds, st.integers(1, 40), st.data())
def test_hard_is_k_hot(seed, num_tokens, data):
    num_groups = data.draw(st.integers(1, num_tokens))
    saliency = np.random.default_rng(seed).random((3, num_tokens))
    hard = qm.gumbel_softmax(saliency, seed=seed, hard=num_groups)
    assert set(np.unique(hard)) <= {0, 1}
    assert (hard.sum(axis=-1) == num_groups).all()


@given(problems(), methods, st.integers(1, 5), seeds)
def test_padding_acts_like_removing_tokens(problem, method, padding, seed):
    tokens, num_groups = problem
    rng = np.random.default_rng(seed)
    # Padding contains random values.
    padded = rng.standard_normal((len(tokens) + padding, tokens.shape[1]))
    mask = rng.permutation(len(padded)) < len(tokens)
    padded[mask] = tokens
    cut = qm.quickmerge(tokens, num_groups, method=method)
    got = qm.quickmerge(padded, num_groups, method=method, mask=mask)
    np.testing.assert_array_equal(got.labels[mask], cut.labels)
    np.testing.assert_allclose(got.tokens, cut.tokens, rtol=1e-12, atol=1e-13)
    index = np.flatnonzero(mask)
    np.testing.assert_array_equal(got.positions, index[cut.positions])


@given(problems(), st.floats(0, 1))
def test_ward_cut_stays_within_its_error(problem, max_error):
    tokens, _ = problem
    # The error is relative to unit tokens, and a zero token has no direction.
    tokens = tokens[np.any(tokens != 0, axis=-1)]
    if not len(tokens):
        return
    labels = qm.cluster_tokens(tokens, max_error=max_error, method="ward")
    # Recomputed from its definition: the mean of ||u_i - mean of the group||^2.
    unit = oracle_arrays.unit(tokens)
    num_groups = int(labels.max()) + 1
    centres = qm.unmerge_tokens(qm.merge_tokens(unit, labels, num_groups), labels)
    assert np.sum((unit - centres) ** 2) / len(unit) <= max_error + 1e-9


# An entropy of N probabilities lies in 0..log N.
@given(problems())
def test_entropy_is_within_its_range(problem):
    tokens, _ = problem
    entropy = qm.self_attention_entropy(tokens)
    assert (entropy >= 0).all()
    assert (entropy <= np.log(len(tokens)) + 1e-12).all()


# The order of additions is fixed, so two runs agree in every bit.
@given(problems(), methods, st.sampled_from(["float16", "float32", "float64"]), seeds)
def test_same_seed_same_bits(problem, method, dtype, seed):
    tokens, num_groups = problem
    first, again = (
        qm.quickmerge(
            tokens.astype(dtype),
            num_groups,
            method=method,
            weights="mass",
            noise_seed=seed,
        )
        for _ in range(2)
    )
    assert all(x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_tight_clusters_are_recovered(rng, method):
    """Each method recovers four tight directions, far apart and in runs."""
    centres = np.linalg.qr(rng.standard_normal((8, 4)))[0].T  # orthogonal directions
    # Runs of neighbours, so that "contiguous" can recover them too.
    tokens = np.repeat(centres, 10, axis=0) + 0.01 * rng.standard_normal((40, 8))
    anchors = np.array([0, 10, 20, 30]) if method == "nearest" else None
    labels = qm.cluster_tokens(tokens, 4, method=method, anchors=anchors)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(4), 10))


@pytest.mark.parametrize(
    "measure",
    [
        qm.norm_saliency,
        qm.norm_budget,
        lambda x: qm.norm_mass(x, 3),
        lambda x: qm.cluster_tokens(x, 3, method="nearest"),
        lambda x: qm.linkage(x),
        lambda x: qm.reconstruction_error(x, x[:, :3]),
        lambda x: qm.reconstruction_error(x, 0 * x[:, :3]),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", 1e20), ("float32", 1e-25), ("float64", 1e200), ("float64", 1e-200)],
)
def test_no_square_overflows_or_vanishes(rng, measure, dtype, scale):
    """Relative results do not change for very long and very short tokens."""
    # 1e20 squared overflows float32 (3e38), and 1e-25 squared becomes 0.
    tokens = rng.standard_normal((2, 9, 4)).astype(dtype)
    scaled = tokens * np.array([scale, 1], dtype)[:, None, None]  # sequence 0 only
    assert_close(measure(scaled), measure(tokens), dtype)
