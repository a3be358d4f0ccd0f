"""Parts of merged tokens for priors and losses: tokens, positions, sizes, counts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_counts
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device, to_host
from ..results import Merged


def merged_parts(merged: Any) -> tuple[Any, Any, Any]:
    """Return tokens, positions and sizes; an array has no positions or sizes: None."""
    if isinstance(merged, Merged):
        return merged.tokens, merged.positions, merged.sizes
    return merged, None, None


def group_counts(
    tokens: NDArray[Any], num_groups: Any, sizes: Any
) -> NDArray[np.int64]:
    """Return K of each sequence: `num_groups`, or else its groups of size above 0.

    With neither, K is the number of tokens.
    """
    if num_groups is None and sizes is not None:
        num_groups = to_host((sizes > 0).sum(axis=-1))  # waits for a GPU
    return check_counts(tokens, num_groups)


def per_sequence(x: Any, token: Any) -> Any:
    """Return one number for each sequence (B,), on the device of `token` (B, D).

    `x` is an array, or one number for all sequences. None stays None.
    """
    if x is None:
        return None
    if not hasattr(x, "ndim") or isinstance(x, np.generic):
        x = np.asarray(x)
        x = to_device(x) if is_cuda(token) else x
    if x.ndim:
        return x
    # (B,): x once for each sequence, in the dtype and the library of x.
    return x + np.zeros(token.shape[:-1], x.dtype, like=x)
