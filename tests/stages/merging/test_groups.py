"""Sizes and positions of groups, compared with a search for the members."""

import numpy as np
import pytest

import qm_cupy as qm


@pytest.fixture
def problem(rng):
    """Return tokens (2, 20, 5), labels (2, 20) of 6 groups, and mass (2, 20)."""
    tokens = rng.standard_normal((2, 20, 5))
    labels = qm.cluster_tokens(tokens, 6)
    return tokens, labels, rng.random((2, 20))


def test_size_and_position_of_every_group(problem):
    _, labels, _ = problem
    sizes, positions = qm.group_sizes(labels, 6), qm.group_positions(labels, 6)
    assert sizes.dtype == positions.dtype == np.int32
    for b in range(2):
        for k in range(6):
            members = np.flatnonzero(labels[b] == k)  # ascending
            assert sizes[b, k] == len(members)
            # The position is that of the last member, so that a merged token contains
            # no token after its position.
            assert positions[b, k] == members[-1]
