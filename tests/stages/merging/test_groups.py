import numpy as np
import pytest

import qm_cupy as qm


@pytest.fixture
def problem(rng):
    tokens = rng.standard_normal((2, 20, 5))
    labels = qm.cluster_tokens(tokens, 6)
    return tokens, labels, rng.random((2, 20))


def test_sizes_and_positions(problem):
    _, labels, _ = problem
    sizes, positions = qm.group_sizes(labels, 6), qm.group_positions(labels, 6)
    assert sizes.dtype == positions.dtype == np.int32
    for b in range(2):
        for k in range(6):
            members = np.flatnonzero(labels[b] == k)  # ascending
            assert sizes[b, k] == len(members)
            # The last member: a merged token must not contain a later token.
            assert positions[b, k] == members[-1]
