"""Groups on a GPU: launchers of the kernels that label tokens.

Tokens are (N, D) or (B, N, D), `mask` and `protect` bool (N,) or (B, N); K is
`num_groups` for all sequences, or `counts` (B,), int32 and at most `num_groups`.
Protected tokens are groups of their own, and K counts them. Roots name each token's
group by any number within 0..2N-1, -1 for padding; `number_groups_cuda` makes labels
of them. Nothing is read back.
"""

import math
from typing import Any

import numpy as np

from . import _cuda, _tiles
from .merging import _merge_tokens_cuda, _unmerge_tokens_cuda
from .saliency import _token_norms_cuda


def number_groups_cuda(roots: Any, order: str) -> Any:
    """Return labels: groups 0.. by their last or first member's position."""
    batch, num_tokens = _rows(roots)
    roots = _cuda.contiguous(roots, np.int32)
    out = _cuda.empty(roots.shape, np.int32)
    first = int(order == "first")
    if _cuda.implementation() == "basic":
        ends = _cuda.empty(roots.shape, np.bool_)
        args: tuple[Any, ...] = (roots, batch, num_tokens, first, ends)
        _launch("labels", "group_ends", out.size, args)
        args = (roots, ends, batch, num_tokens, out)
        _launch("labels", "number_groups", out.size, args)
    else:
        places = _cuda.empty((batch, 2 * num_tokens), np.int32)
        args = (roots, batch, num_tokens, first, places, out)
        _launch_sequences("labels", "number_groups", np.float32, args, out)
    return out


def cut_linkage_cuda(
    dendrogram: Any,
    counts: Any,
    num_groups: int,
    max_error: float | None = None,
    mass: Any = None,
    mask: Any = None,
    order: str = "last",
) -> Any:
    """Return labels (B, N) of dendrograms (B, N - 1, 4) cut at K or at `max_error`."""
    *leading, rows, _ = dendrogram.shape
    batch, num_tokens = math.prod(leading), rows + 1
    dendrogram = _cuda.contiguous(dendrogram, np.float64)
    kind = np.dtype(np.float32) if mass is None else _cuda.accumulation(mass.dtype)
    weights = _cuda.contiguous(mass, kind), _cuda.contiguous(mask)
    bound = -1.0 if max_error is None else float(max_error)
    out = _cuda.empty((*leading, num_tokens), np.int32)
    sizes = counts, batch, num_tokens, num_groups, bound
    args: tuple[Any, ...] = (dendrogram, *weights, *sizes)
    if _cuda.implementation() == "basic":
        merges = _cuda.empty((batch,), np.int32)
        _cuda.launch("basic/cut_linkage", "count_merges", kind, batch, (*args, merges))
        args = (dendrogram, weights[1], merges, batch, num_tokens, out)
        _launch("cut_linkage", "dendrogram_roots", out.size, args)
        return number_groups_cuda(out, order)
    nodes = _cuda.empty((batch, 4 * num_tokens), np.int32)
    args = (*args, int(order == "first"), nodes, out)
    _launch_sequences("cut_linkage", "cut_linkage", kind, args, out)
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
    tokens, anchors = _cuda.contiguous(tokens), _cuda.contiguous(anchors)
    kind, chosen = _cuda.accumulation(tokens.dtype), _cuda.implementation()
    norms = None
    if similarity or chosen == "basic":
        norms = _token_norms_cuda(tokens)
    out = _cuda.empty((*leading, num_tokens), np.int32)
    highest = _cuda.empty(out.shape, kind) if similarity else None
    if anchor_norms is None:
        anchor_norms = _token_norms_cuda(anchors)
    given = tokens, norms, _cuda.contiguous(mask), anchors, anchor_norms, counts
    args = (*given, batch, num_tokens, dim, num_groups, out, highest)
    kernel = "nearest_anchors"
    if chosen == "basic":
        _cuda.launch("basic/nearest", kernel, tokens.dtype, out.size, args)
        return out, highest

    def blocks(shape: _tiles.Shape) -> int:
        return batch * _tiles.row_tiles(shape, num_tokens)

    def tiles(shape: _tiles.Shape) -> int:
        return _tiles.column_tiles(shape, num_groups)

    shape = _tiles.select_shape(blocks, tokens.dtype, tiles)
    _tiles.launch("nearest", kernel, tokens.dtype, shape, blocks(shape), args)
    return out, highest


