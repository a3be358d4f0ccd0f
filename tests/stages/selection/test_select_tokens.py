"""`select_tokens`: positions of the K highest scores, ties and padding.

The oracle (oracle.py) sorts the scores of one sequence with plain Python.
"""

import numpy as np
import oracle

import qm_cupy as qm


def test_hand_worked_positions():
    # Two equal scores of 3. Positions are ascending, not in the order of the scores.
    scores = np.array([[3.0, 1, 3, 2], [0, 5, 1, 9]])
    np.testing.assert_array_equal(qm.select_tokens(scores, 2), [[0, 2], [1, 3]])
    mask = np.array([[True] * 4, [True, True, True, False]])
    # The score 9 is padding. K is 3 and 1, so the second row is padded with -1.
    got = qm.select_tokens(scores, np.array([3, 1]), mask=mask)
    np.testing.assert_array_equal(got, [[0, 2, 3], [1, -1, -1]])
    assert got.dtype == np.int32


def test_lower_index_wins_many_ties(rng):
    scores = rng.integers(0, 3, (2, 500)).astype(float)
    got = qm.select_tokens(scores, 200)
    for b in range(2):
        wanted = np.flatnonzero(oracle.top_k_mask(scores[b], 200))
        np.testing.assert_array_equal(got[b], wanted)


def test_empty_batch_has_k_positions():
    assert qm.select_tokens(np.ones((0, 5)), 2).shape == (0, 2)
