"""Clustering: tokens to exactly K groups by cosine similarity, in causal order."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_anchors,
    check_choice,
    check_dendrogram,
    check_given,
    check_mask,
    check_mass,
    check_mass_method,
    check_num_groups,
    check_number,
    check_protect,
    check_tokens,
    largest,
)
from ._linkage import (
    cut_reference,
    cut_sequence,
    in_order,
    linkage_reference,
    linkage_sequence,
)
from ._linkage_cuda import cosine_similarity_cuda, dendrograms_cuda
from ._matching import (
    _gram,
    _unit_tokens,
    bipartite_groups,
    contiguous_groups,
    nearest_groups,
)
from ._matching_cuda import (
    bipartite_groups_cuda,
    contiguous_groups_cuda,
    cut_linkage_cuda,
    nearest_groups_cuda,
    number_groups_cuda,
    top_norm_anchors_cuda,
)
from .saliency import _relative_norms
from .selection import _num_valid, _select_tokens_reference

LINKAGES = ("average", "ward", "complete", "single")
METHODS = (*LINKAGES, "nearest", "bipartite", "contiguous")
ORDERS = ("last", "first")


@on_callers_stream
def cosine_similarity(tokens: Array) -> Array:
    r"""Cosine of the angle between every two tokens of a sequence.

    .. math:: S_{ij} = \frac{x_i \cdot x_j}{\lVert x_i \rVert \lVert x_j \rVert}

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.

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
        return leave(cosine_similarity_cuda(tokens))
    return leave(_cosine_similarity_reference(tokens))


def _cosine_similarity_reference(tokens: NDArray[Any]) -> NDArray[Any]:
    *batch, num_tokens, _ = tokens.shape
    dtype = np.result_type(tokens.dtype, np.float32)
    similarity = np.empty((*batch, num_tokens, num_tokens), dtype)
    for index in np.ndindex(*batch):
        unit = _unit_tokens(tokens[index].astype(dtype))
        _gram(unit, similarity[index])
        np.fill_diagonal(similarity[index], unit.any(axis=-1))
    return similarity.clip(-1, 1, out=similarity)


@on_callers_stream
def linkage(
    tokens: Array,
    method: str = "average",
    *,
    mass: Array | None = None,
    mask: Array | None = None,
) -> Array:
    r"""Dendrogram of each sequence's tokens by cosine similarity, in SciPy's format.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    method : {"average", "ward", "complete", "single"}, default "average"
        Distance between groups. Between tokens it is 1 - cos, for ward √(2 - 2 cos),
        the distance of unit vectors.
    mass : ndarray of shape (N,) or (B, N), optional
        For "average" and "ward": a token of mass w counts as w equal tokens. What is
        below a millionth of the sequence's largest mass counts as that millionth, so
        that a token of no mass still joins its nearest; if all are 0, as 1 each.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.

    Returns
    -------
    ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        float64, a merge a row, nearest first: the two groups merged (tokens are
        0..N-1, row r makes group N + r), their distance, the tokens of the new group.
        n tokens that a mask keeps have n - 1 rows, and (-1, -1, inf, 0) follows.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative or for
        another method, a sequence has no tokens, or there is no such method.

    See Also
    --------
    scipy.cluster.hierarchy.linkage : The algorithm, after the distances.

    Notes
    -----
    With weights w, sums W_A of them and weighted means μ_A of unit tokens, the average
    distance is

    .. math:: \frac{1}{W_A W_C} \sum_{i \in A, j \in C} w_i w_j (1 - \cos_{ij})

    and ward's

    .. math:: \sqrt{\frac{2 W_A W_C}{W_A + W_C}} \lVert \mu_A - \mu_C \rVert.

    Takes 16 N² bytes or so for each sequence in turn. Equal distances are taken in an
    order that depends on the tokens alone.

    Examples
    --------
    >>> import numpy as np
    >>> linkage(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    array([[0., 1., 0., 2.],
           [2., 3., 1., 3.]])
    """
    leave, tokens, mass, mask = enter(tokens=tokens, mass=mass, mask=mask)
    check_tokens(tokens)
    check_choice("method", method, LINKAGES)
    check_mask(mask, tokens.shape[:-1])
    check_mass_method(mass, method)
    check_mass(mass, tokens.shape[:-1])
    if _cuda.is_cuda(tokens):
        return leave(dendrograms_cuda(tokens, method, mass, mask))
    return leave(linkage_reference(tokens, method, mass, mask))


