"""Cases for the tests of the grouping kernels: masks, counts, and a plain numbering.

A root is the number of a token's group before the groups are numbered 0..K-1.
"""

import numpy as np
import pytest
from kernel_cases import mask_of
from seam import cuda

# Around the sizes of warps (32), tiles (128) and blocks (256).
SIZES = [1, 2, 31, 33, 129, 257]

LONG = [*SIZES, 1100]  # more tokens than a block has threads

sizes = pytest.mark.parametrize("num_tokens", SIZES)
long_sizes = pytest.mark.parametrize("num_tokens", LONG)
orders = pytest.mark.parametrize("order", ["last", "first"])


def masks_of(batch, num_tokens, masked=True):
    """Return `mask` and `protect`, (batch, num_tokens) each, or None and None.

    The mask has padding on the left, padding in between, and a sequence of padding
    only. A fifth of the tokens is protected.
    """
    if not masked:
        return None, None
    draws = np.random.default_rng(5).random((2, batch, num_tokens))
    return mask_of(batch, num_tokens), draws[1] < 0.2


def fill(mask, shape, value):
    """Return the mask, or an array of one value if the mask is None."""
    return np.full(shape, value) if mask is None else mask


def counts_of(valid, protect, fraction):
    """Return K (B,): each protected token, and a fraction of the other valid tokens."""
    num_protected = (valid & protect).sum(-1)
    num_free = valid.sum(-1) - num_protected
    return num_protected + np.ceil(num_free * fraction).astype(np.int64)


def kernel_counts(counts):
    """Return K in the form that launchers accept."""
    return cuda.counts_on_device(np.asarray(counts, np.int64))


def labels_of(roots, valid, order="last"):
    """Return the labels of one sequence: groups numbered by last or first members."""
    # The position of a group is that of its last or first member. With "last", a later
    # member overwrites the position of an earlier one.
    position = {}
    for i in np.flatnonzero(valid):
        if order == "last" or roots[i] not in position:
            position[roots[i]] = i
    ranks = {root: rank for rank, root in enumerate(sorted(position, key=position.get))}
    return np.array([ranks[roots[i]] if valid[i] else -1 for i in range(len(roots))])
