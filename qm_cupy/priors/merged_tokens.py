"""Parts of merged tokens for priors and losses: tokens, positions, sizes, counts.

A prior is a model that predicts a merged token from the tokens before it. The size of a
merged token is the number of tokens that were merged into it; padding has size 0. In
shapes, B is the number of sequences, and D is the width of a token.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.counts import check_counts
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device, to_host


def merged_parts(merged: Any) -> tuple[Any, Any, Any]:
    """Return tokens, positions and sizes; the last two are None for an array."""
    if is_merged(merged):
        return merged.tokens, merged.positions, merged.sizes
    return merged, None, None


def is_merged(x: Any) -> bool:
    """Return whether `x` has the fields of `MergedTokens`; arrays do not have them."""
    return hasattr(x, "positions") and hasattr(x, "sizes") and hasattr(x, "tokens")


def group_counts(
    tokens: NDArray[Any], num_groups: Any, sizes: Any
) -> NDArray[np.int64]:
    """Return K, the number of groups, of each sequence.

    K is `num_groups` if it is not None. Otherwise K is the number of sizes above 0 or,
    if `sizes` is None too, the number of tokens.
    """
    if num_groups is None and sizes is not None:
        num_groups = to_host((sizes > 0).sum(axis=-1))  # waits for the GPU
    return check_counts(tokens, num_groups)


def per_sequence(x: Any, token: Any) -> Any:
    """Return `x` as one number for each sequence, (B,), or None if `x` is None.

    `x` is an array (B,), or one number for all sequences. Numbers become arrays on the
    device of `token` (B, D).
    """
    if x is None:
        return None
    if not hasattr(x, "ndim") or isinstance(x, np.generic):
        x = np.asarray(x)
        x = to_device(x) if is_cuda(token) else x
    if x.ndim:
        return x
    # x + 0 for each sequence: an array (B,) in the dtype and the library of x.
    return x + np.zeros(token.shape[:-1], x.dtype, like=x)
