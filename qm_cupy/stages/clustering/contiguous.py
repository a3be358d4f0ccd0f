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

    Tokens with different `runs` (N,) are not neighbours: a protected token is between
    them. Runs are in ascending order.

    The cost of a merge is Ward's, for two groups of n_a and n_b unit tokens with sums
    S_a and S_b. Among equal costs the leftmost pair merges first. A zero token counts
    as a unit vector orthogonal to all others, because its similarity to them is 0.
    """
    num_tokens = len(unit)
    sums, size = unit.copy(), np.ones(num_tokens)
    square = np.ones(num_tokens)  # ‖S‖²; each zero token adds 1
    right = np.arange(1, num_tokens + 1)  # the next group's first token
    left = np.arange(-1, num_tokens - 1)  # the first token of the group before
    starts = np.ones(num_tokens, np.intp)  # 1 where a group starts
    cost = np.full(num_tokens, np.inf)  # of merging a group with the next one
    # Two unit tokens: ½ ‖x - y‖² = 1 - x · y
    cost[:-1] = 1 - np.einsum("ij,ij->i", unit[:-1], unit[1:])
    cost[:-1][runs[:-1] != runs[1:]] = np.inf

    def pair_cost(a: int, b: int) -> float:
        if runs[a] != runs[b]:
            return np.inf
        # n_a n_b / (n_a + n_b) ‖S_a / n_a - S_b / n_b‖²
        gap = square[a] / size[a] ** 2 + square[b] / size[b] ** 2
        gap -= 2 * (sums[a] @ sums[b]) / (size[a] * size[b])
        return float(size[a] * size[b] / (size[a] + size[b]) * gap)

    for _ in range(num_tokens - num_groups):
        a = int(cost.argmin())  # the first of equal costs
        b = int(right[a])
        # ‖S_a + S_b‖² = ‖S_a‖² + ‖S_b‖² + 2 S_a · S_b
        square[a] += square[b] + 2 * (sums[a] @ sums[b])
        sums[a] += sums[b]
        size[a] += size[b]
        starts[b], cost[b] = 0, np.inf
        # Only the pairs of the new group with its two neighbours change their costs.
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
    """Return roots: merge neighbours, the cheapest pair first, until K are left."""
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
    product_args = (sums, masks[0], batch, num_tokens, dim, products)
    launch("contiguous", "neighbour_products", dtype, product_args, rows=out.size)
    # Keep the groups in shared memory if they fit, else in global memory.
    reals = links = None
    kernel = "contiguous", "contiguous_groups"
    bytes_per_token = CONTIGUOUS_REALS * dtype.itemsize + CONTIGUOUS_INTEGERS * 4
    shared = num_tokens * bytes_per_token  # bytes
    if shared > dynamic_shared_bytes(*kernel, dtype):
        shared, reals = 0, empty((batch, CONTIGUOUS_REALS * num_tokens), dtype)
        links = empty((batch, CONTIGUOUS_INTEGERS * num_tokens), np.int32)
    args = (sums, products, *args, reals, links, out)
    launch(*kernel, dtype, args, blocks=batch, shared=shared)
    return out
