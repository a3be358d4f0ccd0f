"""The pipeline: tokens in, fewer tokens out."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_choice,
    check_given,
    check_mask,
    check_mass,
    check_num_groups,
    check_number,
    check_out,
    check_protect,
    check_source,
    check_tokens,
    check_weighted_linkage,
    largest,
)
from .budget import token_budget
from .clustering import METHODS, ORDERS, _cluster_tokens
from .fidelity import reconstruction_error
from .merging import _group_positions, _group_sizes, _merge_tokens
from .priors.protocols import Prior
from .results import Choice, Merged
from .saliency import (
    _expand_mask,
    _saliency,
    _self_attention_entropy,
    attention_entropy,
    query_key_entropy,
    self_attention_entropy,
)
from .selection import (
    _check_epsilon,
    _check_noise,
    _check_temperature,
    _gumbel_softmax,
    _num_valid,
    _saliency_gumbel_mass_cuda,
    _saliency_mass,
    _select_tokens,
    _softmax_mass_cuda,
)
from .stages.alignment.alignment_loss import alignment_loss
from .workspace import Workspace

_LAYOUTS = {
    "hidden_states": ("BND", "LBND"),
    "attention": ("BNN", "LBNN", "LBHNN"),
    "query": ("BNd", "LBNd", "LBHNd"),
    "key": ("BNd", "LBNd", "LBHNd"),
}


@on_callers_stream
def quickmerge(
    tokens: Array,
    budget: Any,
    *,
    hidden_states: Array | None = None,
    attention: Array | None = None,
    query: Array | None = None,
    key: Array | None = None,
    saliency: Array | None = None,
    mask: Array | None = None,
    protect: Array | None = None,
    method: str = "average",
    order: str = "last",
    temperature: float = 0.1,
    epsilon: float = 0.01,
    weights: Any = "mass",
    weighted_linkage: bool = False,
    seed: int | None = 0,
    sequence_offset: int = 0,
    out: Merged[Array] | None = None,
    workspace: Workspace | None = None,
) -> Merged[Array]:
    """Merge token sequences into fewer tokens that a model can read in their place.

    Saliency from attention entropy, Gumbel-softmax selection, saliency mass, groups
    by cosine similarity, and the weighted mean of each group, in causal order.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    budget : int, float or ndarray of int of shape (B,)
        Groups to keep: K, a share of the tokens within (0, 1], or K of each sequence
        (from `norm_budget`, say). K may differ between sequences; results are then
        padded to the largest.
    hidden_states : ndarray of shape (B, N, D) or (L, B, N, D), optional
        Where the saliency comes from: self-attention entropy of these, layer by layer.
        By default of `tokens` themselves. Without B for one sequence, here and below.
    attention : ndarray of shape (B, N, N), (L, B, N, N) or (L, B, H, N, N), optional
        Or: the entropy of attention a model has computed.
    query, key : ndarray of shape (B, N, d), (L, B, N, d) or (L, B, H, N, d), optional
        Or: the entropy of the attention of these queries to these keys.
    saliency : ndarray of shape (B, N), optional
        Or: the saliency itself, from `norm_saliency`, say.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.
    protect : ndarray of shape (N,) or (B, N), optional
        Boolean, True = stays alone, as in `cluster_tokens`; the budget counts it.
    method, order : str
        As in `cluster_tokens`. For "nearest" the anchors are the protected tokens and,
        up to K, those whose saliency plus Gumbel noise is greatest.
    temperature : float, default 0.1
        As in `gumbel_softmax`.
    epsilon : float, default 0.01
        As in `saliency_mass`.
    weights : {"mass", "saliency", "uniform"} or ndarray of shape (B, N), default "mass"
        Weights of the merge.
    weighted_linkage : bool, default False
        Whether they are the tokens' masses in the clustering as well, as `mass` in
        `linkage`; for "average" and "ward".
    seed : int or None, default 0
        As in `gumbel_softmax`.
    sequence_offset : int, default 0
        As in `gumbel_noise`.
    out : Merged, optional
        Where to write the results: those of a call with the same shapes, dtypes and
        budget. JAX arrays cannot be written.
    workspace : Workspace, optional
        Memory for all that is held meanwhile. With it, `out` and an integer `budget`,
        calls on a GPU allocate nothing from the second on, and CUDA graphs can hold
        them: see `Workspace`.

    Returns
    -------
    Merged
        Named tuple of ``tokens``, ``labels``, ``sizes``, ``positions``, ``saliency``
        and ``mass``.

    Raises
    ------
    TypeError
        If a dtype does not fit or the arrays come from several libraries.
    ValueError
        If a shape does not fit, an entry is not finite, the budget is out of range or
        too small for the protected tokens, or more than one source of saliency is
        given.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((2, 100, 16))
    >>> merged = quickmerge(tokens, 0.2)
    >>> merged.tokens.shape, int(merged.sizes.sum())
    ((2, 20, 16), 200)
    """
    places = _places(out)
    leave, tokens, budget, mask, protect, weights, saliency, *rest = enter(
        tokens=tokens, budget=budget, mask=mask, protect=protect, weights=weights,
        saliency=saliency, hidden_states=hidden_states, attention=attention,
        query=query, key=key, **places,
    )  # fmt: skip
    source, target = rest[:4], Merged(*rest[4:]) if places else None
    check_tokens(tokens)
    check_mask(mask, tokens.shape[:-1])
    check_choice("method", method, METHODS)
    check_choice("order", order, ORDERS)
    _check_one_source(saliency, *source)
    _check_weights(weights, tokens.shape[:-1])
    check_weighted_linkage(weighted_linkage, method)
    temperature, epsilon = _check_temperature(temperature), _check_epsilon(epsilon)
    noise = _check_noise(seed, sequence_offset)
    with _cuda.memory_of(workspace, tokens):
        if _cuda.is_cuda(tokens):  # copied here, or else by every stage
            tokens = _cuda.contiguous(tokens)
        counts, most = _num_groups(tokens.shape[:-1], budget, protect, method, mask)
        if target is not None:
            _check_target(target, tokens, most, weights, saliency, *source)
        scores, mass = _saliency_and_mass(
            tokens, mask, saliency, source, temperature, noise, epsilon
        )
        mass = _weights(weights, scores, mass, mask)
        anchors = None
        if method == "nearest":
            anchors = _anchors(scores, protect, counts, most, noise, mask)
        given = tokens, mass if weighted_linkage else None, anchors, protect, mask
        labels = _cluster_tokens(*given, counts, method, order)
        place = None if target is None else target.tokens
        merged = _merge_tokens(tokens, labels, most, mass, place)
        sizes, positions = _group_sizes(labels, most), _group_positions(labels, most)
        found = Merged(merged, labels, sizes, positions, scores, mass)
        if target is not None and out is not None:
            for x, place in zip(found, target, strict=True):
                if x is not place:  # a kernel has written it already
                    place[...] = x
            return out
    if workspace is not None and _cuda.is_cuda(tokens):
        found = Merged(*(x.copy() for x in found))  # into memory of their own
    return Merged(*map(leave, found))


_OPTIONS = {*inspect.signature(quickmerge).parameters} - {
    "tokens", "mask", "out", "workspace",
}  # fmt: skip


@on_callers_stream
def choose_merge(
    tokens: Array,
    candidates: Sequence[Mapping[str, Any]],
    prior: Prior,
    *,
    alpha: float = 0.1,
    gamma: float = 0.8,
    mask: Array | None = None,
    **options: Any,
) -> Choice[Array]:
    r"""Merge in several ways and keep, for each sequence, the one a prior reads best.

    A candidate's score is the paper's whole loss,

    .. math:: \alpha L_{AR} + \max\bigl(0,
        \lVert X - \hat X \rVert^2 / \lVert X \rVert^2 - (1 - \gamma)^2\bigr).

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    candidates : sequence of mapping
        What each is to do: arguments of `quickmerge`, such as ``{"method": "ward"}``,
        ``{"seed": 3}`` or ``{"budget": 0.2}``.
    prior : Prior
        As in `alignment_loss`.
    alpha : float, default 0.1
        Weight α of the alignment loss, ≥ 0.
    gamma : float, default 0.8
        As in `fidelity_loss`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.
    **options
        Arguments of `quickmerge` for all candidates that do not say otherwise.

    Returns
    -------
    Choice
        Named tuple of ``merged``, ``scores`` and ``best``; of equal scores, the first
        candidate's. Where budgets differ, padded groups have size 0.

    Raises
    ------
    TypeError
        If a candidate is no mapping, has arguments that `quickmerge` has not, or as
        `quickmerge`.
    ValueError
        If there is no candidate, one lacks a budget, an option is out of range, or as
        `quickmerge`.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import MLPPrior
    >>> walk = np.random.default_rng(0).standard_normal((2, 40, 4)).cumsum(1)
    >>> ways = [{"method": "average"}, {"method": "ward"}, {"seed": 1}]
    >>> choice = choose_merge(walk, ways, MLPPrior.init(4).fit(walk), budget=8)
    >>> choice.merged.tokens.shape, choice.scores.shape
    ((2, 8, 4), (3, 2))
    """
    alpha = check_number("alpha", alpha, 0, np.inf, "[)")
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    merges, scores = [], []
    for arguments in _arguments(candidates, options):
        found = quickmerge(tokens, mask=mask, **arguments)
        fields = _named("merged", found)
        leave, x, valid, *parts = enter(tokens=tokens, mask=mask, **fields)
        merged = Merged(*parts)
        error = reconstruction_error(x, merged.tokens, labels=merged.labels, mask=valid)
        loss: Any = alignment_loss(merged, prior).total
        scores.append(alpha * loss + np.maximum(error - (1 - gamma) ** 2, 0))
        merges.append(merged)
    table = np.stack(scores)  # (C, B)
    best = table.argmin(axis=0)  # (B,)
    most = max(merged.tokens.shape[-2] for merged in merges)
    chosen = _padded(merges[0], most)
    for number, merged in enumerate(merges[1:], 1):
        taken = best == number
        pairs = zip(_padded(merged, most), chosen, strict=True)
        chosen = Merged(*(_where(taken, x, y) for x, y in pairs))
    best = np.asarray(best, dtype=np.int32, like=table)
    return Choice(Merged(*map(leave, chosen)), leave(table), leave(best))


def _arguments(candidates: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each candidate gives to `quickmerge`, refusing what it cannot."""
    if isinstance(candidates, Mapping | str) or not isinstance(candidates, Sequence):
        raise TypeError(
            "`candidates` must be a sequence of mappings, "
            f"got {type(candidates).__name__}"
        )
    if not candidates:
        raise ValueError("`candidates` must hold at least one")
    found = []
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, Mapping):
            raise TypeError(
                f"`candidates[{number}]` must be a mapping of arguments, "
                f"got {type(candidate).__name__}"
            )
        arguments = {**options, **candidate}
        unknown = sorted(set(arguments) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"`candidates[{number}]` must hold arguments of `quickmerge` "
                f"({', '.join(sorted(_OPTIONS))}), got {', '.join(map(str, unknown))}"
            )
        if "budget" not in arguments:
            raise ValueError(f"`candidates[{number}]` has no `budget`: give one to all")
        found.append(arguments)
    return found


