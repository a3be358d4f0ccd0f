"""Cases for the tests of the grouping kernels: masks, counts, labels by hand."""

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
    """Return `mask` (padding left, holes, only padding) and `protect` (a fifth)."""
    if not masked:
        return None, None
    draws = np.random.default_rng(5).random((2, batch, num_tokens))
    return mask_of(batch, num_tokens), draws[1] < 0.2


def fill(mask, shape, value):
    """Return the mask, or an array of one value where there is none."""
    return np.full(shape, value) if mask is None else mask


def counts_of(valid, protect, fraction):
    """Return K (B,): the protected tokens plus a fraction of the others."""
    fixed = (valid & protect).sum(-1)
    free = valid.sum(-1) - fixed
    return fixed + np.ceil(free * fraction).astype(np.int64)


def kernel_counts(counts):
    """Return K in the form that launchers accept."""
    return cuda.device_counts(np.asarray(counts, np.int64))


def labels_of(roots, valid, order="last"):
    """Return the labels of one sequence: groups numbered by last or first member."""
    # With "last", a later member overwrites the position of an earlier one.
    position = {}
    for i in np.flatnonzero(valid):
        if order == "last" or roots[i] not in position:
            position[roots[i]] = i
    ranks = {root: rank for rank, root in enumerate(sorted(position, key=position.get))}
    return np.array([ranks[roots[i]] if valid[i] else -1 for i in range(len(roots))])