def top_norm_anchors_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return the default anchors (B, K): protected tokens, then the largest norms."""
    norms = _token_norms_cuda(tokens, mask)
    scores = _cuda.empty(norms.shape, norms.dtype)
    masks = _cuda.contiguous(mask), _cuda.contiguous(protect)
    args = (norms, *masks, norms.size, scores)
    kernel = "basic/nearest", "anchor_scores"
    _cuda.launch(*kernel, norms.dtype, norms.size, args)
    return _selected(_top(scores, counts, num_groups), num_groups)


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
    batch, num_tokens = _rows(tokens[..., 0])
    mask, protect = _cuda.contiguous(mask), _cuda.contiguous(protect)
    anchors = _cuda.contiguous(anchors, np.int32)
    num_groups = anchors.shape[-1]
    chosen = _cuda.empty(tokens.shape[:-1], np.bool_)
    args: tuple[Any, ...] = (anchors, mask, counts, batch, num_tokens, num_groups)
    _launch("nearest", "mark_anchors", chosen.size, (*args, chosen))
    anchors = _selected(chosen, num_groups)  # by position, each of them once
    norms = _token_norms_cuda(tokens, mask)
    open_norms = _cuda.empty(anchors.shape, norms.dtype)
    args = (anchors, norms, protect, batch, num_tokens, num_groups, open_norms)
    file = "basic/nearest"
    _cuda.launch(file, "open_anchors", norms.dtype, open_norms.size, args)
    given = _unmerge_tokens_cuda(tokens, anchors, None)  # the gather by position
    nearest, _ = nearest_anchors_cuda(tokens, given, None, mask, open_norms)
    out = _cuda.empty(nearest.shape, np.int32)
    args = (nearest, anchors, chosen, mask, protect, batch, num_tokens, num_groups)
    _launch("nearest", "join_anchors", out.size, (*args, out))
    return out


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
    batch, num_tokens = _rows(tokens[..., 0])
    mask, protect = _cuda.contiguous(mask), _cuda.contiguous(protect)
    if counts is None:
        fewest = num_groups
    if protect is not None:  # K leaves any number to the other tokens
        fewest = 1
    # In the first step, three quarters of the work, each group is one token. 16-bit
    # tokens are compared as they are, so that the tensor cores take the product.
    vectors = _cuda.contiguous(tokens)
    if tokens.dtype.itemsize > 2:
        vectors = _unit_tokens_cuda(vectors, mask)
    roots = _cuda.empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (mask, protect, batch, num_tokens, roots)
    _launch("bipartite", "free_tokens", roots.size, args)
    places = number_groups_cuda(roots, "last")
    most = left = num_tokens  # at most as many groups, in any sequence, with the least
    while left > max(fewest, 1):
        sizes = _cuda.empty((3, batch), np.int32)
        args = (places, mask, protect, counts, batch, num_tokens, num_groups, sizes)
        _match_counts_cuda(args, places)
        places = _match_cuda(vectors, places, sizes, most)
        left = max(fewest, -(-left // 2))
        if left > max(fewest, 1) and vectors.dtype.itemsize == 2:
            vectors = _unit_tokens_cuda(vectors, mask)  # for the means of the groups
        most = max(min(num_groups, most), -(-most // 2))
    out = _cuda.empty(places.shape, np.int32)
    args = (places, mask, batch, num_tokens, out)
    _launch("bipartite", "match_roots", out.size, args)
    return out


def _match_cuda(vectors: Any, places: Any, sizes: Any, most: int) -> Any:
    """Return the places (B, N) after one step, from at most `most` groups.

    A group's direction is the mean of its tokens' `vectors` (B, N, D).
    """
    batch, num_tokens = _rows(places)
    num_evens, num_odds = -(-most // 2), most // 2
    sides = [_cuda.empty(places.shape, np.int32) for _ in range(2)]
    exist = _cuda.empty((*places.shape[:-1], num_evens), np.bool_)
    args: tuple[Any, ...] = (places, sizes, batch, num_tokens, num_evens)
    _launch("bipartite", "match_sides", places.size, (*args, *sides, exist))
    evens = _merge_tokens_cuda(vectors, sides[0], num_evens, None, None)
    odds = _merge_tokens_cuda(vectors, sides[1], num_odds, None, None)
    partners, best = nearest_anchors_cuda(evens, odds, sizes[1], exist, similarity=True)
    chosen = _top(best, sizes[2], num_evens)
    roots = _cuda.empty(places.shape, np.int32)
    args = (places, chosen, partners, batch, num_tokens, num_evens, roots)
    _launch("bipartite", "join_partners", roots.size, args)
    return number_groups_cuda(roots, "last")


def _match_counts_cuda(args: tuple[Any, ...], places: Any) -> None:
    if _cuda.implementation() == "basic":
        batch, _ = _rows(places)
        _cuda.launch("basic/bipartite", "match_counts", np.float32, batch, args)
    else:
        _launch_sequences("bipartite", "match_counts", np.float32, args, places)


def contiguous_groups_cuda(
    tokens: Any, counts: Any, num_groups: int, mask: Any = None, protect: Any = None
) -> Any:
    """Return roots: neighbours merge, the cheapest pair first, until K are left."""
    (batch, num_tokens), dim = _rows(tokens[..., 0]), tokens.shape[-1]
    masks = _cuda.contiguous(mask), _cuda.contiguous(protect)
    sums = _unit_tokens_cuda(tokens, masks[0])
    kind = sums.dtype
    out = _cuda.empty(tokens.shape[:-1], np.int32)
    args: tuple[Any, ...] = (*masks, counts, batch, num_tokens, dim, num_groups)
    if _cuda.implementation() == "basic":
        reals = _cuda.empty((batch, 3 * num_tokens), kind)
        links = _cuda.empty((batch, 2 * num_tokens), np.int32)
        args = (sums, *args, reals, links, out)
        _cuda.launch("basic/contiguous", "contiguous_groups", kind, batch, args)
        return out
    file = "optimized/contiguous"
    products = _cuda.empty((batch, num_tokens), kind)
    given = (sums, masks[0], batch, num_tokens, dim, products)
    _cuda.launch(file, "neighbour_products", kind, out.size * _cuda.WARP, given)
    reals = links = None
    shared = num_tokens * (5 * kind.itemsize + 3 * 4)  # what the groups take
    if shared > _cuda.dynamic_shared_bytes(file, "contiguous_groups", kind):
        shared, reals = 0, _cuda.empty((batch, 5 * num_tokens), kind)
        links = _cuda.empty((batch, 3 * num_tokens), np.int32)
    args = (sums, products, *args, reals, links, out)
    threads = batch * _cuda.BLOCK
    _cuda.launch(file, "contiguous_groups", kind, threads, args, shared=shared)
    return out


def _unit_tokens_cuda(tokens: Any, mask: Any) -> Any:
    """Return tokens of norm 1, or 0, in the accumulation type."""
    tokens, num_rows = _cuda.contiguous(tokens), math.prod(tokens.shape[:-1])
    out = _cuda.empty(tokens.shape, _cuda.accumulation(tokens.dtype))
    args = (tokens, mask, num_rows, tokens.shape[-1], out)
    chosen = _cuda.implementation()
    threads = num_rows * (1 if chosen == "basic" else _cuda.WARP)
    _cuda.launch(f"{chosen}/unit_tokens", "unit_tokens", tokens.dtype, threads, args)
    return out


def _top(scores: Any, counts: Any, num_groups: int) -> Any:
    """Mark the K highest of scores whose padding is -inf."""
    out = _cuda.empty(scores.shape, np.bool_)
    args = (scores, counts, *_rows(scores), num_groups, out)
    if _cuda.implementation() == "basic":
        _cuda.launch("basic/select_tokens", "top_tokens", scores.dtype, out.size, args)
    else:
        kernel, most = ("select_tokens", "top_tokens"), _cuda.SELECTION_THREADS
        _launch_sequences(*kernel, scores.dtype, args, scores, most)
    return out


def _selected(chosen: Any, num_groups: int) -> Any:
    """Return the positions (B, K) of what is chosen, ascending, then -1."""
    out = _cuda.empty((*chosen.shape[:-1], num_groups), np.int32)
    args = (chosen, *_rows(chosen), num_groups, out)
    if _cuda.implementation() == "basic":
        _cuda.launch("basic/select_tokens", "select_tokens", np.float32, out.size, args)
    else:
        kernel, most = ("select_tokens", "select_tokens"), _cuda.SELECTION_THREADS
        _launch_sequences(*kernel, np.float32, args, chosen, most)
    return out


def _rows(x: Any) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _launch(file: str, kernel: str, threads: int, args: tuple[Any, ...]) -> None:
    """Run a basic kernel that knows no real numbers."""
    _cuda.launch(f"basic/{file}", kernel, np.float32, threads, args)


def _launch_sequences(
    file: str,
    kernel: str,
    dtype: Any,
    args: tuple[Any, ...],
    x: Any,
    most: int = _cuda.GROUP_THREADS,
) -> None:
    """Run an optimized kernel with a block for each sequence of `x` (B, N).

    A block has a thread for each token, and at most `most`.
    """
    batch, num_tokens = _rows(x)
    block = min(-(-num_tokens // _cuda.WARP) * _cuda.WARP, most)
    threads = batch * block
    _cuda.launch(f"optimized/{file}", kernel, dtype, threads, args, block=block)
