"""The stages of the pipeline in their order, for arrays of any library.

Axes: B sequences of N tokens of width D are merged to K groups each. The source of the
saliency may have L layers with H heads each.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays.dtypes import accumulation_dtype
from .arrays.libraries import is_cuda
from .arrays.shapes import masked_copy
from .autodiff.dispatch import modules_of
from .group_counts import counted_groups
from .results import Merged
from .settings import implementation
from .sources import Sources, lift_sources
from .stages.clustering.checks import WEIGHTED_METHODS, Limits
from .stages.clustering.cluster_tokens import (
    Method,
    cluster_tokens,
    compute_cluster_tokens,
)
from .stages.merging.groups import (
    compute_group_positions,
    compute_group_sizes,
    group_positions,
    group_sizes,
)
from .stages.merging.merge_tokens import compute_merge_tokens, merge_tokens
from .stages.saliency.attention_entropy import (
    attention_entropy,
    compute_attention_entropy,
)
from .stages.saliency.attention_mass import attention_mass, compute_attention_mass
from .stages.saliency.attention_received import (
    attention_received,
    compute_attention_received,
)
from .stages.saliency.layers import stack_layers
from .stages.saliency.query_key_entropy import (
    compute_query_key_entropy,
    query_key_entropy,
)
from .stages.saliency.saliency import compute_saliency
from .stages.saliency.saliency import saliency as saliency_of_entropy
from .stages.saliency.self_attention_entropy import (
    compute_self_attention_entropy,
    self_attention_entropy,
)
from .stages.selection.gumbel_softmax import (
    compute_gumbel_softmax,
    gumbel_softmax,
    softmax_mass_cuda,
)
from .stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda
from .stages.selection.saliency_mass import (
    compute_saliency_mass,
    saliency_mass,
)
from .stages.selection.select_tokens import compute_select_tokens, select_tokens

Weights = Literal["uniform", "saliency", "attention", "mass"]


class Options(NamedTuple):
    """Options of selection, clustering and merging, with the names of `quickmerge`."""

    causal: bool
    scale: float | None
    limits: Limits
    method: str
    metric: str
    step: int | None
    order: str
    temperature: float
    epsilon: float
    weights: Any
    weighted_linkage: bool
    noise_seed: int | None
    sequence_offset: int

    def named_weights(self) -> str | None:
        """Return the word that names the weights, or None for the caller's array."""
        return self.weights if isinstance(self.weights, str) else None

    def need_saliency(self) -> bool:
        """Return whether the weights or the anchors are computed from the saliency."""
        return self.named_weights() in ("saliency", "mass") or self.method == "nearest"


def with_defaults(
    sources: Sources,
    method: Method | None,
    weights: Any,
    weighted_linkage: bool | None,
    max_error: Any = None,
) -> tuple[Method, Any, bool]:
    """Return the three options, where None becomes the default for the source.

    With `max_error`, the default method is the only one that supports it.

    Raise if the weights need attention and the source has none.
    """
    has_attention = sources.attention is not None or sources.query is not None
    has_scores = sources.hidden_states is not None or sources.saliency is not None
    if weights is None and has_attention:
        weights = "attention"
    elif weights is None:
        weights = "saliency" if has_scores else "uniform"
    by_attention = isinstance(weights, str) and weights == "attention"
    if by_attention and not has_attention:
        raise ValueError(
            '`weights="attention"` needs the attention of a model: pass `attention`, '
            "or `query` and `key`"
        )
    if method is None:
        by_error = max_error is not None
        method = "ward" if by_attention or by_error else "average"
    if weighted_linkage is None:
        weighted_linkage = by_attention and method in WEIGHTED_METHODS
    return method, weights, weighted_linkage


