"""Groups by bipartite soft matching."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import rows_of
from ...cuda.constants import GROUP_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from ..merging.merge_tokens import merge_tokens_cuda
from ..selection.select_tokens import top_tokens_cuda
from .labels import Groups, number_groups_cuda
from .nearest import nearest_anchors_cuda
from .unit_tokens import unit_tokens_cuda


def bipartite_groups_reference(unit: NDArray[Any], num_groups: int) -> Groups:
    """Merge groups at even positions into groups at odd ones, until K are left.

    Each even group has a partner, the most similar odd group. A step merges the r even
    groups that are most similar to their partners; r is at most half of the groups.
    After each step, groups are sorted by their last members.
    """
    groups = np.arange(len(unit))  # the position of each token's group
    sums, last = unit.copy(), np.arange(len(unit))
    while len(sums) > num_groups:
        # The direction of a group is the mean of its unit tokens. Its length does not
        # matter for the cosine, so the sum is enough.
        norm = np.linalg.norm(sums, axis=-1, keepdims=True)
        mean = sums / np.where(norm > 0, norm, 1)
        similarity = mean[::2] @ mean[1::2].T
        partner = similarity.argmax(axis=-1)
        best = np.take_along_axis(similarity, partner[:, None], axis=-1)[:, 0]
        # r = min(n - K, ⌊n / 2⌋)
        merges = min(len(sums) - num_groups, len(sums) // 2)
        selected = np.argsort(-best, stable=True)[:merges]
        source, target = 2 * selected, 2 * partner[selected] + 1
        np.add.at(sums, target, sums[source])
        np.maximum.at(last, target, last[source])
        # Sort the groups that are left by their last members, and give the tokens their
        # new positions.
        kept = np.delete(np.arange(len(sums)), source)
        kept = kept[np.argsort(last[kept])]
        new_position = np.empty(len(sums), np.intp)
        new_position[kept] = np.arange(len(kept))
        new_position[source] = new_position[target]
        groups, sums, last = new_position[groups], sums[kept], last[kept]
    return groups


def bipartite_groups_cuda(
    tokens: Any,
    counts: Any,
    num_groups: int,
    mask: Any = None,
    protect: Any = None,
    *,
    fewest: int = 1,
) -> Any:
    """Return roots: merge groups at even positions into odd ones, until K are left.

    `fewest` is the smallest K of the batch, or 1 if it is not known. It determines the
    number of steps.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    if counts is None:
        fewest = num_groups
    # Protected tokens use up part of K. Their number is known only on the GPU, so the
    # other tokens may have any K.
    if protect is not None:
        fewest = 1
    # In the first step, which is three quarters of the work, each group is one token.
    # 16-bit tokens are compared as they are, so that tensor cores compute the product.
    vectors = contiguous(tokens)
    if tokens.dtype.itemsize > 2:
        vectors = unit_tokens_cuda(vectors, mask)
    roots = empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (mask, protect, batch, num_tokens, roots)
    launch("bipartite", "free_tokens", np.float32, args, outputs=roots.size)
    positions = number_groups_cuda(roots, "last")
    # Bounds on the number of groups after a step: of any sequence, and of the sequence
    # with the smallest K. The CPU knows only bounds, because it does not wait for the
    # GPU's counts.
    max_groups = left = num_tokens
    while left > max(fewest, 1):
        sizes = empty((3, batch), np.int32)
        args = (positions, mask, protect, counts, batch, num_tokens, num_groups, sizes)
        block = block_size(num_tokens, GROUP_THREADS)
        kernel = "bipartite", "match_counts"
        launch(*kernel, np.float32, args, blocks=batch, block=block)
        positions = _match_cuda(vectors, positions, sizes, max_groups)
        left = max(fewest, -(-left // 2))
        if left > max(fewest, 1) and vectors.dtype.itemsize == 2:
            vectors = unit_tokens_cuda(vectors, mask)  # for means of groups
        max_groups = max(min(num_groups, max_groups), -(-max_groups // 2))
    out = empty(positions.shape, np.int32)
    args = (positions, mask, batch, num_tokens, out)
    launch("bipartite", "match_roots", np.float32, args, outputs=out.size)
    return out


def _match_cuda(vectors: Any, positions: Any, sizes: Any, max_groups: int) -> Any:
    """Return the positions (B, N) of groups after one step from at most `max_groups`.

    The direction of a group is the mean of its tokens' `vectors` (B, N, D). `sizes`
    (3, B) is the result of `match_counts`.
    """
    batch, num_tokens = rows_of(positions)
    num_evens, num_odds = -(-max_groups // 2), max_groups // 2
    # Label each token by its group among the even groups, and among the odd groups.
    sides = [empty(positions.shape, np.int32) for _ in range(2)]
    exist = empty((*positions.shape[:-1], num_evens), np.bool_)
    args: tuple[Any, ...]
    args = (positions, sizes, batch, num_tokens, num_evens, *sides, exist)
    launch("bipartite", "match_sides", np.float32, args, outputs=positions.size)
    evens = merge_tokens_cuda(vectors, sides[0], num_evens, None, None)
    odds = merge_tokens_cuda(vectors, sides[1], num_odds, None, None)
    # Find each even group's partner, then select the r most similar even groups.
    partners, best = nearest_anchors_cuda(evens, odds, sizes[1], exist, similarity=True)
    selected = top_tokens_cuda(best, sizes[2], num_evens)
    roots = empty(positions.shape, np.int32)
    args = (positions, selected, partners, batch, num_tokens, num_evens, roots)
    launch("bipartite", "join_partners", np.float32, args, outputs=roots.size)
    return number_groups_cuda(roots, "last")
