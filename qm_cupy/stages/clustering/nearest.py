"""Groups around anchors: each token joins its most similar anchor."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import rows_of
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import Tiling
from ...settings import implementation
from ..merging.unmerge_tokens import unmerge_tokens_cuda
from ..saliency.token_norms import token_norms_cuda
from ..selection.select_tokens import selected_positions_cuda, top_tokens_cuda
from .labels import Groups


def nearest_groups_reference(unit: NDArray[Any], anchors: NDArray[Any]) -> Groups:
    """Put each token into the group of its most similar anchor (ties: the earlier)."""
    anchors = np.sort(anchors)  # argmax then prefers the anchor of lower position
    groups = np.argmax(unit @ unit[anchors].T, axis=-1)  # (N, K) -> (N,)
    groups[anchors] = np.arange(len(anchors))  # not its equal twin
    return groups


def nearest_groups_cuda(
    tokens: Any,
    anchors: Any,
    counts: Any = None,
    mask: Any = None,
    protect: Any = None,
) -> Any:
    """Return roots: each token joins the most similar of its `anchors` (B, K).

    Anchors are positions, in any order. A sequence with fewer anchors is padded with
    -1; alternatively, `counts` (B,) gives the number of its anchors.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    anchors = contiguous(anchors, np.int32)
    num_groups = anchors.shape[-1]
    is_anchor = empty(tokens.shape[:-1], np.bool_)
    args: tuple[Any, ...]
    args = (anchors, mask, counts, batch, num_tokens, num_groups, is_anchor)
    launch("nearest", "mark_anchors", np.float32, args, outputs=is_anchor.size)
    # Sort the anchors and drop duplicates, so that ties go to the lower position.
    anchors = selected_positions_cuda(is_anchor, num_groups)  # (B, K)
    norms = token_norms_cuda(tokens, mask)
    # No token joins a protected anchor: such anchors get norm -1, which excludes them.
    open_norms = empty(anchors.shape, norms.dtype)
    args = (anchors, norms, protect, batch, num_tokens, num_groups, open_norms)
    launch("nearest", "open_anchors", norms.dtype, args, outputs=open_norms.size)
    anchor_tokens = unmerge_tokens_cuda(tokens, anchors, None)  # gather rows: (B, K, D)
    nearest, _ = nearest_anchors_cuda(tokens, anchor_tokens, None, mask, open_norms)
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
    similarity: bool = False,
) -> tuple[Any, Any]:
    """Return the index of each token's most similar anchor of `anchors` (B, K, D).

    With `similarity`, also return its similarity. Of equal anchors the first one is
    returned. A token without an anchor gets index -1 and similarity -inf. Entries with
    negative `anchor_norms` are not anchors.
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
    kernel = "nearest", "nearest_anchors"
    # A block computes whole rows of similarities, because it keeps only their maximum.
    tiling = Tiling(batch, num_tokens, num_groups, whole_rows=True, wide=True)
    launch(*kernel, tokens.dtype, args, outputs=out.size, tiles=tiling)
    return out, highest


def top_norm_anchors_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return the default anchors (B, K): protected tokens, then the longest others."""
    norms = token_norms_cuda(tokens, mask)
    scores = empty(norms.shape, norms.dtype)
    masks = contiguous(mask), contiguous(protect)
    args = (norms, *masks, norms.size, scores)
    launch("nearest", "anchor_scores", norms.dtype, args, outputs=norms.size)
    return selected_positions_cuda(
        top_tokens_cuda(scores, counts, num_groups), num_groups
    )