class Stages(NamedTuple):
    """The functions that `compose` calls, for NumPy and CuPy or for one framework.

    For arrays that torch or JAX traces, these are the public functions, because they
    record gradients. For NumPy and CuPy arrays, they are the functions ``compute_…``,
    because `quickmerge` has already converted the arrays and checked the tokens.
    """

    xp: Any  # the namespace with `where` and `finfo`: numpy, torch or jax.numpy
    # (name, array) -> array, or raises; a name that ends in "?" also allows None
    check_array: Callable[..., Any]
    full_mask: Callable[..., Any]  # (mask, tokens) -> (B, N), or None
    protected_tokens: Callable[..., Any]  # (protect, tokens, mask) -> (B, N), or None
    # Arrays -> NumPy arrays, or None if a value is not known yet, or is on a GPU
    host_values: Callable[..., list[Any] | None]
    masked_copy: Callable[..., Any]  # (array, mask) -> copy that is 0 for padding
    unit_weights: Callable[..., Any]  # (tokens, mask) -> ones (B, N), 0 for padding
    attention_entropy: Callable[..., Any]
    query_key_entropy: Callable[..., Any]
    self_attention_entropy: Callable[..., Any]
    attention_received: Callable[..., Any]
    attention_mass: Callable[..., Any]
    saliency: Callable[..., Any]
    gumbel_softmax: Callable[..., Any]
    saliency_mass: Callable[..., Any]
    select_tokens: Callable[..., Any]
    cluster_tokens: Callable[..., Any]
    counted_groups: Callable[..., Any]  # labels (B, N) -> K of every sequence
    merge_tokens: Callable[..., Any]
    group_sizes: Callable[..., Any]
    group_positions: Callable[..., Any]


def compose(
    stages: Stages,
    tokens: Any,
    num_groups: Any,
    sources: Sources,
    mask: Any,
    protect: Any,
    options: Options,
    out: Any = None,
) -> Merged[Any]:
    """Run the stages that the options need, then clustering and merging.

    `num_groups` is None if a limit decides how many groups there are.
    """
    sources = lift_sources(sources, tokens)  # each with the axis B
    scores, weights = _scores_and_weights(stages, tokens, sources, mask, options)
    anchors = None
    if options.method == "nearest":  # the only method that needs anchors
        anchors = _anchors(stages, scores, num_groups, protect, mask, options)  # (B, K)
    labels = stages.cluster_tokens(  # (B, N)
        tokens,
        num_groups,
        max_error=options.limits.max_error,
        max_distance=options.limits.max_distance,
        method=options.method,
        metric=options.metric,
        mass=_masses(stages, weights, mask, options),
        anchors=anchors,
        step=options.step,
        protect=protect,
        mask=mask,
        order=options.order,
    )
    if num_groups is None:
        num_groups = stages.counted_groups(labels)
    # x̃_k = Σ w_j x_j / Σ w_j over the tokens j of group k; shape (B, K, D). Without
    # weights, `merge_tokens` gives the same bits and reads less.
    mass = None if options.named_weights() == "uniform" else weights
    merged = stages.merge_tokens(tokens, labels, num_groups, mass=mass, out=out)
    sizes = stages.group_sizes(labels, num_groups)  # (B, K)
    positions = stages.group_positions(labels, num_groups)  # (B, K)
    return Merged(merged, labels, sizes, positions, weights)


def _masses(stages: Stages, weights: Any, mask: Any, options: Options) -> Any:
    """Return the masses (B, N) of the linkage, or None.

    Ward's distances grow with the root of the masses. Only the ratios of the weights
    matter elsewhere, so for `max_distance` their mean over the tokens becomes 1.
    """
    if not options.weighted_linkage:
        return None
    if options.limits.max_distance is None or options.method != "ward":
        return weights
    count = weights.shape[-1] if mask is None else (mask != 0).sum(-1)[..., None]
    mean = weights.sum(-1)[..., None] / count  # (B, 1); the weights of padding are 0
    return weights / stages.xp.where(mean > 0, mean, mean + 1)


