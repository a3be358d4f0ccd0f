"""Labels, masks and options for tests of tokens that are rebuilt from groups."""

import numpy as np
import pytest

# (2, 9): some padding (-1), a group of one token, and an empty group (label 2 in the
# first sequence).
LABELS = np.array([[0, 1, 1, 3, 1, -1, 3, 1, -1], [2, 0, 0, 1, 2, 2, 0, 1, -1]])
MASK = np.array([[True] * 9, [False, True, True, True, True] + [False] * 4])


# With `ragged`, K is 4 and 3: the largest labels are 3 and 2.
def options_of(labelled, masked, ragged):
    return {
        "labels": LABELS if labelled else None,
        "mask": MASK if masked else None,
        "num_groups": np.array([4, 3]) if ragged else None,
    }


both = pytest.mark.parametrize("labelled", [True, False], ids=["labels", "nearest"])
padded = pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
