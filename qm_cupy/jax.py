"""The functions of `qm_cupy` for JAX, differentiable and under its transformations.

Every public name of `qm_cupy` is here too. A function whose result has a gradient
passes it on, by its vector–Jacobian product; its parameters, results and errors are
those of the function of that name there, without `out` and `workspace`. Labels,
positions and counts are constants, as in the paper: their gradient is zero. All else is
the very same object, and refuses tracers: no gradient is ever left out in silence.

Arrays that have values go straight to the library, without a copy. Under `jax.jit` and
`jax.vmap` the library is called back when they have some, on the CPU (`jax.vmap`: for
one example after the other, each of which counts as sequence 0 to `gumbel_noise`).
Counts, seeds and all other options must be known while tracing. Each function can be
differentiated once, in reverse mode.

`MLPPrior` and the classes that hold one are pytrees of its weights.
"""

import sys
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from . import composed as _composed
from . import paper as framework
from .autodiff import jax_primitives as _jax
from .autodiff.jax_primitives import (
    apply,
    check_array,
    check_known,
    counts_of,
    known_seed,
    optional_counts,
)
from .stages.alignment import alignment_loss as alignment

# isort: off
from . import (
    __all__ as __all__,
    MLP as MLP,
    AlignmentLoss as AlignmentLoss,
    Choice as Choice,
    KernelCompilationError as KernelCompilationError,
    MLPPrior as MLPPrior,
    Merged as Merged,
    Prior as Prior,
    SteppingPrior as SteppingPrior,
    TransformerPrior as TransformerPrior,
    Workspace as Workspace,
    alignment_loss_vjp as alignment_loss_vjp,
    allow_tf32 as allow_tf32,
    attention_entropy_vjp as attention_entropy_vjp,
    check_finite as check_finite,
    choose_merge as choose_merge,
    cosine_similarity as cosine_similarity,
    decode as decode,
    fidelity_loss_vjp as fidelity_loss_vjp,
    gumbel_noise as gumbel_noise,
    gumbel_softmax_vjp as gumbel_softmax_vjp,
    linkage as linkage,
    merge_tokens_vjp as merge_tokens_vjp,
    norm_mass as norm_mass,
    norm_saliency_vjp as norm_saliency_vjp,
    query_key_entropy_vjp as query_key_entropy_vjp,
    quickmerge_inference as quickmerge_inference,
    reconstruction_error_vjp as reconstruction_error_vjp,
    saliency_mass_vjp as saliency_mass_vjp,
    saliency_vjp as saliency_vjp,
    self_attention_entropy_vjp as self_attention_entropy_vjp,
    token_budget as token_budget,
    unmerge_tokens_vjp as unmerge_tokens_vjp,
    use_kernels as use_kernels,
    warmup as warmup,
)
# isort: on

_HERE = sys.modules[__name__]


def attention_entropy(attention: Array, *, mask: Array | None = None) -> Array:
    """`qm_cupy.attention_entropy`, differentiable to `attention`."""
    return apply("attention_entropy", attention, mask)


def query_key_entropy(
    query: Array,
    key: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
) -> Array:
    """`qm_cupy.query_key_entropy`, differentiable to `query` and `key`."""
    return apply("query_key_entropy", query, key, mask, causal, scale)


def self_attention_entropy(tokens: Array, *, mask: Array | None = None) -> Array:
    """`qm_cupy.self_attention_entropy`, differentiable to `tokens`."""
    return apply("self_attention_entropy", tokens, mask)


def saliency(
    entropy: Array, *, salient: str = "low", mask: Array | None = None
) -> Array:
    """`qm_cupy.saliency`, differentiable to `entropy`."""
    return apply("saliency", entropy, mask, salient)


def norm_saliency(tokens: Array, *, mask: Array | None = None) -> Array:
    """`qm_cupy.norm_saliency`, differentiable to `tokens`."""
    return apply("norm_saliency", tokens, mask)


