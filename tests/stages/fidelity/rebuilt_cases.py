"""Labels, masks and options for tests of tokens that are rebuilt from groups.

N = 9 tokens of B = 2 sequences are rebuilt from merged tokens by their labels, or
without labels from the most similar merged token.
"""

import numpy as np
import pytest

# (B, N). There is padding (-1) in both sequences. In the first one, group 0 has one
# token, and group 2 has no token.
LABELS = np.array([[0, 1, 1, 3, 1, -1, 3, 1, -1], [2, 0, 0, 1, 2, 2, 0, 1, -1]])
MASK = np.array([[True] * 9, [False, True, True, True, True] + [False] * 4])


def options_of(labelled, masked, ragged):
    """Return the options of the fidelity functions.

    With `ragged`, K of the two sequences is 4 and 3: the largest labels are 3 and 2.
    """
    return {
        "labels": LABELS if labelled else None,
        "mask": MASK if masked else None,
        "num_groups": np.array([4, 3]) if ragged else None,
    }


labelled_or_nearest = pytest.mark.parametrize(
    "labelled", [True, False], ids=["labels", "nearest"]
)
masked_or_full = pytest.mark.parametrize(
    "masked", [False, True], ids=["full", "padded"]
)
