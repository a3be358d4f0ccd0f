"""Labels: groups numbered in causal order.

Roots name each token's group by any number within 0..2N-1, -1 for padding.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import rows_of
from ...cuda.constants import GROUP_THREADS, WARP
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
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
        launch_integers("labels", "group_ends", out.size, args)
        args = (roots, ends, batch, num_tokens, out)
        launch_integers("labels", "number_groups", out.size, args)
    else:
        places = empty((batch, 2 * num_tokens), np.int32)
        args = (roots, batch, num_tokens, first, places, out)
        launch_groups("labels", "number_groups", np.float32, args, out)
    return out


def launch_integers(
    file: str, kernel: str, threads: int, args: tuple[Any, ...]
) -> None:
    """Run a basic kernel that knows no real numbers."""
    launch(f"basic/{file}", kernel, np.float32, threads, args)


def launch_groups(
    file: str,
    kernel: str,
    dtype: Any,
    args: tuple[Any, ...],
    x: Any,
    most: int = GROUP_THREADS,
) -> None:
    """Run an optimized kernel with a block for each sequence of `x` (B, N).

    A block has a thread for each token, and at most `most`.
    """
    batch, num_tokens = rows_of(x)
    block = min(-(-num_tokens // WARP) * WARP, most)
    threads = batch * block
    launch(f"optimized/{file}", kernel, dtype, threads, args, block=block)