def gumbel_softmax(
    saliency: Array,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    hard: Any = None,
    mask: Array | None = None,
    sequence_offset: int = 0,
) -> Array:
    """`qm_cupy.gumbel_softmax`, differentiable to `saliency`.

    The gradient of a hard mask is that of the soft probabilities: straight through.
    """
    counts, most = optional_counts("hard", hard)
    options = temperature, known_seed(seed), sequence_offset, most
    return apply("gumbel_softmax", saliency, mask, counts, *options)


def saliency_mass(
    saliency: Array, probabilities: Array, *, epsilon: float = 0.01
) -> Array:
    """`qm_cupy.saliency_mass`, differentiable to `saliency` and `probabilities`."""
    return apply("saliency_mass", saliency, probabilities, epsilon)


def merge_tokens(
    tokens: Array, labels: Array, num_groups: Any, *, mass: Array | None = None
) -> Array:
    """`qm_cupy.merge_tokens`, differentiable to `tokens` and `mass`."""
    counts, most = counts_of("num_groups", num_groups)
    return apply("merge_tokens", tokens, mass, labels, counts, most)


def unmerge_tokens(merged: Array, labels: Array) -> Array:
    """`qm_cupy.unmerge_tokens`, differentiable to `merged`."""
    return apply("unmerge_tokens", merged, labels)


def reconstruction_error(
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    num_groups: Any = None,
    mask: Array | None = None,
) -> Array:
    """`qm_cupy.reconstruction_error`, differentiable to `tokens` and `merged`."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = labels, mask, counts
    return apply("reconstruction_error", tokens, merged, *constants, most)


def fidelity_loss(
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: Array | None = None,
) -> Array:
    """`qm_cupy.fidelity_loss`, differentiable to `tokens` and `merged`."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = labels, mask, counts
    return apply("fidelity_loss", tokens, merged, *constants, gamma, most)


def select_tokens(
    scores: Array, num_groups: Any, *, mask: Array | None = None
) -> Array:
    """`qm_cupy.select_tokens`: constants."""
    return apply("select_tokens", scores, mask, *counts_of("num_groups", num_groups))


def norm_budget(
    tokens: Array, gamma: float = 0.8, *, mask: Array | None = None
) -> Array:
    """`qm_cupy.norm_budget`: constants."""
    return apply("norm_budget", tokens, mask, gamma)


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
    """`qm_cupy.cluster_tokens`: constants."""
    counts, most = counts_of("num_groups", num_groups)
    constants = tokens, mass, anchors, protect, mask, counts
    return apply("cluster_tokens", *constants, method, order, most)