@on_callers_stream
def cut_linkage(
    dendrogram: Array,
    *,
    num_groups: Any = None,
    max_error: float | None = None,
    mass: Array | None = None,
    mask: Array | None = None,
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
        of unit tokens to their group's mean, summed and divided by the number of
        tokens, is at most this. K may then differ from sequence to sequence: it is
        ``labels.max(-1) + 1``.
    mass : ndarray of shape (N,) or (B, N), optional
        With `max_error`, the masses the dendrogram was made with: squared distances
        are weighted by them and divided by their sum. To K groups they make no
        difference.
    mask : ndarray of shape (N,) or (B, N), optional
        The mask the dendrogram was made with.
    order : {"last", "first"}, default "last"
        Number groups by the position of their last member, so that no group holds a
        token later than its place, or of their first.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        int32 labels within 0..K-1; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If the dendrogram is not one, or not of this mask, K is outside 1..N, or not
        exactly one of `num_groups` and `max_error` is given.

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
    leave, dendrogram, num_groups, mass, mask = enter(
        dendrogram=dendrogram, num_groups=num_groups, mass=mass, mask=mask
    )
    check_given("dendrogram", dendrogram)
    check_choice("order", order, ORDERS)
    if (num_groups is None) == (max_error is None):
        raise ValueError("give exactly one of `num_groups` and `max_error`")
    check_dendrogram(dendrogram, mask)
    batch, num_tokens = dendrogram.shape[:-2], dendrogram.shape[-2] + 1
    check_mass(mass, (*batch, num_tokens))
    counts = None
    if max_error is None:
        limit = num_tokens if mask is None else mask.sum(axis=-1)
        counts = check_num_groups(num_groups, batch, limit)
    else:
        max_error = check_number("max_error", max_error, 0, np.inf, "[)")
    if _cuda.is_cuda(dendrogram):
        given, most = (None, 1) if counts is None else _cuda.counts(counts)
        cut = cut_linkage_cuda(dendrogram, given, most, max_error, mass, mask, order)
        return leave(cut)
    return leave(cut_reference(dendrogram, mass, mask, counts, max_error, order))


@on_callers_stream
def cluster_tokens(
    tokens: Array,
    num_groups: Any,
    *,
    method: str = "average",
    mass: Array | None = None,
    anchors: Array | None = None,
    protect: Array | None = None,
    mask: Array | None = None,
    order: str = "last",
) -> Array:
    """Put the tokens of each sequence into exactly K groups by cosine similarity.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    method : str, default "average"
        "average", "ward", "complete" or "single": the hierarchy of `linkage`, cut at K.
        "nearest": each token joins the most similar of K anchors.
        "bipartite": the soft matching of ToMe [1]_ (even places to odd ones), repeated
        until K groups are left.
        "contiguous": only neighbours merge, each time the pair that adds least to the
        squared error of unit tokens.
    mass : ndarray of shape (N,) or (B, N), optional
        For "average" and "ward", as in `linkage`.
    anchors : ndarray of int of shape (K,) or (B, K), optional
        For "nearest": distinct positions, padded with -1 where K differs between
        sequences; every protected token is among them. By default the protected tokens
        and those of largest norm among the others.
    protect : ndarray of shape (N,) or (B, N), optional
        Boolean, True = stays alone (class tokens, attention sinks); K counts these
        groups too. The others are grouped as if the protected ones were cut out, but
        "contiguous" merges no neighbours across one.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens get label -1, protected or not. What is
        left is grouped as if the padding were cut out: its neighbours are neighbours.
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
        If a shape does not fit, an entry is not finite, K exceeds the tokens or is too
        small for the protected ones, a method or order does not exist, `mass` is for
        another method, or `anchors` are not distinct tokens.

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
    >>> protect = np.array([True, False, False, False])
    >>> cluster_tokens(tokens, 3, protect=protect)
    array([0, 2, 1, 2], dtype=int32)
    """
    leave, tokens, num_groups, mass, anchors, protect, mask = enter(
        tokens=tokens, num_groups=num_groups, mass=mass, anchors=anchors,
        protect=protect, mask=mask,
    )  # fmt: skip
    check_tokens(tokens)
    check_choice("method", method, METHODS)
    check_choice("order", order, ORDERS)
    shape = tokens.shape[:-1]
    check_mask(mask, shape)
    check_mass_method(mass, method)
    check_mass(mass, shape)
    counts = check_num_groups(num_groups, shape[:-1], _num_valid(shape, mask))
    check_protect(protect, method, counts, shape, mask)
    most = largest(num_groups, counts)
    if anchors is not None:
        check_anchors(anchors, method, counts, most, shape, mask, protect)
    given = tokens, mass, anchors, protect, mask
    return leave(_cluster_tokens(*given, counts, method, order))


def _cluster_tokens(
    tokens: Any,
    mass: Any,
    anchors: Any,
    protect: Any,
    mask: Any,
    counts: NDArray[np.int64],
    method: str,
    order: str,
) -> Any:
    on_cuda = _cuda.is_cuda(tokens)
    cluster = _cluster_tokens_cuda if on_cuda else _cluster_tokens_reference
    return cluster(tokens, mass, anchors, protect, mask, counts, method, order)


def _cluster_tokens_reference(
    tokens: NDArray[Any],
    mass: NDArray[Any] | None,
    anchors: NDArray[Any] | None,
    protect: NDArray[np.bool_] | None,
    mask: NDArray[np.bool_] | None,
    counts: NDArray[np.int64],
    method: str,
    order: str,
) -> NDArray[np.int32]:
    if method == "nearest" and anchors is None:
        anchors = _longest_tokens(tokens, protect, mask, counts)
    labels = np.full(tokens.shape[:-1], -1, np.int32)
    for index in np.ndindex(tokens.shape[:-2]):
        keep = np.ones(tokens.shape[-2], np.bool_) if mask is None else mask[index]
        alone = np.zeros_like(keep) if protect is None else keep & protect[index]
        free, num_groups = keep & ~alone, int(counts[index])
        weight = None if mass is None else mass[index][free]
        chosen = None
        if anchors is not None:
            chosen = anchors[index][:num_groups]
            place = np.cumsum(free) - 1  # of each token once the rest is cut out
            chosen = place[chosen[free[chosen]]]
        runs = np.cumsum(alone, dtype=np.intp)[free]
        num_groups -= int(np.count_nonzero(alone))
        found = _groups(tokens[index][free], num_groups, method, weight, chosen, runs)
        groups = np.arange(len(keep))
        groups[free] = len(keep) + found
        labels[index][keep] = in_order(groups[keep], order)
    return labels


def _longest_tokens(
    tokens: NDArray[Any],
    protect: NDArray[np.bool_] | None,
    mask: NDArray[np.bool_] | None,
    counts: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Return the positions (B, K) of K tokens: the protected, then by their norms."""
    norms = _relative_norms(tokens, mask)
    if protect is not None:
        norms[protect] = np.inf
    return _select_tokens_reference(norms, counts, counts.max(initial=0), mask)


def _groups(
    tokens: NDArray[Any],
    num_groups: int,
    method: str,
    mass: NDArray[Any] | None,
    anchors: NDArray[Any] | None,
    runs: NDArray[np.intp],
) -> NDArray[np.intp]:
    """Group the tokens (N, D) of one sequence, without padding and protected ones."""
    if num_groups == len(tokens):
        return np.arange(len(tokens))
    if method in LINKAGES:
        tree = linkage_sequence(tokens, method, mass)
        return cut_sequence(tree, len(tokens) - num_groups)
    unit = _unit_tokens(tokens.astype(np.float64))
    if anchors is not None:
        return nearest_groups(unit, anchors)
    if method == "bipartite":
        return bipartite_groups(unit, num_groups)
    return contiguous_groups(unit, num_groups, runs)


def _cluster_tokens_cuda(
    tokens: Any,
    mass: Any,
    anchors: Any,
    protect: Any,
    mask: Any,
    counts: NDArray[np.int64],
    method: str,
    order: str,
) -> Any:
    given, most = _cuda.counts(counts)
    if method in LINKAGES:
        tree = dendrograms_cuda(tokens, method, mass, mask, protect, counts)
        return cut_linkage_cuda(tree, given, most, mask=mask, order=order)
    if method == "nearest":
        if anchors is None:
            anchors = top_norm_anchors_cuda(tokens, given, most, mask, protect)
        roots = nearest_groups_cuda(tokens, anchors, given, mask, protect)
    elif method == "bipartite":
        fewest = int(counts.min(initial=most))
        roots = bipartite_groups_cuda(tokens, given, most, mask, protect, fewest=fewest)
    else:
        roots = contiguous_groups_cuda(tokens, given, most, mask, protect)
    return number_groups_cuda(roots, order)
