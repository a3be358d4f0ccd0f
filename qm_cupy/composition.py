"""The stages of the pipeline in their order, for arrays of any library.

Axes: B sequences of N tokens of width D are merged to K groups each. The saliency may
come from L layers with H heads each.
"""

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

    For arrays that torch or JAX traces, these are the public functions, because they
    record gradients. For NumPy and CuPy arrays, they are the functions ``compute_…``,
    because `quickmerge` has already converted the arrays and checked the tokens.
    """

    xp: Any  # the namespace with `where` and `finfo`: numpy, torch or jax.numpy
    # (name, array) -> array, or raises; a name that ends in "?" also allows None
    check_array: Callable[..., Any]
    masked_copy: Callable[..., Any]  # (array, mask) -> copy that is 0 for padding
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
    if options.method == "nearest":  # the only method that needs anchors
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
    """Return the saliency and the weights of the merge (B, N), 0 for padding.

    With optimized kernels, CuPy arrays and ``weights="mass"``, one function computes
    all steps after the entropy, in one launch if the sizes allow it.
    """
    shape = tuple(tokens.shape[:-1])  # (N,) or (B, N)
    mask_2d = None if mask is None else mask.reshape(-1, shape[-1])  # (B, N)
    noise = options.seed, options.sequence_offset
    weights_are_mass = isinstance(options.weights, str) and options.weights == "mass"
    # `stages.xp is np` means that the arrays are not traced (`xp` is NumPy for CuPy
    # arrays too, because NumPy's functions accept them). Traced arrays need separate
    # steps, because the fused kernels have no gradient.
    fused = stages.xp is np and is_cuda(tokens) and implementation() == "optimized"
    if sources.saliency is not None:
        scores = stages.masked_copy(sources.saliency, mask)
    else:
        entropy = _entropy(stages, tokens, sources, mask_2d)
        if fused and weights_are_mass:
            # Saliency (with "low", low entropy is salient), Gumbel-softmax and mass:
            # one launch if the sizes allow it, otherwise three.
            scores, _, mass = saliency_gumbel_mass_cuda(
                entropy, "low", options.temperature, noise, options.epsilon, mask_2d
            )
            return scores.reshape(shape), mass.reshape(shape)
        scores = stages.saliency(entropy, mask=mask_2d).reshape(shape)
    if not isinstance(options.weights, str):  # the caller's array (B, N)
        return scores, stages.masked_copy(options.weights, mask)
    # Copy the weights, so that no two fields of the result use the same memory.
    if options.weights == "saliency":
        return scores, stages.masked_copy(scores, mask)
    if not weights_are_mass:  # "uniform"
        return scores, stages.masked_copy(stages.xp.ones_like(scores), mask)
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
        # Call the public function for NumPy and CuPy too. It expands the mask (B, N) to
        # (L, B, N), which `compute_self_attention_entropy` does not do. The functions
        # for attention and for queries and keys expand the mask themselves.
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
        # Greater than every saliency, whatever the noise adds to it. Half of the
        # maximum, so that the sum with the noise does not overflow.
        above = stages.xp.finfo(scores.dtype).max / 2
        scores = stages.xp.where(protect, above, scores)
    # A K-hot mask of the K greatest sums. The temperature does not change their order,
    # so it is not passed.
    selected = stages.gumbel_softmax(scores, hard=num_groups, **_noise(mask, options))
    return stages.select_tokens(selected, num_groups, mask=mask)  # (B, K)


def _masked_copy(x: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Return a copy in float32 or float64 that is 0 where a mask is False."""
    x = x.astype(np.result_type(x.dtype, np.float32), order="C")
    # Padding may be NaN, and NaN times 0 is NaN.
    return x if mask is None else np.where(mask, x, x.dtype.type(0))


# For NumPy and CuPy arrays. `quickmerge` has already converted them and calls
# `check_array` for traced arrays only, so this one returns its array unchanged.
COMPUTE_STAGES = Stages(
    np, lambda declared, x: x, _masked_copy, compute_attention_entropy,
    compute_query_key_entropy, compute_self_attention_entropy,
    compute_saliency, compute_gumbel_softmax, compute_saliency_mass,
    compute_select_tokens, compute_cluster_tokens, compute_merge_tokens,
    compute_group_sizes, compute_group_positions,
)  # fmt: skip


def traced_stages(framework: str) -> Stages:
    """Return the public functions, for arrays that torch or JAX traces."""
    # Import the framework here, so that `import qm_cupy` does not import it.
    xp: Any
    operators: Any
    if framework == "torch":
        import torch

        from .autodiff import torch_operators

        xp, operators = torch, torch_operators
    else:
        from jax import numpy

        from .autodiff import jax_operators

        xp, operators = numpy, jax_operators
    return Stages(
        xp, operators.check_array, operators.masked_copy, attention_entropy,
        query_key_entropy, self_attention_entropy, saliency_of_entropy, gumbel_softmax,
        saliency_mass, select_tokens, cluster_tokens, merge_tokens, group_sizes,
        group_positions,
    )  # fmt: skip
