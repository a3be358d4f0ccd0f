"""`merge_tokens`: means of groups, masses, dtypes, padding, `out` and checks.

A merged token is Σ m_j x_j / Σ m_j over the members j of a group, with the masses m and
the tokens x. The oracle (oracle.py) computes it with plain float64 loops. B sequences
have N tokens of width D, in K groups.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


@pytest.fixture
def problem(rng):
    """Return tokens (2, 20, 5), labels (2, 20) of 6 groups, and mass (2, 20)."""
    tokens = rng.standard_normal((2, 20, 5))
    labels = qm.cluster_tokens(tokens, 6)
    return tokens, labels, rng.random((2, 20))


def test_merged_tokens_match_the_oracle(problem, dtype):
    tokens, labels, mass = problem
    tokens, mass = tokens.astype(dtype), mass.astype(dtype)
    got = qm.merge_tokens(tokens, labels, 6, mass=mass)
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    for b in range(2):
        groups = [list(np.flatnonzero(labels[b] == k)) for k in range(6)]
        wanted = oracle.merge(tokens[b], groups, mass[b])
        assert_close(got[b], wanted, dtype, "stored")


def test_without_mass_a_group_gets_the_plain_mean(problem):
    tokens, labels, _ = problem
    got = qm.merge_tokens(tokens, labels, 6)
    assert_close(got[1, 3], tokens[1, labels[1] == 3].mean(axis=0))


def test_group_of_mass_zero_gets_the_plain_mean():
    tokens = np.array([[1.0], [3.0], [8.0]])
    mass = np.array([0.0, 0.0, 0.0])
    merged = qm.merge_tokens(tokens, np.array([0, 0, 1]), 2, mass=mass)
    np.testing.assert_array_equal(merged, [[2.0], [8.0]])  # (1 + 3) / 2 and 8


def test_float16_tokens_are_summed_in_float32():
    tokens = np.full((3000, 1), 60000, np.float16)  # the sum overflows float16
    labels = np.zeros(3000, np.int32)
    assert qm.merge_tokens(tokens, labels, 1)[0, 0] == 60000


def test_float16_masses_are_summed_in_float64():
    """In float16, 60000 + 1 is 60000, and 1 / 60000 has an error of 0.1 %."""
    tokens = np.array([[0.0]] + [[1.0]] * 512, np.float32)
    mass = np.array([60000.0] + [1.0] * 512, np.float16)
    merged = qm.merge_tokens(tokens, np.zeros(513, int), 1, mass=mass)
    # One token of value 0 and mass 60000, and 512 tokens of value 1 and mass 1
    np.testing.assert_allclose(merged, [[512 / 60512]], rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0**1022, 2.0**-1074])
def test_largest_and_smallest_masses(scale):
    # For the large scale the sums of the masses would overflow; for the small one, 1 /
    # sum would. The ratios of the masses are 1 : 3 and 1 : 1 in the first two groups.
    tokens = np.array([[0.0], [4.0], [5.0], [7.0], [1.0]])
    mass = np.array([1.0, 3.0, 3.0, 3.0, 1.0]) * [scale, scale, scale, scale, 1]
    merged = qm.merge_tokens(tokens, np.array([0, 0, 1, 1, 2]), 3, mass=mass)
    assert_close(merged, [[3.0], [6.0], [1.0]])


def test_large_tokens_and_masses_do_not_overflow():
    # The sum of the tokens and their products with the masses are beyond float32.
    tokens = np.full((4, 1), 3e38, np.float32)
    mass = np.full(4, 1e38, np.float32)
    merged = qm.merge_tokens(tokens, np.zeros(4, int), 1, mass=mass)
    np.testing.assert_allclose(merged, 3e38, rtol=1e-6)


def test_padding_and_groups_without_members():
    tokens = np.array([[1.0], [9.0], [5.0]])
    labels = np.array([0, -1, 2])
    merged = qm.merge_tokens(tokens, labels, 4)
    # Groups 1 and 3 have no members: their token is 0, their size 0, their position -1.
    np.testing.assert_array_equal(merged.ravel(), [1, 0, 5, 0])
    np.testing.assert_array_equal(qm.group_sizes(labels, 4), [1, 0, 1, 0])
    np.testing.assert_array_equal(qm.group_positions(labels, 4), [0, -1, 2, -1])
    np.testing.assert_array_equal(qm.unmerge_tokens(merged, labels).ravel(), [1, 0, 5])


def test_k_of_each_sequence_is_padded_to_the_largest(problem):
    tokens, _, _ = problem
    counts = np.array([2, 5])
    # Rows 2 to 4 of the first sequence have no group.
    labels = qm.cluster_tokens(tokens, counts)
    merged = qm.merge_tokens(tokens, labels, counts)
    assert merged.shape == (2, 5, 5)
    assert not merged[0, 2:].any()
    assert list((qm.group_sizes(labels, counts) > 0).sum(axis=-1)) == [2, 5]


def test_empty_batch_has_k_groups():
    # There are no labels, so K comes from the argument.
    tokens, labels = np.ones((0, 5, 3)), np.zeros((0, 5), int)
    assert qm.merge_tokens(tokens, labels, 2).shape == (0, 2, 3)
    assert qm.group_sizes(labels, 2).shape == (0, 2)
    assert qm.group_positions(labels, 2).shape == (0, 2)


def test_label_must_be_below_k_of_its_sequence():
    # Label 4 is below K = 5 of sequence 1, but not below K = 2 of sequence 0.
    labels, counts = np.array([[0, 4], [0, 4]]), np.array([2, 5])
    calls = (
        lambda: qm.group_sizes(labels, counts),
        lambda: qm.group_positions(labels, counts),
        lambda: qm.merge_tokens(np.ones((2, 2, 3)), labels, counts),
    )
    for call in calls:
        with pytest.raises(ValueError, match="`labels` must lie in"):
            call()
    # All labels modulo 4 are 0, which is below both K.
    np.testing.assert_array_equal(
        qm.group_sizes(labels % 4, counts), [[2, 0, 0, 0, 0]] * 2
    )


def test_read_only_and_strided_inputs(problem):
    tokens, labels, mass = problem
    wanted = qm.merge_tokens(tokens, labels, 6, mass=mass)
    # Column-major, read-only tokens and 8-bit labels must give the same bits.
    strided = np.asfortranarray(tokens)[:, ::-1][:, ::-1]
    strided.flags.writeable = False
    np.testing.assert_array_equal(
        qm.merge_tokens(strided, labels.astype(np.uint8), 6, mass=mass), wanted
    )


def test_out_gets_the_result_and_is_returned(problem):
    tokens, labels, _ = problem
    # An element that is not written would remain NaN.
    out = np.full((2, 6, 5), np.nan)
    assert qm.merge_tokens(tokens, labels, 6, out=out) is out
    np.testing.assert_array_equal(out, qm.merge_tokens(tokens, labels, 6))
    rebuilt = np.full((2, 20, 5), np.nan)
    assert qm.unmerge_tokens(out, labels, out=rebuilt) is rebuilt
    np.testing.assert_array_equal(rebuilt, qm.unmerge_tokens(out, labels))


def test_wrong_arguments_are_refused(problem):
    tokens, labels, mass = problem  # labels within 0..5
    with pytest.raises(ValueError, match=r"`labels` must lie in -1..4, got 0..5"):
        qm.merge_tokens(tokens, labels, 5)
    with pytest.raises(TypeError, match="`labels` must be integers, got float64"):
        qm.merge_tokens(tokens, labels.astype(float), 6)
    with pytest.raises(
        ValueError, match=r"`mass` must have shape \(B, N\) = \(2, 20\), got \(2, 19\)"
    ):
        qm.merge_tokens(tokens, labels, 6, mass=mass[:, :19])
    with pytest.raises(ValueError, match="`mass` must be ≥ 0"):
        qm.merge_tokens(tokens, labels, 6, mass=-mass)
    with pytest.raises(TypeError, match="`out` must be float64"):
        qm.merge_tokens(tokens, labels, 6, out=np.empty((2, 6, 5), np.float32))
    with pytest.raises(ValueError, match="`out` must have shape"):
        qm.merge_tokens(tokens, labels, 6, out=np.empty((2, 7, 5)))
    with pytest.raises(ValueError, match="C-contiguous"):
        qm.merge_tokens(tokens, labels, 6, out=np.empty((5, 6, 2)).T)
    with pytest.raises(ValueError, match=r"`labels` must lie in -1..2"):
        qm.unmerge_tokens(np.ones((2, 3, 5)), labels)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(N\) or \(B, N\)"):
        qm.group_sizes(labels[None], 6)
