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
    """Match groups at even places to those at odd ones, again until K are left.

    A step merges the r even groups most similar to their best odd partner, r at most
    half of the groups; groups then stand in the order of their last members.
    """
    groups = np.arange(len(unit))  # the place of each token's group
    sums, last = unit.copy(), np.arange(len(unit))
    while len(sums) > num_groups:
        norm = np.linalg.norm(sums, axis=-1, keepdims=True)
        mean = sums / np.where(norm > 0, norm, 1)
        similarity = mean[::2] @ mean[1::2].T
        partner = similarity.argmax(axis=-1)
        best = np.take_along_axis(similarity, partner[:, None], axis=-1)[:, 0]
        merges = min(len(sums) - num_groups, len(sums) // 2)
        chosen = np.argsort(-best, stable=True)[:merges]
        source, target = 2 * chosen, 2 * partner[chosen] + 1
        np.add.at(sums, target, sums[source])
        np.maximum.at(last, target, last[source])
        kept = np.delete(np.arange(len(sums)), source)
        kept = kept[np.argsort(last[kept])]
        place = np.empty(len(sums), np.intp)
        place[kept] = np.arange(len(kept))
        place[source] = place[target]
        groups, sums, last = place[groups], sums[kept], last[kept]
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
    """Return roots: groups at even places join those at odd ones, until K are left.

    `fewest` is the smallest K, as far as it is known: it bounds the number of steps.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    if counts is None:
        fewest = num_groups
    if protect is not None:  # K leaves any number to the other tokens
        fewest = 1
    # In the first step, three quarters of the work, each group is one token. 16-bit
    # tokens are compared as they are, so that the tensor cores take the product.
    vectors = contiguous(tokens)
    if tokens.dtype.itemsize > 2:
        vectors = unit_tokens_cuda(vectors, mask)
    roots = empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (mask, protect, batch, num_tokens, roots)
    launch("bipartite", "free_tokens", np.float32, args, outputs=roots.size)
    places = number_groups_cuda(roots, "last")
    most = left = num_tokens  # at most as many groups, in any sequence, with the least
    while left > max(fewest, 1):
        sizes = empty((3, batch), np.int32)
        args = (places, mask, protect, counts, batch, num_tokens, num_groups, sizes)
        block = block_size(num_tokens, GROUP_THREADS)
        kernel = "bipartite", "match_counts"
        launch(*kernel, np.float32, args, blocks=batch, block=block)
        places = _match_cuda(vectors, places, sizes, most)
        left = max(fewest, -(-left // 2))
        if left > max(fewest, 1) and vectors.dtype.itemsize == 2:
            vectors = unit_tokens_cuda(vectors, mask)  # for the means of the groups
        most = max(min(num_groups, most), -(-most // 2))
    out = empty(places.shape, np.int32)
    args = (places, mask, batch, num_tokens, out)
    launch("bipartite", "match_roots", np.float32, args, outputs=out.size)
    return out


def _match_cuda(vectors: Any, places: Any, sizes: Any, most: int) -> Any:
    """Return the places (B, N) after one step, from at most `most` groups.

    A group's direction is the mean of its tokens' `vectors` (B, N, D).
    """
    batch, num_tokens = rows_of(places)
    num_evens, num_odds = -(-most // 2), most // 2
    sides = [empty(places.shape, np.int32) for _ in range(2)]
    exist = empty((*places.shape[:-1], num_evens), np.bool_)
    args: tuple[Any, ...]
    args = (places, sizes, batch, num_tokens, num_evens, *sides, exist)
    launch("bipartite", "match_sides", np.float32, args, outputs=places.size)
    evens = merge_tokens_cuda(vectors, sides[0], num_evens, None, None)
    odds = merge_tokens_cuda(vectors, sides[1], num_odds, None, None)
    partners, best = nearest_anchors_cuda(evens, odds, sizes[1], exist, similarity=True)
    chosen = top_tokens_cuda(best, sizes[2], num_evens)
    roots = empty(places.shape, np.int32)
    args = (places, chosen, partners, batch, num_tokens, num_evens, roots)
    launch("bipartite", "join_partners", np.float32, args, outputs=roots.size)
    return number_groups_cuda(roots, "last")
