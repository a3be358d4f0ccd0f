"""What priors and losses read of merged tokens: tokens, positions, sizes, counts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_counts
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device, to_host
from ..results import Merged


def merged_parts(merged: Any) -> tuple[Any, Any, Any]:
    """Return tokens, positions and sizes; of tokens alone, the rest is None."""
    if isinstance(merged, Merged):
        return merged.tokens, merged.positions, merged.sizes
    return merged, None, None


def group_counts(
    tokens: NDArray[Any], num_groups: Any, sizes: Any
) -> NDArray[np.int64]:
    """Return K of each sequence: what is given, or else its groups with members."""
    if num_groups is None and sizes is not None:
        num_groups = to_host((sizes > 0).sum(axis=-1))
    return check_counts(tokens, num_groups)


def per_sequence(x: Any, token: Any) -> Any:
    """Return a number of each sequence as an array beside `token`; one may be for all.

    Python's numbers become arrays here, None stays None.
    """
    if x is None:
        return None
    if not hasattr(x, "ndim") or isinstance(x, np.generic):
        x = np.asarray(x)
        x = to_device(x) if is_cuda(token) else x
    if x.ndim:
        return x
    return x + np.zeros(token.shape[:-1], x.dtype, like=x)
