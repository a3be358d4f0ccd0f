"""Groups around anchors: each token joins the most similar one."""

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
    """Join each token to its most similar anchor (ties: the earlier anchor)."""
    anchors = np.sort(anchors)
    groups = np.argmax(unit @ unit[anchors].T, axis=-1)  # (N, K) -> (N,)
    groups[anchors] = np.arange(len(anchors))  # an anchor stands for itself
    return groups


def nearest_groups_cuda(
    tokens: Any,
    anchors: Any,
    counts: Any = None,
    mask: Any = None,
    protect: Any = None,
) -> Any:
    """Return roots: each token joins the most similar of its `anchors` (B, K).

    They are positions, in any order; behind the last, or `counts`, they are -1.
    """
    batch, num_tokens = rows_of(tokens[..., 0])
    mask, protect = contiguous(mask), contiguous(protect)
    anchors = contiguous(anchors, np.int32)
    num_groups = anchors.shape[-1]
    chosen = empty(tokens.shape[:-1], np.bool_)
    args: tuple[Any, ...]
    args = (anchors, mask, counts, batch, num_tokens, num_groups, chosen)
    launch("nearest", "mark_anchors", np.float32, args, outputs=chosen.size)
    anchors = selected_positions_cuda(
        chosen, num_groups
    )  # by position, each of them once
    norms = token_norms_cuda(tokens, mask)
    open_norms = empty(anchors.shape, norms.dtype)
    args = (anchors, norms, protect, batch, num_tokens, num_groups, open_norms)
    launch("nearest", "open_anchors", norms.dtype, args, outputs=open_norms.size)
    given = unmerge_tokens_cuda(tokens, anchors, None)  # the gather by position
    nearest, _ = nearest_anchors_cuda(tokens, given, None, mask, open_norms)
    out = empty(nearest.shape, np.int32)
    sizes = batch, num_tokens, num_groups
    args = (nearest, anchors, chosen, mask, protect, *sizes, out)
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
    """Return each token's most similar of its sequence's `anchors` (B, K, D).

    Also returns how similar, if asked to. Of equals it is the first; where a token has
    no anchor it is -1, at a similarity of -inf. `anchor_norms` are negative where an
    anchor is none.
    """
    *leading, num_tokens, dim = tokens.shape
    batch, num_groups = math.prod(leading), anchors.shape[-2]
    tokens, anchors = contiguous(tokens), contiguous(anchors)
    acc_dtype, norms = accumulation_dtype(tokens.dtype), None
    if similarity or implementation() == "basic":
        norms = token_norms_cuda(tokens)
    out = empty((*leading, num_tokens), np.int32)
    highest = empty(out.shape, acc_dtype) if similarity else None
    if anchor_norms is None:
        anchor_norms = token_norms_cuda(anchors)
    given = tokens, norms, contiguous(mask), anchors, anchor_norms, counts
    args = (*given, batch, num_tokens, dim, num_groups, out, highest)
    kernel = "nearest", "nearest_anchors"
    tiling = Tiling(batch, num_tokens, num_groups, whole_rows=True, wide=True)
    launch(*kernel, tokens.dtype, args, outputs=out.size, tiles=tiling)
    return out, highest


def top_norm_anchors_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return the default anchors (B, K): protected tokens, then the largest norms."""
    norms = token_norms_cuda(tokens, mask)
    scores = empty(norms.shape, norms.dtype)
    masks = contiguous(mask), contiguous(protect)
    args = (norms, *masks, norms.size, scores)
    launch("nearest", "anchor_scores", norms.dtype, args, outputs=norms.size)
    return selected_positions_cuda(
        top_tokens_cuda(scores, counts, num_groups), num_groups
    )
