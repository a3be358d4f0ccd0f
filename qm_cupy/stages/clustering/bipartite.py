"""Groups by the bipartite soft matching of ToMe (arXiv:2210.09461).

The groups of a sequence are sorted by their last members; the index of a group in this
order is its position. An even group has an even position, and an odd group has an odd
position. A step merges r even groups into odd groups; steps are repeated until K groups
are left. With n groups, r = min(n - K, ⌊n / 2⌋, step). `step` is the largest number of
merges of one step; by default it is unlimited, and n becomes max(K, ⌈n / 2⌉).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.shapes import row_blocks, rows_of
from ...cuda.constants import GROUP_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from ...progress import report, span
from ..merging.merge_tokens import merge_tokens_cuda
from ..selection.select_tokens import top_tokens_cuda
from .labels import Groups, number_groups_cuda
from .metrics import metric_vectors_cuda
from .nearest import nearest_anchors_cuda


def bipartite_groups_reference(
    vectors: NDArray[Any], num_groups: int, metric: str, step: int | None
) -> Groups:
    """Return the group (N,) of each vector (N, D), numbered by last members.

    The vectors are those of `metric_vectors`, and are overwritten. Each even group has
    a partner, the most similar odd group. A step merges the r even groups that are most
    similar to their partners.
    """
    groups = np.arange(len(vectors))  # (N,), the position of each token's group
    # For each group: the sum of its vectors, their number, and its last member.
    sums, last = vectors, np.arange(len(vectors))
    size = np.ones(len(vectors))
    while len(sums) > num_groups:
        merges = min(len(sums) - num_groups, len(sums) // 2, step or len(sums))  # r
        # A step with n groups takes a time of about n².
        left = [(n / len(groups)) ** 2 for n in (len(sums), len(sums) - merges)]
        with span(1 - left[0], 1 - left[1]):
            partner, best = _partners(sums, size, metric)
        selected = np.argsort(-best, stable=True)[:merges]
        # Even group i is at position 2 i, and odd group j at position 2 j + 1.
        source, target = 2 * selected, 2 * partner[selected] + 1
        np.add.at(sums, target, sums[source])
        np.add.at(size, target, size[source])
        np.maximum.at(last, target, last[source])
        # Sort the remaining groups by their last members. A token of a merged group
        # gets the position of the odd group.
        kept = np.delete(np.arange(len(sums)), source)
        kept = kept[np.argsort(last[kept])]
        new_position = np.empty(len(sums), np.intp)
        new_position[kept] = np.arange(len(kept))
        new_position[source] = new_position[target]
        groups, size = new_position[groups], size[kept]
        sums, last = sums[kept], last[kept]
    return groups


def _partners(
    sums: NDArray[Any], size: NDArray[Any], metric: str
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Return the partner of each even group, and their similarity."""
    similarity = _similarity_of_means(sums, size, metric)  # (evens, odds)
    report(0.8)
    partner = similarity.argmax(axis=-1)  # (evens,), index among the odd groups
    return partner, np.take_along_axis(similarity, partner[:, None], axis=-1)[:, 0]


def _similarity_of_means(
    sums: NDArray[Any], size: NDArray[Any], metric: str
) -> NDArray[Any]:
    """Return the similarity of each even group to each odd group."""
    if metric == "cosine":
        # The length of a vector does not change a cosine, so sums do for means.
        norm = np.linalg.norm(sums, axis=-1, keepdims=True)
        mean = sums / np.where(norm > 0, norm, 1)
        return mean[::2] @ mean[1::2].T
    mean = sums / size[:, None]
    square = np.einsum("nd,nd->n", mean, mean)
    # -‖x - y‖² = 2 x·y - ‖x‖² - ‖y‖²
    similarity: NDArray[Any] = mean[::2] @ mean[1::2].T
    for rows in row_blocks(*similarity.shape):
        similarity[rows] *= 2
        similarity[rows] -= square[::2][rows, None] + square[1::2]
    return similarity


