"""Clustering: tokens to exactly K groups by cosine similarity, in causal order."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from . import _cuda
from ._arrays import Array, enter
from ._checks import (
    check_anchors,
    check_choice,
    check_dendrogram,
    check_given,
    check_mask,
    check_num_groups,
    check_number,
    check_tokens,
    largest,
)
from ._matching import bipartite_groups, contiguous_groups, nearest_groups
from .saliency import _relative_norms, _token_norms_cuda
from .selection import _num_valid, _select_tokens_reference

LINKAGES = ("average", "ward", "complete", "single")
METHODS = (*LINKAGES, "nearest", "bipartite", "contiguous")
ORDERS = ("last", "first")


def cosine_similarity(tokens: Array) -> Array:
    r"""Cosine of the angle between every two tokens of a sequence.

    .. math:: S_{ij} = \frac{x_i \cdot x_j}{\lVert x_i \rVert \lVert x_j \rVert}

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, float32 or float64.

    Returns
    -------
    ndarray of shape (N, N) or (B, N, N)
        Similarities within [-1, 1], exactly symmetric; float32, or float64 for float64
        input. A token of norm 0 has similarity 0 with all, itself included.

    Raises
    ------
    TypeError
        If `tokens` is not floating.
    ValueError
        If the shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> cosine_similarity(np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]))
    array([[1., 1., 0.],
           [1., 1., 0.],
           [0., 0., 1.]])
    """
    leave, tokens = enter(tokens=tokens)
    check_tokens(tokens)
    if _cuda.is_cuda(tokens):
        return leave(_cosine_similarity_cuda(tokens))
    return leave(_cosine_similarity_reference(tokens))


def _cosine_similarity_reference(tokens: NDArray[Any]) -> NDArray[Any]:
    *batch, num_tokens, _ = tokens.shape
    dtype = np.result_type(tokens.dtype, np.float32)
    similarity = np.empty((*batch, num_tokens, num_tokens), dtype)
    for index in np.ndindex(*batch):
        unit = _unit_tokens(tokens[index].astype(dtype))
        np.matmul(unit, unit.T, out=similarity[index])  # one triangle, mirrored
        np.fill_diagonal(similarity[index], unit.any(axis=-1))
    return similarity.clip(-1, 1, out=similarity)


def _cosine_similarity_cuda(tokens: Any) -> Any:
    *leading, num_tokens, dim = tokens.shape
    batch, kind = math.prod(leading), _cuda.accumulation(tokens.dtype)
    out = _cuda.empty((*leading, num_tokens, num_tokens), kind)
    tokens, norms = _cuda.contiguous(tokens), _token_norms_cuda(tokens)
    args = (tokens, norms, batch, num_tokens, dim, out)
    num_tiles = -(-num_tokens // _cuda.TILE)
    blocks = batch * num_tiles * (num_tiles + 1) // 2
    chosen = _cuda.implementation()
    threads = out.size if chosen == "basic" else blocks * _cuda.BLOCK
    _cuda.launch(
        f"{chosen}/clustering", "cosine_similarity", tokens.dtype, threads, args
    )
    return out


def _unit_tokens(x: NDArray[Any]) -> NDArray[Any]:
    """Scale each token to norm 1; zero tokens stay zero."""
    peak = np.abs(x).max(axis=-1, keepdims=True)  # first, so that no square overflows
    x = x / np.where(peak > 0, peak, 1)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def linkage(tokens: Array, method: str = "average") -> Array:
    r"""Dendrogram of each sequence's tokens by cosine similarity, in SciPy's format.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, float32 or float64.
    method : {"average", "ward", "complete", "single"}, default "average"
        Distance between groups. Between tokens it is 1 - cos, for ward √(2 - 2 cos),
        the distance of unit vectors.

    Returns
    -------
    ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        float64, a merge a row, nearest first: the two groups merged (tokens are
        0..N-1, row i makes group N + i), their distance, the size of the new group.

    Raises
    ------
    TypeError
        If `tokens` is not floating.
    ValueError
        If the shape does not fit, an entry is not finite or there is no such method.

    See Also
    --------
    scipy.cluster.hierarchy.linkage : The algorithm, after the distances.

    Notes
    -----
    Takes 16 N² bytes or so for each sequence in turn. Equal distances are taken in an
    order that depends on the tokens alone.

    Examples
    --------
    >>> import numpy as np
    >>> linkage(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    array([[0., 1., 0., 2.],
           [2., 3., 1., 3.]])
    """
    leave, tokens = enter(tokens=tokens)
    check_tokens(tokens)
    check_choice("method", method, LINKAGES)
    if _cuda.is_cuda(tokens):  # dendrograms grow on the CPU so far
        return leave(_cuda.to_device(_linkage_reference(_cuda.to_host(tokens), method)))
    return leave(_linkage_reference(tokens, method))


def _linkage_reference(tokens: NDArray[Any], method: str) -> NDArray[np.float64]:
    *batch, num_tokens, _ = tokens.shape
    dendrogram = np.empty((*batch, num_tokens - 1, 4))
    for index in np.ndindex(*batch):
        dendrogram[index] = _linkage_sequence(tokens[index], method)
    return dendrogram


def _linkage_sequence(tokens: NDArray[Any], method: str) -> NDArray[np.float64]:
    if len(tokens) == 1:
        return np.empty((0, 4))
    distance = _cosine_similarity_reference(tokens.astype(np.float64))
    np.subtract(1, distance, out=distance)
    if method == "ward":
        np.sqrt(2 * distance, out=distance)
    condensed = squareform(distance, checks=False)
    tree: NDArray[np.float64] = hierarchy.linkage(condensed, method)
    return tree


def cut_linkage(
    dendrogram: Array,
    *,
    num_groups: Any = None,
    max_error: float | None = None,
    order: str = "last",
) -> Array:
    r"""Groups of a dendrogram, cut at exactly K groups or within an error.

    Parameters
    ----------
    dendrogram : ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        As `linkage` gives it.
    num_groups : int or ndarray of int of shape (B,), optional
        K, or K of each sequence.
    max_error : float, optional
        Instead of K, for a ward dendrogram: the fewest groups whose squared distance
        of unit tokens to their group's mean, summed and divided by N, is at most this.
        K may then differ from sequence to sequence: it is ``labels.max(-1) + 1``.
    order : {"last", "first"}, default "last"
        Number groups by the position of their last member, so that no group holds a
        token later than its place, or of their first.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        int32 labels within 0..K-1.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If the dendrogram is not one, K is outside 1..N, or not exactly one of
        `num_groups` and `max_error` is given.

    Notes
    -----
    A ward merge at height h adds h²/2 to the squared error.

    Examples
    --------
    >>> import numpy as np
    >>> tree = linkage(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), "ward")
    >>> cut_linkage(tree, num_groups=2)
    array([1, 0, 1], dtype=int32)
    >>> cut_linkage(tree, max_error=0.0)
    array([1, 0, 1], dtype=int32)
    """
    leave, dendrogram, num_groups = enter(dendrogram=dendrogram, num_groups=num_groups)
    check_given("dendrogram", dendrogram)
    on_gpu = _cuda.is_cuda(dendrogram)
    dendrogram = _cuda.to_host(dendrogram)
    check_dendrogram(dendrogram)
    check_choice("order", order, ORDERS)
    if (num_groups is None) == (max_error is None):
        raise ValueError("give exactly one of `num_groups` and `max_error`")
    batch, num_tokens = dendrogram.shape[:-2], dendrogram.shape[-2] + 1
    if max_error is None:
        counts = check_num_groups(num_groups, batch, num_tokens)
    else:
        bound = check_number("max_error", max_error, 0, np.inf, "[)")
        error = np.cumsum(dendrogram[..., 2] ** 2 / 2, axis=-1) / num_tokens
        merges = np.sum(error <= bound + 1e-12, axis=-1)  # to rounding
        counts = np.asarray(num_tokens - merges)
    labels = np.empty((*batch, num_tokens), np.int32)
    for index in np.ndindex(*batch):
        groups = _cut(dendrogram[index], int(counts[index]))
        labels[index] = _in_order(groups, order)
    return leave(_cuda.to_device(labels) if on_gpu else labels)


def _cut(dendrogram: NDArray[Any], num_groups: int) -> NDArray[np.intp]:
    """Return the topmost node above each token once N - K merges are made."""
    num_tokens = len(dendrogram) + 1
    merges = num_tokens - num_groups
    parent = np.arange(num_tokens + merges)
    children = dendrogram[:merges, :2].astype(np.intp)
    parent[children] = num_tokens + np.arange(merges)[:, None]
    while True:  # each round doubles the distance climbed
        above = parent[parent]
        if np.array_equal(above, parent):
            return parent[:num_tokens]
        parent = above


def _in_order(groups: NDArray[np.intp], order: str) -> NDArray[np.intp]:
    """Number groups 0..K-1 by the position of their last or first member."""
    forwards = groups if order == "first" else groups[::-1]
    _, place, label = np.unique(forwards, return_index=True, return_inverse=True)
    if order == "last":
        place, label = -place, label[::-1]
    rank = np.argsort(np.argsort(place))
    return rank[label]


def cluster_tokens(
    tokens: Array,
    num_groups: Any,
    *,
    method: str = "average",
    anchors: Array | None = None,
    mask: Array | None = None,
    order: str = "last",
) -> Array:
    """Put the tokens of each sequence into exactly K groups by cosine similarity.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    method : str, default "average"
        "average", "ward", "complete" or "single": the hierarchy of `linkage`, cut at K.
        "nearest": each token joins the most similar of K anchors.
        "bipartite": the soft matching of ToMe [1]_ (even places to odd ones), repeated
        until K groups are left.
        "contiguous": only neighbours merge, each time the pair that adds least to the
        squared error of unit tokens.
    anchors : ndarray of int of shape (K,) or (B, K), optional
        For "nearest": distinct positions, padded with -1 where K differs between
        sequences. By default the K tokens of largest norm.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens get label -1.
    order : {"last", "first"}, default "last"
        Number groups by the position of their last member, so that no group holds a
        token later than its place, or of their first.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        int32 labels within 0..K-1, each of them used; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, K exceeds the tokens, a method
        or order does not exist, or `anchors` are not distinct tokens.

    References
    ----------
    .. [1] D. Bolya, C.-Y. Fu, X. Dai, P. Zhang, C. Feichtenhofer and J. Hoffman,
       "Token merging: Your ViT but faster", ICLR 2023, arXiv:2210.09461.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
    >>> cluster_tokens(tokens, 2)
    array([0, 1, 0, 1], dtype=int32)
    """
    leave, tokens, num_groups, anchors, mask = enter(
        tokens=tokens, num_groups=num_groups, anchors=anchors, mask=mask
    )
    check_tokens(tokens)
    check_choice("method", method, METHODS)
    check_choice("order", order, ORDERS)
    on_gpu = _cuda.is_cuda(tokens)  # groups are found on the CPU so far
    mask, given = _cuda.to_host(mask), _cuda.to_host(anchors)
    tokens = _cuda.to_host(tokens)
    check_mask(mask, tokens.shape[:-1])
    limit = _num_valid(tokens[..., 0], mask)
    counts = check_num_groups(num_groups, tokens.shape[:-2], limit)
    most = largest(num_groups, counts)
    if given is not None:
        check_anchors(given, method, counts, most, tokens.shape[:-1], mask)
    elif method == "nearest":
        norms = _relative_norms(tokens, mask)
        given = _select_tokens_reference(norms, counts, most, mask)
    labels = _cluster_tokens_reference(tokens, counts, method, given, mask, order)
    return leave(_cuda.to_device(labels) if on_gpu else labels)


def _cluster_tokens_reference(
    tokens: NDArray[Any],
    counts: NDArray[np.int64],
    method: str,
    anchors: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
    order: str,
) -> NDArray[np.int32]:
    labels = np.full(tokens.shape[:-1], -1, np.int32)
    for index in np.ndindex(tokens.shape[:-2]):
        keep = np.ones(tokens.shape[-2], np.bool_) if mask is None else mask[index]
        x, num_groups = tokens[index][keep], int(counts[index])  # the padding cut off
        if num_groups == len(x):
            groups = np.arange(len(x))
        elif method in LINKAGES:
            groups = _cut(_linkage_sequence(x, method), num_groups)
        elif method == "nearest" and anchors is not None:
            place = np.cumsum(keep) - 1  # of each token once the padding is cut off
            unit = _unit_tokens(x.astype(np.float64))
            groups = nearest_groups(unit, place[anchors[index][:num_groups]])
        else:
            match = bipartite_groups if method == "bipartite" else contiguous_groups
            groups = match(_unit_tokens(x.astype(np.float64)), num_groups)
        labels[index][keep] = _in_order(groups, order)
    return labels
