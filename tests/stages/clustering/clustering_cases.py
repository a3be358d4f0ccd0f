"""What the tests of this folder share: masses, masks, tokens of low rank."""

import numpy as np

WEIGHTED = ("average", "ward")


def groups_of(labels):
    return [list(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]


def masses(rng, shape):
    """Masses over two decades."""
    return 10 ** rng.uniform(-1, 1, shape)


def low_rank(rng, num_tokens, dim=16):
    rough = rng.standard_normal((num_tokens, 4)) @ rng.standard_normal((4, dim))
    return rough + 0.1 * rng.standard_normal((num_tokens, dim))


def ragged_mask(rng, batch, num_tokens):
    """Padding anywhere, a full sequence first and one of one token last."""
    mask = rng.random((batch, num_tokens)) < 0.6
    mask[0], mask[-1] = True, np.arange(num_tokens) == 3
    return mask