def bipartite_groups_cuda(
    tokens: Any,
    counts: Any,
    num_groups: int,
    mask: Any = None,
    protect: Any = None,
    *,
    metric: str = "cosine",
    step: int | None = None,
    fewest: int = 1,
) -> Any:
    """Return roots (B, N): a number for each group, before groups are numbered 0..K-1.

    K is `counts` (B,), or `num_groups` without counts; `num_groups` is the largest K.
    `fewest` is the smallest K of the batch, or 1 if the caller does not know this K.
    `fewest` and `step` determine the number of steps.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    if counts is None:
        fewest = num_groups
    # Each protected token is a group of its own and counts towards K. The CPU does not
    # know how many protected tokens there are, so it plans enough steps for the case
    # that the other tokens must form a single group.
    if protect is not None:
        fewest = 1
    # In the first step, which is usually three quarters of the work or more, each group
    # is one token. This step compares 16-bit tokens as they are. Vectors would be
    # float32; the optimized kernel multiplies 16-bit tokens by tensor cores (from sm_80
    # on).
    vectors = contiguous(tokens)
    if tokens.dtype.itemsize > 2:
        vectors = metric_vectors_cuda(vectors, mask, protect, metric)
    roots = empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (mask, protect, batch, num_tokens, roots)
    launch("bipartite", "free_tokens", np.float32, args, outputs=roots.size)
    positions = number_groups_cuda(roots, "last")
    # Upper limits of the number of groups of tokens that are not protected:
    # `max_groups` for any sequence, and `remaining` for the sequence with the smallest
    # K, which needs most steps. The CPU knows only limits, because it does not wait for
    # the numbers of groups that the GPU counts.
    max_groups = remaining = num_tokens
    step = num_tokens if step is None else min(step, num_tokens)
    while remaining > max(fewest, 1):
        # Row 0 of `sizes` is the number n of groups. Row 1 is the number of odd groups,
        # or 0 if nothing merges. Row 2 is the number r of merges.
        sizes = empty((3, batch), np.int32)
        args = (positions, mask, protect, counts, batch, num_tokens, num_groups)
        args = (*args, step, sizes)
        block = block_size(num_tokens, GROUP_THREADS)
        kernel = "bipartite", "match_counts"
        launch(*kernel, np.float32, args, blocks=batch, block=block)
        positions = _match_cuda(vectors, positions, sizes, max_groups, metric)
        remaining = max(fewest, remaining - min(remaining // 2, step))
        if remaining > max(fewest, 1) and vectors.dtype.itemsize == 2:
            # Later steps compare means of vectors, so compute the vectors now.
            vectors = metric_vectors_cuda(vectors, mask, protect, metric)
        max_groups = max(
            min(num_groups, max_groups), max_groups - min(max_groups // 2, step)
        )
    out = empty(positions.shape, np.int32)
    args = (positions, mask, batch, num_tokens, out)
    launch("bipartite", "match_roots", np.float32, args, outputs=out.size)
    return out


def _match_cuda(
    vectors: Any, positions: Any, sizes: Any, max_groups: int, metric: str
) -> Any:
    """Return the position (B, N) of each token's group after one step.

    `positions` (B, N) holds the positions before the step, of at most `max_groups`
    groups. A group is compared by the mean of the `vectors` (B, N, D) of its tokens.
    `sizes` (3, B) is the result of the kernel `match_counts`.
    """
    batch, num_tokens = rows_of(positions)
    num_evens, num_odds = -(-max_groups // 2), max_groups // 2
    # The first array holds, for each token, the index of its group among the even
    # groups, or -1 if the group is odd. The second array holds the index among the odd
    # groups, or -1 if the group is even. Padding, protected tokens, and all tokens of a
    # sequence in which nothing merges have -1 in both. With these labels,
    # `merge_tokens_cuda` returns the means of the even groups and of the odd groups.
    side_labels = [empty(positions.shape, np.int32) for _ in range(2)]
    even_exists = empty((*positions.shape[:-1], num_evens), np.bool_)
    args: tuple[Any, ...]
    args = (positions, sizes, batch, num_tokens, num_evens, *side_labels, even_exists)
    launch("bipartite", "match_sides", np.float32, args, outputs=positions.size)
    evens = merge_tokens_cuda(vectors, side_labels[0], num_evens, None, None)
    odds = merge_tokens_cuda(vectors, side_labels[1], num_odds, None, None)
    # Find each even group's partner, then select the r most similar even groups.
    partners, best = nearest_anchors_cuda(
        evens, odds, sizes[1], even_exists, metric=metric, similarity=True
    )
    selected = top_tokens_cuda(best, sizes[2], num_evens)
    roots = empty(positions.shape, np.int32)
    args = (positions, selected, partners, batch, num_tokens, num_evens, roots)
    launch("bipartite", "join_partners", np.float32, args, outputs=roots.size)
    return number_groups_cuda(roots, "last")