def _padded(merged: Merged[Any], most: int) -> Merged[Any]:
    """Return it with groups of size 0 and position -1 up to K = `most`."""
    gap = most - merged.tokens.shape[-2]
    if gap == 0:
        return merged

    def pad(x: NDArray[Any], axis: int, value: int) -> NDArray[Any]:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, gap)
        return np.pad(_copyable(x), widths, constant_values=value).view(x.dtype)

    return merged._replace(
        tokens=pad(merged.tokens, -2, 0),
        sizes=pad(merged.sizes, -1, 0),
        positions=pad(merged.positions, -1, -1),
    )


def _where(taken: NDArray[np.bool_], x: NDArray[Any], y: NDArray[Any]) -> Any:
    """Return `x` for the sequences (B,) that are taken and `y` for the others."""
    wide = taken.reshape(taken.shape + (1,) * (x.ndim - taken.ndim))
    return np.where(wide, _copyable(x), _copyable(y)).view(x.dtype)


def _copyable(x: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 as int16: CuPy's `where` has no loop for it and widens it."""
    return x.view(np.int16) if x.dtype.name == "bfloat16" else x


def _places(out: Any) -> dict[str, Any]:
    """Return the arrays to write to, if any, by name."""
    if out is None:
        return {}
    if not isinstance(out, Merged):
        raise TypeError(f"`out` must be a Merged, got {type(out).__name__}")
    return _named("out", out)


def _named(name: str, merged: Merged[Any]) -> dict[str, Any]:
    """Return the arrays by the names that errors give them."""
    return {f"{name}.{field}": x for field, x in merged._asdict().items()}


def _num_groups(
    shape: tuple[int, ...], budget: Any, protect: Any, method: str, mask: Any
) -> tuple[NDArray[np.int64], int]:
    """Return K of every sequence and the largest, for tokens of shape (B, N)."""
    limit = _num_valid(shape, mask)
    share = isinstance(budget, float | np.floating)
    num_groups = token_budget(budget, limit) if share else budget
    counts = check_num_groups(num_groups, shape[:-1], limit, name="budget")
    check_protect(protect, method, counts, shape, mask)
    return counts, largest(num_groups, counts)


def _check_target(
    target: Merged[Any],
    tokens: NDArray[Any],
    most: int,
    weights: Any,
    *sources: Any,
) -> None:
    """Refuse places that do not fit the results, or lie in an input."""
    given = [x for x in sources if x is not None]
    inputs = [tokens, *given] + ([] if isinstance(weights, str) else [weights])
    scores = _cuda.accumulation((given or [tokens])[0].dtype)
    mass = scores if isinstance(weights, str) else _cuda.accumulation(weights.dtype)
    *leading, num_tokens, dim = tokens.shape
    each, groups = (*leading, num_tokens), (*leading, most)
    wanted: tuple[tuple[str, tuple[int, ...], Any], ...] = (
        ("BKD", (*groups, dim), tokens.dtype),
        ("BN", each, np.dtype(np.int32)),
        ("BK", groups, np.dtype(np.int32)),
        ("BK", groups, np.dtype(np.int32)),
        ("BN", each, scores),
        ("BN", each, mass),
    )
    for name, x, (axes, shape, dtype) in zip(
        target._fields, target, wanted, strict=True
    ):
        check_out(x, shape, dtype, *inputs, name=f"out.{name}", axes=axes)


def _saliency_and_mass(
    tokens: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    given: NDArray[Any] | None,
    sources: list[NDArray[Any] | None],
    temperature: float,
    noise: tuple[int | None, int],
    epsilon: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return saliency and mass (B, N), 0 for padding, from the one source there is.

    The optimized kernels find all that follows the entropy in one launch.
    """
    shape = tokens.shape[:-1]
    padding = None if mask is None else mask.reshape(-1, shape[-1])  # (B, N)
    fused = _cuda.is_cuda(tokens) and _cuda.implementation() == "optimized"
    if given is None:
        entropy = _entropy(tokens, padding, *sources)
        if fused:
            scores, _, mass = _saliency_gumbel_mass_cuda(
                entropy, "low", temperature, noise, epsilon, padding
            )
            return scores.reshape(shape), mass.reshape(shape)
        scores = _saliency(entropy, "low", padding).reshape(shape)
    else:
        check_mass(given, shape, "saliency")
        scores = _fresh(given, mask)
    if fused:
        _, mass = _softmax_mass_cuda(scores, temperature, noise, epsilon, mask)
        return scores, mass
    probabilities = _gumbel_softmax(scores, temperature, noise, None, mask)
    return scores, _fresh(_saliency_mass(scores, probabilities, epsilon), mask)


def _check_one_source(
    given: Any, hidden_states: Any, attention: Any, query: Any, key: Any
) -> None:
    sources = {
        "saliency": given,
        "hidden_states": hidden_states,
        "attention": attention,
        "query": query,
    }
    named = [name for name, source in sources.items() if source is not None]
    if len(named) > 1:
        raise ValueError(f"give one source of saliency, got {' and '.join(named)}")
    if (query is None) != (key is None):
        raise ValueError("`query` and `key` go together")


def _check_weights(weights: Any, shape: tuple[int, ...]) -> None:
    if isinstance(weights, str):
        check_choice("weights", weights, ("mass", "saliency", "uniform"))
    else:
        check_given("weights", weights)
        check_mass(weights, shape, "weights")


def _entropy(
    tokens: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    hidden_states: NDArray[Any] | None,
    attention: NDArray[Any] | None,
    query: NDArray[Any] | None,
    key: NDArray[Any] | None,
) -> NDArray[Any]:
    """Return entropy (B, N), (L, B, N) or (L, B, H, N), by default of the tokens."""
    if attention is not None:
        return attention_entropy(_lift("attention", attention, tokens), mask=mask)
    if query is not None and key is not None:
        lifted = _lift("query", query, tokens), _lift("key", key, tokens)
        return query_key_entropy(*lifted, mask=mask)
    if hidden_states is not None:
        layers = _lift("hidden_states", hidden_states, tokens)
        return self_attention_entropy(layers, mask=mask)
    x = tokens.reshape(-1, *tokens.shape[-2:])
    return _self_attention_entropy(x, _expand_mask(mask, x.shape[:-1]))


def _anchors(
    scores: NDArray[Any],
    protect: NDArray[np.bool_] | None,
    counts: NDArray[np.int64],
    most: int,
    noise: tuple[int | None, int],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.int32]:
    """Return the protected and the K - P others of greatest saliency plus noise."""
    if protect is not None:
        above = scores.dtype.type(np.finfo(scores.dtype).max / 2)  # whatever the noise
        scores = np.where(protect, above, scores)  # CuPy waits to assign by a mask
    chosen = _gumbel_softmax(scores, 1.0, noise, counts, mask)
    return _select_tokens(chosen, counts, most, mask)


def _lift(name: str, source: NDArray[Any], tokens: NDArray[Any]) -> NDArray[Any]:
    """Put in the batch axis that one sequence leaves out, after that of layers."""
    single = tokens.ndim == 2
    lifted = source
    if single and source.ndim > 1:
        lifted = source[None] if source.ndim == 2 else source[:, None]
    check_source(name, source, lifted, tokens.shape, _LAYOUTS[name])
    return lifted


def _weights(
    weights: Any, scores: NDArray[Any], mass: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[Any]:
    if not isinstance(weights, str):
        return _fresh(weights, mask)
    if weights == "mass":
        return mass
    return _fresh(scores if weights == "saliency" else np.ones_like(scores), mask)


def _fresh(x: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Return a copy, in float32 at least, that is 0 for padding."""
    x = x.astype(np.result_type(x.dtype, np.float32), order="C")
    return x if mask is None else x * mask
