"""Groups of neighbours."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import rows_of
from ...cuda.constants import (
    BASIC_CONTIGUOUS_INTEGERS,
    BASIC_CONTIGUOUS_REALS,
    CONTIGUOUS_INTEGERS,
    CONTIGUOUS_REALS,
)
from ...cuda.device import empty
from ...cuda.launch import contiguous, dynamic_shared_bytes, launch
from ...settings import implementation
from .labels import Groups
from .unit_tokens import unit_tokens_cuda


def contiguous_groups_reference(
    unit: NDArray[Any], num_groups: int, runs: NDArray[np.intp]
) -> Groups:
    """Merge the neighbours that add least to the squared error, until K are left.

    Tokens of different `runs` (N,), which never sink, are no neighbours.

    Ward's cost of two groups of n_a and n_b unit tokens with sums S_a and S_b. The
    leftmost pair goes first among equals. A zero token counts as a unit vector
    orthogonal to all others, as its similarity 0 says.
    """
    num_tokens = len(unit)
    sums, size = unit.copy(), np.ones(num_tokens)
    square = np.ones(num_tokens)  # ‖S‖², each zero token adding its own 1
    right = np.arange(1, num_tokens + 1)  # the next group's first token
    left = np.arange(-1, num_tokens - 1)
    starts = np.ones(num_tokens, np.intp)  # 1 where a group starts
    cost = np.full(num_tokens, np.inf)  # of merging a group with the next one
    cost[:-1] = 1 - np.einsum("ij,ij->i", unit[:-1], unit[1:])
    cost[:-1][runs[:-1] != runs[1:]] = np.inf

    def pair_cost(a: int, b: int) -> float:
        if runs[a] != runs[b]:
            return np.inf
        gap = square[a] / size[a] ** 2 + square[b] / size[b] ** 2
        gap -= 2 * (sums[a] @ sums[b]) / (size[a] * size[b])
        return float(size[a] * size[b] / (size[a] + size[b]) * gap)

    for _ in range(num_tokens - num_groups):
        a = int(cost.argmin())
        b = int(right[a])
        square[a] += square[b] + 2 * (sums[a] @ sums[b])
        sums[a] += sums[b]
        size[a] += size[b]
        starts[b], cost[b] = 0, np.inf
        after = right[a] = right[b]
        if after < num_tokens:
            left[after] = a
        cost[a] = pair_cost(a, int(after)) if after < num_tokens else np.inf
        before = int(left[a])
        if before >= 0:
            cost[before] = pair_cost(before, a)
    return np.cumsum(starts) - 1


def contiguous_groups_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return roots: neighbours merge, the cheapest pair first, until K are left."""
    (batch, num_tokens), dim = rows_of(tokens[..., 0]), tokens.shape[-1]
    masks = contiguous(mask), contiguous(protect)
    sums = unit_tokens_cuda(tokens, masks[0])
    dtype = sums.dtype
    out = empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (*masks, counts, batch, num_tokens, dim, num_groups)
    if implementation() == "basic":
        reals = empty((batch, BASIC_CONTIGUOUS_REALS * num_tokens), dtype)
        links = empty((batch, BASIC_CONTIGUOUS_INTEGERS * num_tokens), np.int32)
        args = (sums, *args, reals, links, out)
        launch("contiguous", "contiguous_groups", dtype, args, outputs=batch)
        return out
    products = empty((batch, num_tokens), dtype)
    given = (sums, masks[0], batch, num_tokens, dim, products)
    launch("contiguous", "neighbour_products", dtype, given, rows=out.size)
    reals = links = None
    kernel = "contiguous", "contiguous_groups"
    each = CONTIGUOUS_REALS * dtype.itemsize + CONTIGUOUS_INTEGERS * 4
    shared = num_tokens * each  # what the groups take
    if shared > dynamic_shared_bytes(*kernel, dtype):
        shared, reals = 0, empty((batch, CONTIGUOUS_REALS * num_tokens), dtype)
        links = empty((batch, CONTIGUOUS_INTEGERS * num_tokens), np.int32)
    args = (sums, products, *args, reals, links, out)
    launch(*kernel, dtype, args, blocks=batch, shared=shared)
    return out
