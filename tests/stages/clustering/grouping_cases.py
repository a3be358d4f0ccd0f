"""What the tests of the groupings' kernels share: masks, counts, labels by hand."""

import numpy as np
import pytest
from kernel_cases import mask_of
from seam import cuda

SIZES = [1, 2, 31, 33, 129, 257]

LONG = [*SIZES, 1100]  # more than a block has threads

sizes = pytest.mark.parametrize("num_tokens", SIZES)
long_sizes = pytest.mark.parametrize("num_tokens", LONG)
orders = pytest.mark.parametrize("order", ["last", "first"])


def masks_of(batch, num_tokens, masked=True):
    """Return padding at the left, with holes, and of all; a fifth are protected."""
    if not masked:
        return None, None
    draws = np.random.default_rng(5).random((2, batch, num_tokens))
    return mask_of(batch, num_tokens), draws[1] < 0.2


def fill(mask, shape, value):
    return np.full(shape, value) if mask is None else mask


def counts_of(valid, protect, share):
    """Return K (B,): the protected tokens and a share of the others."""
    fixed = (valid & protect).sum(-1)
    free = valid.sum(-1) - fixed
    return fixed + np.ceil(free * share).astype(np.int64)


def given(counts):
    """Return K as a launcher takes it."""
    return cuda.device_counts(np.asarray(counts, np.int64))


def labels_of(roots, valid, order="last"):
    """Number the groups of one sequence by their last or first member."""
    place = {}
    for i in np.flatnonzero(valid):
        if order == "last" or roots[i] not in place:
            place[roots[i]] = i
    ranks = {root: rank for rank, root in enumerate(sorted(place, key=place.get))}
    return np.array([ranks[roots[i]] if valid[i] else -1 for i in range(len(roots))])
