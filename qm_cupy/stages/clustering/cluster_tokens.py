"""Clustering: put tokens into K groups by their similarity.

Instead of K, a limit of the error or of the distance of merges can decide the number of
groups.

By default the groups are in causal order: they are numbered by their last members.

A root is the number of a token's group before the groups are numbered 0..K-1: any
number that all tokens of the group have, and no other token has.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_choice, check_mass, check_tokens
from ...arrays.conversion import Array, BoolArray, FloatArray, IntArray, convert_inputs
from ...arrays.counts import GroupCounts, check_group_counts
from ...arrays.libraries import is_cuda
from ...arrays.protect import protected_tokens, split_positions
from ...arrays.shapes import num_valid
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.launch import counts_on_device
from ...progress import span
from ..saliency.token_norms import relative_norms
from ..selection.select_tokens import select_tokens_reference
from .bipartite import bipartite_groups_cuda, bipartite_groups_reference
from .checks import (
    Limits,
    check_anchors,
    check_limits,
    check_mass_method,
    check_protect,
    check_step,
)
from .clustering_memory import check_cluster_tokens_memory
from .contiguous import contiguous_groups_cuda, contiguous_groups_reference
from .cut_linkage import cut_linkage_cuda, cut_sequence, merges_within
from .labels import ORDERS, Order, in_order, number_groups_cuda
from .linkage import LINKAGES, LinkageMethod, linkage_sequence, relative_mass
from .linkage_cuda import dendrograms_cuda
from .metrics import METRICS, Metric, metric_vectors
from .nearest import (
    nearest_groups_cuda,
    nearest_groups_reference,
    top_norm_anchors_cuda,
)

Method = Literal[LinkageMethod, "nearest", "bipartite", "contiguous"]
METHODS: tuple[Method, ...] = get_args(Method)


@operation(
    constants=("tokens", "mass?", "anchors?", "protect?", "mask?"),
    count_parameter="num_groups?",
    options=(
        "float? max_error",
        "float? max_distance",
        "str method",
        "str metric",
        "int? step",
        "str order",
    ),
    dtype="int32",
    shapes=without_last_axis,
    lists=("protect",),
)
def cluster_tokens(
    tokens: Array,
    num_groups: Any = None,
    *,
    max_error: float | None = None,
    max_distance: float | None = None,
    method: Method = "average",
    metric: Metric = "cosine",
    mass: FloatArray | None = None,
    anchors: IntArray | None = None,
    step: int | None = None,
    protect: BoolArray | Sequence[int] | None = None,
    mask: BoolArray | None = None,
    order: Order = "last",
) -> IntArray:
    """Put the tokens of each sequence into K groups by their similarity.

    Give K (`num_groups`), or one of two limits that decide K for each sequence. With a
    limit, K is ``labels.max(-1) + 1``.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,), optional
        K, or K of each sequence.
    max_error : float, optional
        For "ward": return the fewest groups of the dendrogram whose error is at most
        this, at least 0. The error is the sum of the squared distances of unit tokens
        (of tokens for "euclidean") to the mean of their group, divided by the number of
        tokens. With `mass`, the means and both sums are weighted by mass. Protected
        tokens count in the divisor and add no error.
    max_distance : float, optional
        Merge as long as the distance of the merged groups is at most this, at least 0.
        For the methods of `linkage`, this distance is the height of the merge; for
        "contiguous", it is the distance of "ward". Not for "nearest" and "bipartite".
    method : str, default "average"
        "average", "ward", "complete" or "single": the dendrogram of `linkage`, cut.
        "nearest": each token joins the most similar of K anchors.
        "bipartite": the soft matching of ToMe [1]_, repeated until K groups are left.
        In each step, groups are sorted by their last members, and groups at even
        positions of this order merge into groups at odd positions. The first step is
        that of ToMe. Later steps compare the means of unit tokens; ToMe compares the
        means of the tokens.
        "contiguous": only neighbours merge; each step merges the pair that adds least
        to the squared error of unit tokens, or of the tokens for "euclidean".
    metric : {"cosine", "euclidean"}, default "cosine"
        Whether similar tokens have a similar direction, or a small distance ‖x - y‖.
        Cosines ignore the lengths of tokens. See `linkage`.
    mass : ndarray of shape (N,) or (B, N), optional
        For "average" and "ward": a token of mass w counts as w equal tokens, as in
        `linkage`.
    anchors : ndarray of int of shape (K,) or (B, K), optional
        For "nearest": distinct positions, which include every protected token. If K
        differs between sequences, they are padded with -1. The default anchors are the
        protected tokens, and the other tokens that have the largest norms.
    step : int, optional
        For "bipartite": the largest number of groups that merge in one step. By default
        a step merges as many as K allows, at most half of the groups. ToMe merges a few
        tokens in each layer, so small steps, such as 16, are nearer to its use.
    protect : ndarray of shape (N,) or (B, N), or sequence of int, optional
        Tokens that stay groups of their own, for example class tokens and attention
        sinks: boolean, True = protected, or positions such as ``[0, -1]``, the first
        and the last token of every sequence. Positions count tokens without padding. K
        counts these groups too. The other tokens are grouped as if the sequence had no
        protected tokens, but "contiguous" never merges neighbours across a protected
        token.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens get label -1, protected or
        not, and are not read. The tokens are grouped as if the sequence had no padding:
        tokens on both sides of padding are neighbours.
    order : {"last", "first"}, default "last"
        Number groups by the position of their last or first member. With "last",
        a group has the position of its last member, so it contains no later token.
        Causal models need this.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        int32 labels within 0..K-1, all of which are used; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If a shape is wrong, an entry is not finite, not exactly one of `num_groups`,
        `max_error` and `max_distance` is given, K exceeds the number of tokens or is
        too small for the protected ones, a limit is negative or NaN, `method`, `metric`
        or `order` is unknown, a limit, `mass`, `anchors` or `step` are given for
        another method, `step` is less than 1, or `anchors` are not distinct tokens.

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
    >>> cluster_tokens(tokens, 3, protect=[0])
    array([0, 2, 1, 2], dtype=int32)
    >>> cluster_tokens(tokens, max_distance=0.1)
    array([0, 1, 0, 1], dtype=int32)
    """
    flags, positions = split_positions(protect)
    convert_back, tokens, mass, anchors, flags, mask, num_groups, positions = (
        convert_inputs(
            {
                "tokens": tokens,
                "mass": mass,
                "anchors": anchors,
                "protect": flags,
                "mask": mask,
            },
            counts={"num_groups": num_groups, "protect": positions},
        )
    )
    mask = check_tokens(tokens, mask=mask)
    flags = protected_tokens(flags, positions, tokens, mask)  # (B, N)
    check_choice("method", method, METHODS)
    check_choice("metric", metric, METRICS)
    check_choice("order", order, ORDERS)
    limits = check_limits(num_groups, max_error, max_distance, method)
    step = check_step(step, method)
    shape = tokens.shape[:-1]
    check_mass_method(mass, method)
    check_mass(mass, shape, mask=mask)
    # K must not exceed the number of valid tokens, and each protected token needs a
    # group of its own.
    groups = None
    if num_groups is not None:
        groups = check_group_counts(num_groups, shape[:-1], num_valid(shape, mask))
    check_protect(flags, method, groups and groups.counts, shape, mask)
    if anchors is not None:
        check_anchors(anchors, method, groups, shape, mask, flags)
    if not is_cuda(tokens):
        check_cluster_tokens_memory(
            tokens.shape,
            tokens.dtype,
            method,
            weighted=mass is not None,
            num_groups=groups and groups.max_groups,
            step=step,
            copied=mask is not None or flags is not None,
            by_norms=method == "nearest" and anchors is None,
        )
    labels = compute_cluster_tokens(
        tokens,
        groups,
        max_error=limits.max_error,
        max_distance=limits.max_distance,
        method=method,
        metric=metric,
        mass=mass,
        anchors=anchors,
        step=step,
        protect=flags,
        mask=mask,
        order=order,
    )
    return convert_back(labels)


def compute_cluster_tokens(
    tokens: Any,
    num_groups: GroupCounts | None,
    *,
    max_error: float | None = None,
    max_distance: float | None = None,
    method: str = "average",
    metric: str = "cosine",
    mass: Any = None,
    anchors: Any = None,
    step: int | None = None,
    protect: Any = None,
    mask: Any = None,
    order: str = "last",
) -> Any:
    """Return labels for arrays that are already converted and checked.

    `num_groups` is None if one of the limits is given.
    """
    way = Way(method, metric, step, Limits(max_error, max_distance))
    counts = None if num_groups is None else num_groups.counts
    args = tokens, counts, way, mass, anchors, protect, mask, order
    if is_cuda(tokens):
        return _cluster_tokens_cuda(*args)
    return _cluster_tokens_reference(*args)


class Way(NamedTuple):
    """How tokens are grouped: options with the names of `cluster_tokens`."""

    method: str
    metric: str
    step: int | None
    limits: Limits


def _cluster_tokens_reference(
    tokens: NDArray[Any],
    counts: NDArray[np.int64] | None,
    way: Way,
    mass: NDArray[Any] | None,
    anchors: NDArray[Any] | None,
    protect: NDArray[np.bool_] | None,
    mask: NDArray[np.bool_] | None,
    order: str,
) -> NDArray[np.int32]:
    # A free token is neither padding nor protected. Group the free tokens alone, then
    # number all groups together. Roots: a protected token i has root i, and group g of
    # the free tokens has root N + g.
    if way.method == "nearest" and anchors is None and counts is not None:
        anchors = _top_norm_anchors_reference(tokens, counts, mask, protect)
    labels = np.full(tokens.shape[:-1], -1, np.int32)
    batch = math.prod(tokens.shape[:-2])
    for number, index in enumerate(np.ndindex(tokens.shape[:-2])):
        valid = np.ones(tokens.shape[-2], np.bool_) if mask is None else mask[index]
        protected = np.zeros_like(valid) if protect is None else valid & protect[index]
        free = valid & ~protected
        free_mass = None if mass is None else mass[index][free]
        num_groups, sequence_way, selected = None, way, None
        if counts is not None:
            num_groups = int(counts[index]) - int(np.count_nonzero(protected))
            if anchors is not None:
                # Protected anchors are groups of their own. The other anchors are
                # needed as indices among the free tokens, because `_groups` gets only
                # free tokens.
                selected = anchors[index][: int(counts[index])]
                free_index = np.cumsum(free) - 1  # (N,), valid only for free tokens
                selected = free_index[selected[free[selected]]]
        elif way.limits.max_error is not None and protected.any() and free.any():
            weight = np.ones(len(valid)) if mass is None else mass[index]
            limits = _limits_of_free_tokens(way.limits, weight[valid], free[valid])
            sequence_way = way._replace(limits=limits)
        # Tokens between the same two protected tokens have the same run number.
        runs = np.cumsum(protected, dtype=np.intp)[free]
        x = tokens[index] if free.all() else tokens[index][free]
        with span(number / batch, (number + 1) / batch):
            free_groups = _groups(
                x, num_groups, sequence_way, free_mass, selected, runs
            )
        roots = np.arange(len(valid))
        roots[free] = len(valid) + free_groups
        labels[index][valid] = in_order(roots[valid], order)
    return labels


def _limits_of_free_tokens(
    limits: Limits, mass: NDArray[Any], free: NDArray[np.bool_]
) -> Limits:
    """Return the limits for the free tokens alone, of tokens with masses (N,).

    Protected tokens have no error, but the error of all tokens is divided by their
    masses too.
    """
    relative, _ = relative_mass(mass, free)
    factor = relative.sum() / relative[free].sum()
    return limits._replace(max_error=limits.max_error * factor)


def _top_norm_anchors_reference(
    tokens: NDArray[Any],
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
    protect: NDArray[np.bool_] | None,
) -> NDArray[np.int32]:
    """Return the default anchors (B, K), ascending.

    The protected tokens are selected first, then the tokens of largest norm.
    """
    norms = relative_norms(tokens, mask)
    # An infinite norm selects the protected tokens first.
    if protect is not None:
        norms[protect] = np.inf
    return select_tokens_reference(norms, counts, counts.max(initial=0), mask)


def _groups(
    tokens: NDArray[Any],
    num_groups: int | None,
    way: Way,
    mass: NDArray[Any] | None,
    anchors: NDArray[Any] | None,
    runs: NDArray[np.intp],
) -> NDArray[np.intp]:
    """Return the group (N,) of each token of a sequence (N, D) of free tokens."""
    num_tokens = len(tokens)
    # K = N: each token is a group, also if N = 0 because all tokens are protected.
    if num_tokens in (num_groups, 0):
        return np.arange(num_tokens)
    method, metric, step, limits = way
    if method in LINKAGES:
        tree = linkage_sequence(tokens, method, metric, mass)
        # Every merge reduces the number of groups by one: K groups need N - K merges.
        if num_groups is None:
            return cut_sequence(tree, merges_within(tree[:, 2], limits, mass))
        return cut_sequence(tree, num_tokens - num_groups)
    vectors, unit = metric_vectors(tokens, metric)  # (N, D)
    with span(0.1, 1):
        if anchors is not None:
            return nearest_groups_reference(vectors, anchors, metric)
        if method == "bipartite" and num_groups is not None:
            return bipartite_groups_reference(vectors, num_groups, metric, step)
        max_distance = limits.max_distance
        return contiguous_groups_reference(
            vectors,
            num_groups or 1,
            metric,
            runs,
            None if max_distance is None else max_distance / unit,
        )


def _cluster_tokens_cuda(
    tokens: Any,
    counts: NDArray[np.int64] | None,
    way: Way,
    mass: Any,
    anchors: Any,
    protect: Any,
    mask: Any,
    order: str,
) -> Any:
    method, metric, step, limits = way
    # Without K, a limit decides, and a single group is the least.
    group_counts, max_groups = (None, 1) if counts is None else counts_on_device(counts)
    # The cut of a dendrogram also numbers its groups, in the same launch if the kernel
    # is the optimized one. The other methods return roots, which `number_groups_cuda`
    # replaces by labels.
    if method in LINKAGES:
        tree = dendrograms_cuda(
            tokens, method, mass, mask, protect, counts, metric=metric
        )
        # Only an error depends on the masses.
        weights = None if limits.max_error is None else mass
        return cut_linkage_cuda(
            tree, group_counts, max_groups, limits, weights, mask, protect, order
        )
    if method == "nearest":
        if anchors is None:
            anchors = top_norm_anchors_cuda(
                tokens, group_counts, max_groups, mask, protect
            )
        roots = nearest_groups_cuda(
            tokens, anchors, group_counts, mask, protect, metric=metric
        )
    elif method == "bipartite":
        # `bipartite_groups_cuda` plans its number of steps on the CPU: the sequence
        # with the smallest K needs the most steps. The counts are also on the CPU, so
        # the smallest K is known without waiting for the GPU.
        fewest = 1 if counts is None else int(counts.min(initial=max_groups))
        roots = bipartite_groups_cuda(
            tokens,
            group_counts,
            max_groups,
            mask,
            protect,
            metric=metric,
            step=step,
            fewest=fewest,
        )
    else:
        roots = contiguous_groups_cuda(
            tokens,
            group_counts,
            max_groups,
            mask,
            protect,
            metric=metric,
            max_distance=limits.max_distance,
        )
    return number_groups_cuda(roots, order)
