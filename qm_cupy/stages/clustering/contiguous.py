"""Contiguous groups: only neighbouring groups merge, the cheapest pair first.

Two neighbouring groups a and b have n_a and n_b tokens. S_a and S_b are the sums of
their vectors: unit tokens, or tokens for the Euclidean metric. The cost of merging a
and b is Ward's cost, the growth of the squared error of the vectors:

    n_a n_b / (n_a + n_b) ‖S_a / n_a - S_b / n_b‖²

Of equal costs, the leftmost pair merges first, unless rounding makes them differ. For
cosines, a zero token counts as a unit vector orthogonal to all others, because its
similarity to any token is 0.
Pairs merge one by one, until K groups are left, or until the distance √(2 · cost) of
the cheapest pair exceeds a limit. This is the distance of ward linkage. A merge changes
only the costs of the new group with its two neighbours.
"""

import math
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
from ...progress import report
from ...settings import implementation
from .labels import Groups
from .metrics import NOISE, metric_vectors_cuda

_EPSILON = 2.0**-52  # the distance from 1 to the next float64


def contiguous_groups_reference(
    vectors: NDArray[Any],
    num_groups: int,
    metric: str,
    runs: NDArray[np.intp],
    max_distance: float | None = None,
) -> Groups:
    """Return the group (N,) of each vector (N, D), numbered from the left.

    The vectors are those of `metric_vectors` for the free tokens, which are neither
    padding nor protected; they are overwritten. Tokens with different `runs` (N,) are
    not neighbours, because a protected token was between them in the sequence. Runs are
    numbered from the left.
    `max_distance` has the unit of the vectors.
    """
    # A group is stored at the index of its first token. `sums` is (N, D), and the other
    # arrays are (N,).
    num_tokens = len(vectors)
    sums, size = vectors, np.ones(num_tokens)
    # ‖S‖². For cosines every token adds 1 to it, a zero token too.
    square = np.ones(num_tokens)
    if metric == "euclidean":
        square = np.einsum("nd,nd->n", vectors, vectors)
    right = np.arange(1, num_tokens + 1)  # index of the next group, N if none
    left = np.arange(-1, num_tokens - 1)  # index of the previous group, -1 if none
    starts = np.ones(num_tokens, np.intp)  # 1 where a group starts
    cost = np.full(num_tokens, np.inf)  # cost of merging with the next group
    # The cost of two vectors x and y is ½ ‖x - y‖² = ½ ‖x‖² + ½ ‖y‖² - x · y.
    cost[:-1] = (square[:-1] + square[1:]) / 2
    cost[:-1] -= np.einsum("nd,nd->n", vectors[:-1], vectors[1:])
    cost[:-1][runs[:-1] != runs[1:]] = np.inf

    def pair_cost(a: int, b: int) -> float:
        if runs[a] != runs[b]:
            return np.inf
        # `mean_gap` is ‖S_a / n_a - S_b / n_b‖², expanded.
        mean_gap = square[a] / size[a] ** 2 + square[b] / size[b] ** 2
        mean_gap -= 2 * (sums[a] @ sums[b]) / (size[a] * size[b])
        return float(size[a] * size[b] / (size[a] + size[b]) * mean_gap)

    def distance(a: int, b: int) -> float:
        n_a, n_b = float(size[a]), float(size[b])
        mean_gap = float(cost[a]) * (n_a + n_b) / (n_a * n_b)
        # A gap that may come from rounding alone is 0, so that equal tokens have
        # distance 0.
        mean_squares = float(square[a]) / n_a**2 + float(square[b]) / n_b**2
        if mean_gap < max(NOISE, (n_a + n_b) * _EPSILON) * mean_squares:
            return 0.0
        return math.sqrt(2 * max(float(cost[a]), 0.0))

    num_merges = num_tokens - num_groups
    for merge in range(num_merges):
        if merge % 256 == 0:
            report(merge / num_merges)
        a = int(cost.argmin())  # the first of equal costs
        b = int(right[a])
        # An infinite cost means that only neighbours of different runs are left.
        if max_distance is not None and (
            cost[a] == np.inf or distance(a, b) > max_distance
        ):
            break
        # ‖S_a + S_b‖² = ‖S_a‖² + ‖S_b‖² + 2 S_a · S_b
        square[a] += square[b] + 2 * (sums[a] @ sums[b])
        sums[a] += sums[b]
        size[a] += size[b]
        starts[b], cost[b] = 0, np.inf
        # Only the pairs of the new group with its two neighbours change their costs.
        next_group = right[a] = right[b]
        if next_group < num_tokens:
            left[next_group] = a
        cost[a] = pair_cost(a, int(next_group)) if next_group < num_tokens else np.inf
        previous_group = int(left[a])
        if previous_group >= 0:
            cost[previous_group] = pair_cost(previous_group, a)
    return np.cumsum(starts) - 1


def contiguous_groups_cuda(
    tokens: Any,
    counts: Any,
    num_groups: int,
    mask: Any = None,
    protect: Any = None,
    *,
    metric: str = "cosine",
    max_distance: float | None = None,
) -> Any:
    """Return roots (B, N): a number for each group, before groups are numbered 0..K-1.

    K is `counts` (B,), or `num_groups` without counts. With `max_distance`, merging may
    stop earlier.
    """
    (batch, num_tokens), dim = rows_of(tokens[..., 0]), tokens.shape[-1]
    masks = contiguous(mask), contiguous(protect)
    sums = metric_vectors_cuda(tokens, *masks, metric)
    dtype = sums.dtype
    out = empty(tokens.shape[:-1], np.int32)
    # For the kernels, a negative bound means that there is no bound.
    bound = -1.0 if max_distance is None else float(max_distance)
    args: tuple[Any, ...] = (*masks, counts, batch, num_tokens, dim, num_groups, bound)
    # The basic and the optimized kernel need scratch memory: `reals` for real numbers
    # (costs, sizes, ...) and `links` for integers (the neighbours of each group, ...).
    if implementation() == "basic":
        reals = empty((batch, BASIC_CONTIGUOUS_REALS * num_tokens), dtype)
        links = empty((batch, BASIC_CONTIGUOUS_INTEGERS * num_tokens), np.int32)
        args = (sums, *args, int(metric == "euclidean"), reals, links, out)
        launch("contiguous", "contiguous_groups", dtype, args, outputs=batch)
        return out
    # The first costs need the product of each vector with the next one and with itself.
    # A launch before the merges computes them, with a warp for each vector.
    products, squares = (empty((batch, num_tokens), dtype) for _ in range(2))
    sizes = batch, num_tokens, dim, int(metric == "euclidean")
    product_args = (sums, masks[0], *sizes, products, squares)
    launch("contiguous", "neighbour_products", dtype, product_args, rows=out.size)
    # Keep the groups in shared memory if they fit, otherwise in global memory. Null
    # pointers tell the kernel that the groups are in shared memory.
    reals = links = None
    kernel = "contiguous", "contiguous_groups"
    bytes_per_token = CONTIGUOUS_REALS * dtype.itemsize + CONTIGUOUS_INTEGERS * 4
    shared = num_tokens * bytes_per_token  # bytes
    if shared > dynamic_shared_bytes(*kernel, dtype):
        shared, reals = 0, empty((batch, CONTIGUOUS_REALS * num_tokens), dtype)
        links = empty((batch, CONTIGUOUS_INTEGERS * num_tokens), np.int32)
    args = (sums, products, squares, *args, reals, links, out)
    launch(*kernel, dtype, args, blocks=batch, shared=shared)
    return out
