"""Cases for several test files of this folder: masses, masks, tokens of low rank."""

import numpy as np

WEIGHTED = ("average", "ward")  # the methods that use masses


def groups_of(labels):
    """Return, for each label, the list of its tokens."""
    return [list(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]


def masses(rng, shape):
    """Return random masses between 0.1 and 10."""
    return 10 ** rng.uniform(-1, 1, shape)


def low_rank(rng, num_tokens, dim=16):
    """Return tokens that lie near a subspace of 4 dimensions."""
    in_subspace = rng.standard_normal((num_tokens, 4)) @ rng.standard_normal((4, dim))
    return in_subspace + 0.1 * rng.standard_normal((num_tokens, dim))


def ragged_mask(rng, batch, num_tokens):
    """Return a mask with padding anywhere; row 0 is full, the last has one token."""
    mask = rng.random((batch, num_tokens)) < 0.6
    mask[0], mask[-1] = True, np.arange(num_tokens) == 3
    return mask
