"""The stages of the pipeline in their order, for arrays of any library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays.libraries import is_cuda
from .arrays.shapes import lift_source
from .results import Merged
from .settings import implementation
from .stages.clustering.cluster_tokens import (
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


class Sources(NamedTuple):
    """The source of the saliency: one of these, or the tokens if all are None."""

    hidden_states: Any
    attention: Any
    query: Any
    key: Any
    saliency: Any


class Options(NamedTuple):
    """Options of selection, clustering and merging, with the names of `quickmerge`."""

    method: str
    order: str
    temperature: float
    epsilon: float
    weights: Any
    weighted_linkage: bool
    seed: int | None
    sequence_offset: int


class Stages(NamedTuple):
    """The functions that `compose` calls, for NumPy and CuPy or for one framework.

    Arrays that torch or JAX traces need the public functions, which record gradients.
    NumPy and CuPy arrays take the functions without checks: `quickmerge` has checked
    them once.
    """

    xp: Any
    check_array: Callable[..., Any]
    masked_copy: Callable[..., Any]
    attention_entropy: Callable[..., Any]
    query_key_entropy: Callable[..., Any]
    self_attention_entropy: Callable[..., Any]
    saliency: Callable[..., Any]
    gumbel_softmax: Callable[..., Any]
    saliency_mass: Callable[..., Any]
    select_tokens: Callable[..., Any]
    cluster_tokens: Callable[..., Any]
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
    """Run all stages: saliency, selection, clustering and merging."""
    # Steps 1 and 2 of the paper: saliency, Gumbel-softmax and saliency mass.
    scores, mass = _saliency_and_mass(stages, tokens, sources, mask, options)  # (B, N)
    anchors = None
    if options.method == "nearest":  # the only method that needs selected tokens
        anchors = _anchors(stages, scores, num_groups, protect, mask, options)  # (B, K)
    labels = stages.cluster_tokens(  # (B, N)
        tokens,
        num_groups,
        method=options.method,
        mass=mass if options.weighted_linkage else None,
        anchors=anchors,
        protect=protect,
        mask=mask,
        order=options.order,
    )
    # x̃_k = Σ m_j x_j / Σ m_j over the tokens j of group k; shape (B, K, D)
    merged = stages.merge_tokens(tokens, labels, num_groups, mass=mass, out=out)
    sizes = stages.group_sizes(labels, num_groups)  # (B, K)
    positions = stages.group_positions(labels, num_groups)  # (B, K)
    return Merged(merged, labels, sizes, positions, scores, mass)


def _saliency_and_mass(
    stages: Stages, tokens: Any, sources: Sources, mask: Any, options: Options
) -> tuple[Any, Any]:
    """Return saliency and weights (B, N), 0 for padding.

    The optimized kernels compute every step after the entropy in one launch.
    """
    shape = tuple(tokens.shape[:-1])  # (N,) or (B, N)
    padding = None if mask is None else mask.reshape(-1, shape[-1])  # (B, N)
    noise = options.seed, options.sequence_offset
    selecting = isinstance(options.weights, str) and options.weights == "mass"
    # Traced arrays are never fused: a fused kernel has no gradient.
    fused = stages.xp is np and is_cuda(tokens) and implementation() == "optimized"
    if sources.saliency is not None:
        scores = stages.masked_copy(sources.saliency, mask)
    else:
        entropy = _entropy(stages, tokens, sources, padding)
        if fused and selecting:  # saliency, Gumbel-softmax and mass in one launch
            scores, _, mass = saliency_gumbel_mass_cuda(
                entropy, "low", options.temperature, noise, options.epsilon, padding
            )
            return scores.reshape(shape), mass.reshape(shape)
        scores = stages.saliency(entropy, mask=padding).reshape(shape)
    if not isinstance(options.weights, str):  # the caller's array (B, N)
        return scores, stages.masked_copy(options.weights, mask)
    # Copies, so that no two fields of the result use the same memory.
    if options.weights == "saliency":
        return scores, stages.masked_copy(scores, mask)
    if not selecting:  # "uniform"
        return scores, stages.masked_copy(stages.xp.ones_like(scores), mask)
    if fused:  # the saliency was an input, so only softmax and mass are computed
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


def _noise(mask: Any, options: Options) -> dict[str, Any]:
    """Return the arguments of `gumbel_softmax` that determine the noise."""
    return {
        "seed": options.seed,
        "mask": mask,
        "sequence_offset": options.sequence_offset,
    }


def _entropy(stages: Stages, tokens: Any, sources: Sources, mask: Any) -> Any:
    """Return the entropy of the source: (B, N), (L, B, N) or (L, B, H, N)."""
    if sources.attention is not None:
        lifted = lift_source("attention", sources.attention, tokens)
        return stages.attention_entropy(lifted, mask=mask)
    if sources.query is not None:
        query = lift_source("query", sources.query, tokens)
        key = lift_source("key", sources.key, tokens)
        return stages.query_key_entropy(query, key, mask=mask)
    if sources.hidden_states is not None:
        layers = lift_source("hidden_states", sources.hidden_states, tokens)
        # For arrays of any library: the public function expands the mask to the layers.
        return self_attention_entropy(layers, mask=mask)
    x = tokens.reshape(-1, *tokens.shape[-2:])  # (B, N, D)
    return stages.self_attention_entropy(x, mask=mask)


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
        above = stages.xp.finfo(scores.dtype).max / 2  # the greatest, with any noise
        scores = stages.xp.where(protect, above, scores)
    selected = stages.gumbel_softmax(scores, hard=num_groups, **_noise(mask, options))
    return stages.select_tokens(selected, num_groups, mask=mask)  # (B, K)


def _masked_copy(x: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Return a copy in float32 or float64 that is 0 where a mask is False."""
    x = x.astype(np.result_type(x.dtype, np.float32), order="C")
    return x if mask is None else x * mask


# For NumPy and CuPy arrays, which `quickmerge` has converted and checked already.
INSIDE = Stages(
    np, lambda declared, x: x, _masked_copy, compute_attention_entropy,
    compute_query_key_entropy, compute_self_attention_entropy,
    compute_saliency, compute_gumbel_softmax, compute_saliency_mass,
    compute_select_tokens, compute_cluster_tokens, compute_merge_tokens,
    compute_group_sizes, compute_group_positions,
)  # fmt: skip


def traced_stages(framework: str) -> Stages:
    """Return the public functions, for arrays that torch or JAX traces."""
    xp: Any  # a local import: `import qm_cupy` must not import a framework
    operators: Any
    if framework == "torch":
        import torch

        from .autodiff import torch_operators

        xp, operators = torch, torch_operators
    else:
        from jax import numpy

        from .autodiff import jax_primitives

        xp, operators = numpy, jax_primitives
    return Stages(
        xp, operators.check_array, operators.masked_copy, attention_entropy,
        query_key_entropy, self_attention_entropy, saliency_of_entropy, gumbel_softmax,
        saliency_mass, select_tokens, cluster_tokens, merge_tokens, group_sizes,
        group_positions,
    )  # fmt: skip
