"""Labels: groups numbered in causal order.

Roots name each token's group by any number within 0..2N-1, -1 for padding.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import rows_of
from ...cuda.constants import GROUP_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from ...settings import implementation

Order = Literal["last", "first"]
ORDERS: tuple[Order, ...] = get_args(Order)

Groups = NDArray[np.intp]


def in_order(groups: Groups, order: str) -> Groups:
    """Number groups 0..K-1 by the position of their last or first member."""
    forwards = groups if order == "first" else groups[::-1]
    _, place, label = np.unique(forwards, return_index=True, return_inverse=True)
    if order == "last":
        place, label = -place, label[::-1]
    rank = np.argsort(np.argsort(place))
    return rank[label]


def number_groups_cuda(roots: Any, order: str) -> Any:
    """Return labels: groups 0.. by their last or first member's position."""
    batch, num_tokens = rows_of(roots)
    roots = contiguous(roots, np.int32)
    out = empty(roots.shape, np.int32)
    first = int(order == "first")
    if implementation() == "basic":
        ends = empty(roots.shape, np.bool_)
        args: tuple[Any, ...] = (roots, batch, num_tokens, first, ends)
        launch("labels", "group_ends", np.float32, args, outputs=out.size)
        args = (roots, ends, batch, num_tokens, out)
        launch("labels", "number_groups", np.float32, args, outputs=out.size)
    else:
        places = empty((batch, 2 * num_tokens), np.int32)
        args = (roots, batch, num_tokens, first, places, out)
        kernel = "labels", "number_groups"
        block = block_size(num_tokens, GROUP_THREADS)
        launch(*kernel, np.float32, args, blocks=batch, block=block)
    return out
