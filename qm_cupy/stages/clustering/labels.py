"""Labels: groups numbered by the positions of their last or first members.

A root is the number of a token's group before the groups are numbered 0..K-1: any
number that all tokens of the group have, and no other token has. On a GPU, a root is
within 0..2N-1, and padding has root -1.
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
    """Return labels 0..K-1 (N,): groups numbered by their last or first members.

    `groups` (N,) has any number for each group. `order` is "last" or "first".
    """
    # `unique` returns the index of each group's first member. If the tokens are
    # reversed, this is the last member, and a larger index means an earlier position.
    forwards = groups if order == "first" else groups[::-1]
    _, position, label = np.unique(forwards, return_index=True, return_inverse=True)
    if order == "last":
        position, label = -position, label[::-1]
    rank = np.argsort(np.argsort(position))  # (K,); argsort twice gives ranks
    return rank[label]


def number_groups_cuda(roots: Any, order: str) -> Any:
    """Return the labels of groups, numbered by their last or first members.

    `roots` (B, N) or (N,) holds the root of each token.
    """
    batch, num_tokens = rows_of(roots)
    roots = contiguous(roots, np.int32)
    out = empty(roots.shape, np.int32)
    first = int(order == "first")
    # The position of a group is that of its last (or first) member. The label of a
    # group is the count of groups with an earlier position. The basic kernels mark the
    # last (or first) members in a launch before the one that counts.
    if implementation() == "basic":
        ends = empty(roots.shape, np.bool_)
        args: tuple[Any, ...] = (roots, batch, num_tokens, first, ends)
        launch("labels", "group_ends", np.float32, args, outputs=out.size)
        args = (roots, ends, batch, num_tokens, out)
        launch("labels", "number_groups", np.float32, args, outputs=out.size)
    else:
        # Scratch: for each root, the position of its group's last or first member.
        positions = empty((batch, 2 * num_tokens), np.int32)
        args = (roots, batch, num_tokens, first, positions, out)
        kernel = "labels", "number_groups"
        block = block_size(num_tokens, GROUP_THREADS)
        launch(*kernel, np.float32, args, blocks=batch, block=block)
    return out