def _scores_and_weights(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> tuple[Any, Any]:
    """Return the saliency, or None if nothing needs it, and the weights of the merge.

    Both have the shape (B, N) and are 0 for padding.
    """
    word = options.named_weights()
    if word == "mass":
        return _saliency_and_mass(stages, tokens, sources, mask, options)
    scores = None
    if options.need_saliency():
        scores = _saliency(stages, tokens, sources, mask, options)
    if word == "saliency":
        return scores, scores
    if word == "attention":
        return scores, _attention_mass(stages, tokens, sources, mask, options)
    if word == "uniform":
        return scores, stages.unit_weights(tokens, mask)
    return scores, stages.masked_copy(options.weights, mask)


def _saliency(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> Any:
    """Return the saliency (B, N) of the source; low entropy is salient."""
    if sources.saliency is not None:
        return stages.masked_copy(sources.saliency, mask)
    mask_2d = _with_batch(mask)
    entropy = _entropy(stages, tokens, sources, mask_2d, options)
    return stages.saliency(entropy, mask=mask_2d).reshape(tuple(tokens.shape[:-1]))


def _attention_mass(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> Any:
    """Return the attention mass (B, N): attention received, and its entropy."""
    mask_2d = _with_batch(mask)
    masked = {"causal": options.causal, "mask": mask_2d}
    received_of = functools.partial(stages.attention_received, **masked)
    if sources.attention is not None:
        received = _each_layer(stages, received_of, sources.attention)
    else:
        received = _each_layer(
            stages,
            lambda q, k: received_of(query=q, key=k, scale=options.scale),
            sources.query,
            sources.key,
        )
    entropy = _entropy(stages, tokens, sources, mask_2d, options)  # of the same shape
    mass = stages.attention_mass(received, entropy, **masked)
    return mass.reshape(tuple(tokens.shape[:-1]))


def _saliency_and_mass(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> tuple[Any, Any]:
    """Return the saliency and the saliency mass (B, N), 0 for padding.

    With optimized kernels and CuPy arrays, one function computes all steps after the
    entropy, in one launch if the sizes allow it.
    """
    shape = tuple(tokens.shape[:-1])  # (N,) or (B, N)
    noise = options.noise_seed, options.sequence_offset
    # `stages.xp is np` means that the arrays are not traced (`xp` is NumPy for CuPy
    # arrays too, because NumPy's functions accept them). Traced arrays need separate
    # steps, because the fused kernels have no gradient.
    fused = stages.xp is np and is_cuda(tokens) and implementation() == "optimized"
    if fused and sources.saliency is None:
        # Saliency (with "low", low entropy is salient), Gumbel-softmax and mass: one
        # launch if the sizes allow it, otherwise three.
        mask_2d = _with_batch(mask)
        entropy = _entropy(stages, tokens, sources, mask_2d, options)
        scores, _, mass = saliency_gumbel_mass_cuda(
            entropy, "low", options.temperature, noise, options.epsilon, mask_2d
        )
        return scores.reshape(shape), mass.reshape(shape)
    scores = _saliency(stages, tokens, sources, mask, options)
    if fused:  # the caller passed the saliency: one launch for softmax and mass
        _, mass = softmax_mass_cuda(
            scores, options.temperature, noise, options.epsilon, mask
        )
        return scores, mass
    # π = softmax((s + g) / τ), then m = π · s + (1 - π) · ε
    probabilities = stages.gumbel_softmax(
        scores, temperature=options.temperature, **_noise(mask, options)
    )
    mass = stages.saliency_mass(scores, probabilities, epsilon=options.epsilon)
    return scores, stages.masked_copy(mass, mask)


def _with_batch(mask: Any) -> Any:
    """Return a mask (N,) or (B, N) as (B, N)."""
    return None if mask is None else mask.reshape(-1, mask.shape[-1])


def _noise(mask: Any, options: Options) -> dict[str, Any]:
    """Return the arguments of `gumbel_softmax` that determine the noise."""
    return {
        "seed": options.noise_seed,
        "mask": mask,
        "sequence_offset": options.sequence_offset,
    }


def _each_layer(stages: Stages, function: Callable[..., Any], *arrays: Any) -> Any:
    """Return the result of a function of arrays or, stacked, of each layer of tuples.

    The result is (B, N), (B, H, N) or (L, B, H, N).
    """
    if not isinstance(arrays[0], tuple):
        return function(*arrays)
    layers = [function(*layer) for layer in zip(*arrays, strict=True)]
    return stack_layers(layers, stages.xp.stack, stages.masked_copy)


def _entropy(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> Any:
    """Return the entropy of the source: (B, N), (B, H, N) or (L, B, H, N)."""
    masked = {"mask": mask}
    if sources.attention is not None:
        entropy_of = functools.partial(stages.attention_entropy, **masked)
        return _each_layer(stages, entropy_of, sources.attention)
    if sources.query is not None:
        scores = {"causal": options.causal, "scale": options.scale, **masked}
        entropy_of = functools.partial(stages.query_key_entropy, **scores)
        return _each_layer(stages, entropy_of, sources.query, sources.key)
    x = sources.hidden_states
    if x is None:
        x = tokens.reshape(-1, *tokens.shape[-2:])  # (B, N, D)
    entropy_of = functools.partial(stages.self_attention_entropy, **masked)
    return _each_layer(stages, entropy_of, x)


def _anchors(
    stages: Stages,
    scores: Any,
    num_groups: Any,
    protect: Any,
    mask: Any,
    options: Options,
) -> Any:
    """Return the positions (B, K) of the anchors.

    They are the P protected tokens and the K - P others with the greatest sum of
    saliency and noise.
    """
    if protect is not None:
        # Greater than every saliency, whatever the noise adds to it. Half of the
        # maximum, so that the sum with the noise does not overflow.
        above = stages.xp.finfo(scores.dtype).max / 2
        scores = stages.xp.where(protect, above, scores)
    # A K-hot mask of the K greatest sums. The temperature does not change their order,
    # so it is not passed.
    selected = stages.gumbel_softmax(scores, hard=num_groups, **_noise(mask, options))
    return stages.select_tokens(selected, num_groups, mask=mask)  # (B, K)


def _unit_weights(tokens: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Return weights (B, N) in float32 or float64: 1, and 0 for padding."""
    dtype = accumulation_dtype(tokens.dtype)
    if mask is not None:
        return mask.astype(dtype, order="C")  # True becomes 1
    # NB: not np.ones(like=…): it passes an argument that CuPy's `ones` does not have.
    weights = np.zeros(tokens.shape[:-1], dtype, like=tokens)
    weights.fill(1)
    return weights


# For NumPy and CuPy arrays. `quickmerge` has already converted and checked them: it
# calls the functions from `check_array` on for traced arrays only, so these return
# their array unchanged.
COMPUTE_STAGES = Stages(
    np, lambda declared, x: x, lambda x, tokens: x, lambda x, *others: x,
    lambda *arrays: [*arrays], masked_copy,
    _unit_weights, compute_attention_entropy,
    compute_query_key_entropy, compute_self_attention_entropy,
    compute_attention_received, compute_attention_mass, compute_saliency,
    compute_gumbel_softmax,
    compute_saliency_mass, compute_select_tokens, compute_cluster_tokens,
    counted_groups, compute_merge_tokens, compute_group_sizes, compute_group_positions,
)  # fmt: skip


def traced_stages(framework: Literal["torch", "jax"]) -> Stages:
    """Return the public functions, for arrays that torch or JAX traces."""
    xp, operators = modules_of(framework)

    def unit_weights(tokens: Any, mask: Any) -> Any:
        # A constant: `ones_like` has no gradient.
        return operators.masked_copy(xp.ones_like(tokens[..., 0]), mask)

    return Stages(
        xp, operators.check_array, operators.full_mask, operators.protected_tokens,
        operators.host_values, operators.masked_copy, unit_weights,
        attention_entropy, query_key_entropy, self_attention_entropy,
        attention_received, attention_mass, saliency_of_entropy, gumbel_softmax,
        saliency_mass, select_tokens, cluster_tokens,
        lambda labels: labels.amax(-1) + 1, merge_tokens, group_sizes,
        group_positions,
    )  # fmt: skip
