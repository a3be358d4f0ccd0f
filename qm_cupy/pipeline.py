from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import (
    check_choice,
    check_given,
    check_mask,
    check_mass,
    check_num_groups,
    check_out,
    check_tokens,
    largest,
)
from .arrays.conversion import Array, enter, on_callers_stream
from .arrays.dtypes import accumulation_dtype
from .arrays.libraries import is_cuda
from .arrays.shapes import expand_mask, lift_source, num_valid
from .cuda.launch import contiguous
from .cuda.workspace import Workspace, memory_of
from .results import Merged
from .settings import implementation
from .stages.budget import token_budget
from .stages.clustering.checks import check_protect, check_weighted_linkage
from .stages.clustering.cluster_tokens import METHODS, compute_cluster_tokens
from .stages.clustering.labels import ORDERS
from .stages.merging.groups import compute_group_positions, compute_group_sizes
from .stages.merging.merge_tokens import compute_merge_tokens
from .stages.saliency.attention_entropy import attention_entropy
from .stages.saliency.query_key_entropy import query_key_entropy
from .stages.saliency.saliency import compute_saliency
from .stages.saliency.self_attention_entropy import (
    compute_self_attention_entropy,
    self_attention_entropy,
)
from .stages.selection.gumbel_noise import check_noise
from .stages.selection.gumbel_softmax import (
    check_temperature,
    compute_gumbel_softmax,
    softmax_mass_cuda,
)
from .stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda
from .stages.selection.saliency_mass import check_epsilon, compute_saliency_mass
from .stages.selection.select_tokens import compute_select_tokens


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
    check_one_source(saliency, *source)
    _check_weights(weights, tokens.shape[:-1])
    check_weighted_linkage(weighted_linkage, method)
    temperature, epsilon = check_temperature(temperature), check_epsilon(epsilon)
    noise = check_noise(seed, sequence_offset)
    with memory_of(workspace, tokens):
        if is_cuda(tokens):  # copied here, or else by every stage
            tokens = contiguous(tokens)
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
        labels = compute_cluster_tokens(*given, counts, method, order)
        place = None if target is None else target.tokens
        merged = compute_merge_tokens(tokens, labels, most, mass, place)
        sizes, positions = (
            compute_group_sizes(labels, most),
            compute_group_positions(labels, most),
        )
        found = Merged(merged, labels, sizes, positions, scores, mass)
        if target is not None and out is not None:
            for x, place in zip(found, target, strict=True):
                if x is not place:  # a kernel has written it already
                    place[...] = x
            return out
    if workspace is not None and is_cuda(tokens):
        found = Merged(*(x.copy() for x in found))  # into memory of their own
    return Merged(*map(leave, found))


def _places(out: Any) -> dict[str, Any]:
    """Return the arrays to write to, if any, by name."""
    if out is None:
        return {}
    if not isinstance(out, Merged):
        raise TypeError(f"`out` must be a Merged, got {type(out).__name__}")
    return named_fields("out", out)


def named_fields(name: str, merged: Merged[Any]) -> dict[str, Any]:
    """Return the arrays by the names that errors give them."""
    return {f"{name}.{field}": x for field, x in merged._asdict().items()}


def _num_groups(
    shape: tuple[int, ...], budget: Any, protect: Any, method: str, mask: Any
) -> tuple[NDArray[np.int64], int]:
    """Return K of every sequence and the largest, for tokens of shape (B, N)."""
    limit = num_valid(shape, mask)
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
    scores = accumulation_dtype((given or [tokens])[0].dtype)
    mass = scores if isinstance(weights, str) else accumulation_dtype(weights.dtype)
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
    fused = is_cuda(tokens) and implementation() == "optimized"
    if given is None:
        entropy = _entropy(tokens, padding, *sources)
        if fused:
            scores, _, mass = saliency_gumbel_mass_cuda(
                entropy, "low", temperature, noise, epsilon, padding
            )
            return scores.reshape(shape), mass.reshape(shape)
        scores = compute_saliency(entropy, "low", padding).reshape(shape)
    else:
        check_mass(given, shape, "saliency")
        scores = _fresh(given, mask)
    if fused:
        _, mass = softmax_mass_cuda(scores, temperature, noise, epsilon, mask)
        return scores, mass
    probabilities = compute_gumbel_softmax(scores, temperature, noise, None, mask)
    return scores, _fresh(compute_saliency_mass(scores, probabilities, epsilon), mask)


def check_one_source(
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
        return attention_entropy(lift_source("attention", attention, tokens), mask=mask)
    if query is not None and key is not None:
        lifted = lift_source("query", query, tokens), lift_source("key", key, tokens)
        return query_key_entropy(*lifted, mask=mask)
    if hidden_states is not None:
        layers = lift_source("hidden_states", hidden_states, tokens)
        return self_attention_entropy(layers, mask=mask)
    x = tokens.reshape(-1, *tokens.shape[-2:])
    return compute_self_attention_entropy(x, expand_mask(mask, x.shape[:-1]))


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
    chosen = compute_gumbel_softmax(scores, 1.0, noise, counts, mask)
    return compute_select_tokens(chosen, counts, most, mask)


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