def cut_linkage(
    dendrogram: Array,
    *,
    num_groups: Any = None,
    max_error: float | None = None,
    mass: Array | None = None,
    mask: Array | None = None,
    order: str = "last",
) -> Array:
    """`qm_cupy.cut_linkage`: constants."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = dendrogram, mass, mask, counts
    return apply("cut_linkage", *constants, max_error, order, most)


def group_sizes(labels: Array, num_groups: Any) -> Array:
    """`qm_cupy.group_sizes`: constants."""
    return apply("group_sizes", labels, *counts_of("num_groups", num_groups))


def group_positions(labels: Array, num_groups: Any) -> Array:
    """`qm_cupy.group_positions`: constants."""
    return apply("group_positions", labels, *counts_of("num_groups", num_groups))


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
) -> Merged[Array]:
    """`qm_cupy.quickmerge`, whose tokens, saliency and mass are differentiable.

    To `tokens`, to what the saliency comes from, and to `weights` if they are an array.
    """
    tokens, mask = check_array("tokens", tokens), check_array("mask?", mask)
    check_known("budget", budget)
    if isinstance(budget, float):  # a share of the tokens that the mask keeps
        check_known("mask", mask)
    return _composed.quickmerge(
        _HERE, jnp, _jax.fresh, tokens, budget, hidden_states, attention, query,
        key, saliency, mask, protect, method, order, temperature, epsilon, weights,
        weighted_linkage, seed, sequence_offset,
    )  # fmt: skip


def alignment_loss(
    merged: Array | Merged[Array], prior: Any, *, num_groups: Any = None
) -> AlignmentLoss[Array]:
    """`qm_cupy.alignment_loss`, differentiable to `merged` and the prior's weights.

    Under an `MLPPrior`, that is. Any other prior has no gradient: `merged` must then
    not be a tracer.
    """
    if not isinstance(prior, MLPPrior):
        return alignment.alignment_loss(merged, prior, num_groups=num_groups)
    if isinstance(merged, Merged):
        if num_groups is None:
            num_groups = (merged.sizes > 0).sum(-1)
        merged = merged.tokens
    weights = map(jnp.asarray, (*prior.forward, *prior.backward))
    counts, most = optional_counts("num_groups", num_groups)
    forward, backward = apply("alignment_loss", merged, *weights, counts, most)
    return AlignmentLoss(forward, backward, forward + backward)


_DIFFERENTIABLE = framework._Functions(
    self_attention_entropy, saliency, gumbel_softmax, quickmerge, fidelity_loss
)


class EntropyAwareSaliency(framework.EntropyAwareSaliency):
    """`qm_cupy.EntropyAwareSaliency`, differentiable to the tokens."""

    _functions = _DIFFERENTIABLE


class DifferentiableTokenMerging(framework.DifferentiableTokenMerging):
    """`qm_cupy.DifferentiableTokenMerging`, to the tokens and their saliency."""

    _functions = _DIFFERENTIABLE


class NormBasedFidelityConstraint(framework.NormBasedFidelityConstraint):
    """`qm_cupy.NormBasedFidelityConstraint`, to the tokens and the merged ones."""

    _functions = _DIFFERENTIABLE


class BidirectionalARAlignment(framework.BidirectionalARAlignment):
    """`qm_cupy.BidirectionalARAlignment`, to the merged tokens and the prior.

    A pytree, whose leaves are the prior's.
    """

    def _mean_loss(self, merged: Array, num_groups: Any, which: str) -> Array:
        losses = alignment_loss(merged, self.prior, num_groups=num_groups)
        chosen = getattr(losses, which)
        return chosen.sum() / max(chosen.size, 1)


class QuickMergePP(framework.QuickMergePP):
    """`qm_cupy.QuickMergePP`, whose losses are arrays, to the tokens and the prior.

    A pytree, whose leaves are the prior's weights.

    Examples
    --------
    >>> tokens = jnp.sin(jnp.arange(96.0)).reshape(2, 12, 4)
    >>> model = QuickMergePP(embedding_dim=4)
    >>> slope = jax.grad(lambda model: model(tokens, 3)[1]["total"])(model)
    >>> slope.ar_alignment.prior.forward.weight_in.shape
    (256, 4)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 12,
        temperature: float = 0.1,
        gamma: float = 0.8,
        epsilon: float = 0.01,
        *,
        method: str = "average",
        order: str = "last",
        seed: int | None = 0,
    ) -> None:
        self.embedding_dim = embedding_dim
        self.saliency_estimator = EntropyAwareSaliency(embedding_dim, num_layers)
        self.token_merger = DifferentiableTokenMerging(
            temperature, epsilon, method=method, order=order, seed=seed
        )
        self.ar_alignment = BidirectionalARAlignment(embedding_dim, seed=seed or 0)
        self.fidelity_constraint = NormBasedFidelityConstraint(gamma)

    def __call__(  # type: ignore[override]  # arrays, where the other has floats
        self, tokens: Array, K: Any, alpha: float = 0.1, *, mask: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Merge tokens to K; total loss = alpha · alignment + fidelity."""
        return _composed.merged_and_losses(self, tokens, K, alpha, mask)


def _register(kind: type, *leaves: str) -> None:
    """Let JAX map over these attributes of a class; the others it compares."""

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        rest = {name: y for name, y in vars(x).items() if name not in leaves}
        return tuple(getattr(x, name) for name in leaves), tuple(rest.items())

    def unflatten(rest: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        made: Any = object.__new__(kind)
        vars(made).update(rest, **dict(zip(leaves, children, strict=True)))
        return made

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


jax.tree_util.register_pytree_node(
    MLPPrior,
    lambda prior: ((prior.forward, prior.backward), None),
    lambda _, networks: MLPPrior(*networks),
)
_register(BidirectionalARAlignment, "prior")
_register(QuickMergePP, "ar_alignment")
