"""The reconstruction error: against the oracle, with padding, and of zeros."""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


@pytest.mark.parametrize("labelled", [True, False])
def test_reconstruction_error_against_the_oracle(rng, dtype, labelled):
    tokens = rng.standard_normal((2, 14, 4)).astype(dtype)
    labels = qm.cluster_tokens(tokens, 5)
    merged = qm.merge_tokens(tokens, labels, 5)
    got = qm.reconstruction_error(tokens, merged, labels=labels if labelled else None)
    assert got.dtype == np.result_type(dtype, np.float32)
    for b in range(2):
        wanted = oracle.reconstruction_error(
            tokens[b], merged[b], labels[b] if labelled else None
        )
        assert_close(got[b], wanted, dtype)


@pytest.mark.parametrize("labelled", [True, False])
def test_padded_tokens_do_not_count_and_padded_groups_rebuild_none(rng, labelled):
    tokens, merged = rng.random((2, 9, 3)), -rng.random((2, 4, 3))
    mask = np.array([[True] * 9, [True] * 6 + [False] * 3])
    counts = np.array([4, 2])
    # Tokens are positive and merged tokens negative, so every similarity is below 0.
    # The padded groups are zeros. Their similarity is 0, so they would be the most
    # similar merged tokens if they were read.
    merged[1, 2:] = 0
    labels = rng.integers(0, 2, (2, 9))
    got = qm.reconstruction_error(
        tokens,
        merged,
        labels=labels if labelled else None,
        num_groups=counts,
        mask=mask,
    )
    without_padding = qm.reconstruction_error(
        tokens[1, :6], merged[1, :2], labels=labels[1, :6] if labelled else None
    )
    assert_close(got[1], without_padding)
    assert (
        without_padding > 1
    )  # worse than rebuilding zeros, since the signs are opposite


def test_a_sequence_of_zeros_has_error_0_or_inf():
    zeros = np.zeros((3, 2))
    labels = np.zeros(3, int)
    assert qm.reconstruction_error(zeros, np.zeros((1, 2)), labels=labels) == 0
    # The error is inf, even if zeros are rebuilt as 1e-200. Its square is 0 in float64.
    for value in (1.0, 1e-200):
        merged = np.full((1, 2), value)
        assert qm.reconstruction_error(zeros, merged, labels=labels) == np.inf


def test_bad_input(rng):
    tokens = rng.standard_normal((2, 6, 3))
    with pytest.raises(ValueError, match=r"`gamma` must lie in \[0, 1\]"):
        qm.fidelity_loss(tokens, tokens, gamma=1.2)
    with pytest.raises(ValueError, match=r"`merged` must have shape \(B, K, D\)"):
        qm.reconstruction_error(tokens, tokens[..., :2])
    with pytest.raises(TypeError, match="`merged` must be float64 like `tokens`"):
        qm.reconstruction_error(tokens, tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"`num_groups` must lie in 1..6"):
        qm.norm_mass(tokens, 7)
    with pytest.raises(ValueError, match="`labels` must lie in"):
        qm.reconstruction_error(
            tokens, tokens, labels=np.full((2, 6), 3), num_groups=np.array([2, 6])
        )
