"""Groups around anchors: each token joins its most similar anchor.

Anchors are K tokens of a sequence. Each anchor is the centre of one group. A root is
the number of a token's group before the groups are numbered 0..K-1; here it is the
position of the group's anchor.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import rows_of
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import Tiling
from ...progress import report
from ...settings import implementation
from ..merging.unmerge_tokens import unmerge_tokens_cuda
from ..saliency.token_norms import token_norms_cuda
from ..selection.select_tokens import selected_positions_cuda, top_tokens_cuda
from .labels import Groups
from .metrics import products_operand_cuda


def nearest_groups_reference(
    vectors: NDArray[Any], anchors: NDArray[Any], metric: str
) -> Groups:
    """Return the group (N,) of each vector (N, D): its most similar anchor.

    The vectors are those of `metric_vectors`. Of equally similar anchors, a token joins
    the earlier one, unless rounding makes another one more similar. `anchors` (K,)
    holds positions.
    """
    anchors = np.sort(anchors)  # argmax selects the first maximum: the lower position
    anchor_vectors = vectors[anchors]  # (K, D)
    similarity = vectors @ anchor_vectors.T  # (N, K)
    report(0.8)
    if metric == "euclidean":
        # The nearest anchor has the greatest x·a - ½‖a‖² = ½‖x‖² - ½‖x - a‖².
        similarity -= np.einsum("kd,kd->k", anchor_vectors, anchor_vectors) / 2
    groups = np.argmax(similarity, axis=-1)  # (N,)
    groups[anchors] = np.arange(len(anchors))  # an anchor does not join an equal anchor
    return groups


def nearest_groups_cuda(
    tokens: Any,
    anchors: Any,
    counts: Any = None,
    mask: Any = None,
    protect: Any = None,
    *,
    metric: str = "cosine",
) -> Any:
    """Return roots: each token joins the most similar of its `anchors` (B, K).

    Anchors are positions, in any order. A sequence with fewer anchors is padded with
    -1; alternatively, `counts` (B,) gives the number of its anchors.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    anchors = contiguous(anchors, np.int32)
    tokens = products_operand_cuda(tokens, mask, protect, metric)
    num_groups = anchors.shape[-1]
    # Sort the anchors and drop duplicates, so that ties go to the lower position: mark
    # the anchors in the sequence, then list the marked positions.
    is_anchor = empty(tokens.shape[:-1], np.bool_)
    args: tuple[Any, ...]
    args = (anchors, mask, counts, batch, num_tokens, num_groups, is_anchor)
    launch("nearest", "mark_anchors", np.float32, args, outputs=is_anchor.size)
    anchors = selected_positions_cuda(is_anchor, num_groups)  # (B, K)
    norms = token_norms_cuda(tokens, mask)
    # `anchor_norms` (B, K) holds the norms of the anchors. A protected anchor is the
    # only member of its group. Its norm is set to -1, so that `nearest_anchors_cuda`
    # ignores this anchor. Entries that are padding also get -1, so the call below needs
    # no counts.
    anchor_norms = empty(anchors.shape, norms.dtype)
    args = (anchors, norms, protect, batch, num_tokens, num_groups, anchor_norms)
    launch("nearest", "open_anchors", norms.dtype, args, outputs=anchor_norms.size)
    # `unmerge_tokens_cuda` gathers rows: here the tokens at the anchors.
    anchor_tokens = unmerge_tokens_cuda(tokens, anchors, None)  # (B, K, D)
    nearest, _ = nearest_anchors_cuda(
        tokens, anchor_tokens, None, mask, anchor_norms, metric=metric
    )
    out = empty(nearest.shape, np.int32)
    sizes = batch, num_tokens, num_groups
    args = (nearest, anchors, is_anchor, mask, protect, *sizes, out)
    launch("nearest", "join_anchors", np.float32, args, outputs=out.size)
    return out


def nearest_anchors_cuda(
    tokens: Any,
    anchors: Any,
    counts: Any = None,
    mask: Any = None,
    anchor_norms: Any = None,
    *,
    metric: str = "cosine",
    similarity: bool = False,
) -> tuple[Any, Any]:
    """Return the index (B, N) of each token's most similar anchor.

    `tokens` are (B, N, D). Here `anchors` (B, K, D) are vectors, not positions; they
    need not be tokens of the sequence. The second result is the similarity (B, N), or
    None without `similarity`: the cosine, or -‖x - a‖² for "euclidean". Of equally
    similar anchors, the first one is returned. A sequence has only its first `counts`
    (B,) anchors, or all K without counts. Entries with negative `anchor_norms` (B, K)
    are not anchors. Padding and tokens of a sequence without anchors get index -1 and
    similarity -inf.
    """
    *leading, num_tokens, dim = tokens.shape
    batch, num_groups = math.prod(leading), anchors.shape[-2]
    tokens, anchors = contiguous(tokens), contiguous(anchors)
    # A token's own norm does not change which anchor is nearest, so the optimized
    # kernel needs the norms only for the similarity.
    acc_dtype, norms = accumulation_dtype(tokens.dtype), None
    if similarity or implementation() == "basic":
        norms = token_norms_cuda(tokens)
    out = empty((*leading, num_tokens), np.int32)
    highest = empty(out.shape, acc_dtype) if similarity else None
    if anchor_norms is None:
        anchor_norms = token_norms_cuda(anchors)
    inputs = tokens, norms, contiguous(mask), anchors, anchor_norms, counts
    args = (*inputs, batch, num_tokens, dim, num_groups, out, highest)
    names = {"cosine": "nearest_anchors", "euclidean": "euclidean_anchors"}
    kernel = "nearest", names[metric]
    # A block of the optimized kernel computes whole rows of similarities, because it
    # keeps only the maximum of each row. This kernel also exists for wide tiles
    # (128 × 256). The basic kernel has a thread for each token.
    tiling = Tiling(batch, num_tokens, num_groups, whole_rows=True, wide=True)
    launch(*kernel, tokens.dtype, args, outputs=out.size, tiles=tiling)
    return out, highest


def top_norm_anchors_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return the positions (B, K) of the default anchors, in ascending order.

    The protected tokens are selected first, then the tokens of largest norm.
    """
    norms = token_norms_cuda(tokens, mask)
    # Scores are norms, but infinite for protected tokens: these are selected first.
    scores = empty(norms.shape, norms.dtype)
    masks = contiguous(mask), contiguous(protect)
    args = (norms, *masks, norms.size, scores)
    launch("nearest", "anchor_scores", norms.dtype, args, outputs=norms.size)
    return selected_positions_cuda(
        top_tokens_cuda(scores, counts, num_groups), num_groups
    )
