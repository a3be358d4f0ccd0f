"""The functions of `qm_cupy` for torch, differentiable.

Every public name of `qm_cupy` is here too. A function whose result has a gradient
passes it on, by its vector–Jacobian product; its parameters, results and errors are
those of the function of that name there, without `out` and `workspace`. Labels,
positions and counts are constants, as in the paper: what yields them takes tensors that
require grad, and detaches them. All else is the very same object, and refuses such
tensors: no gradient is ever left out in silence.

The operations are torch's custom operators, ``torch.ops.qm_cupy``: a compiled graph
holds them whole. It breaks where K differs between sequences, as its array is read; a
budget that is a share of the tokens takes an N known to the compiler. Each operation
can be differentiated once, and by `torch.autograd`, not by `torch.func`.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import composed as _composed
from . import paper as framework
from .autodiff import torch_operators as _torch
from .autodiff.torch_operators import (
    apply,
    apply_constant,
    check_tensor,
    counts_of,
    optional_counts,
    signed,
)
from .priors import mlp_prior
from .stages.alignment import alignment_loss as alignment

# isort: off
from . import (
    __all__ as __all__,
    MLP as MLP,
    AlignmentLoss as AlignmentLoss,
    Choice as Choice,
    KernelCompilationError as KernelCompilationError,
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

torch.compiler.assume_constant_result(token_budget)  # K is known before any tensor


def attention_entropy(attention: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`qm_cupy.attention_entropy`, differentiable to `attention`."""
    return apply("attention_entropy", attention, mask)


def query_key_entropy(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`qm_cupy.query_key_entropy`, differentiable to `query` and `key`."""
    return apply("query_key_entropy", query, key, mask, causal, scale)


def self_attention_entropy(tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`qm_cupy.self_attention_entropy`, differentiable to `tokens`."""
    return apply("self_attention_entropy", tokens, mask)


def saliency(
    entropy: Tensor, *, salient: str = "low", mask: Tensor | None = None
) -> Tensor:
    """`qm_cupy.saliency`, differentiable to `entropy`."""
    return apply("saliency", entropy, mask, salient)


def norm_saliency(tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`qm_cupy.norm_saliency`, differentiable to `tokens`."""
    return apply("norm_saliency", tokens, mask)


def gumbel_softmax(
    saliency: Tensor,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    hard: Any = None,
    mask: Tensor | None = None,
    sequence_offset: int = 0,
) -> Tensor:
    """`qm_cupy.gumbel_softmax`, differentiable to `saliency`.

    The gradient of a hard mask is that of the soft probabilities: straight through.
    """
    counts, most = optional_counts("hard", hard)
    options = temperature, signed(seed), sequence_offset, most
    return apply("gumbel_softmax", saliency, mask, counts, *options)


def saliency_mass(
    saliency: Tensor, probabilities: Tensor, *, epsilon: float = 0.01
) -> Tensor:
    """`qm_cupy.saliency_mass`, differentiable to `saliency` and `probabilities`."""
    return apply("saliency_mass", saliency, probabilities, epsilon)


def merge_tokens(
    tokens: Tensor, labels: Tensor, num_groups: Any, *, mass: Tensor | None = None
) -> Tensor:
    """`qm_cupy.merge_tokens`, differentiable to `tokens` and `mass`."""
    counts, most = counts_of("num_groups", num_groups)
    return apply("merge_tokens", tokens, mass, labels, counts, most)


def unmerge_tokens(merged: Tensor, labels: Tensor) -> Tensor:
    """`qm_cupy.unmerge_tokens`, differentiable to `merged`."""
    return apply("unmerge_tokens", merged, labels)


def reconstruction_error(
    tokens: Tensor,
    merged: Tensor,
    *,
    labels: Tensor | None = None,
    num_groups: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`qm_cupy.reconstruction_error`, differentiable to `tokens` and `merged`."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = labels, mask, counts
    return apply("reconstruction_error", tokens, merged, *constants, most)


def fidelity_loss(
    tokens: Tensor,
    merged: Tensor,
    *,
    labels: Tensor | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`qm_cupy.fidelity_loss`, differentiable to `tokens` and `merged`."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = labels, mask, counts
    return apply("fidelity_loss", tokens, merged, *constants, gamma, most)


def select_tokens(
    scores: Tensor, num_groups: Any, *, mask: Tensor | None = None
) -> Tensor:
    """`qm_cupy.select_tokens`: constants."""
    return apply_constant(
        "select_tokens", scores, mask, *counts_of("num_groups", num_groups)
    )


def norm_budget(
    tokens: Tensor, gamma: float = 0.8, *, mask: Tensor | None = None
) -> Tensor:
    """`qm_cupy.norm_budget`: constants."""
    return apply_constant("norm_budget", tokens, mask, gamma)


def cluster_tokens(
    tokens: Tensor,
    num_groups: Any,
    *,
    method: str = "average",
    mass: Tensor | None = None,
    anchors: Tensor | None = None,
    protect: Tensor | None = None,
    mask: Tensor | None = None,
    order: str = "last",
) -> Tensor:
    """`qm_cupy.cluster_tokens`: constants."""
    counts, most = counts_of("num_groups", num_groups)
    constants = tokens, mass, anchors, protect, mask, counts
    return apply_constant("cluster_tokens", *constants, method, order, most)


def cut_linkage(
    dendrogram: Tensor,
    *,
    num_groups: Any = None,
    max_error: float | None = None,
    mass: Tensor | None = None,
    mask: Tensor | None = None,
    order: str = "last",
) -> Tensor:
    """`qm_cupy.cut_linkage`: constants."""
    counts, most = optional_counts("num_groups", num_groups)
    constants = dendrogram, mass, mask, counts
    return apply_constant("cut_linkage", *constants, max_error, order, most)


def group_sizes(labels: Tensor, num_groups: Any) -> Tensor:
    """`qm_cupy.group_sizes`: constants."""
    return apply("group_sizes", labels, *counts_of("num_groups", num_groups))


def group_positions(labels: Tensor, num_groups: Any) -> Tensor:
    """`qm_cupy.group_positions`: constants."""
    return apply("group_positions", labels, *counts_of("num_groups", num_groups))


def quickmerge(
    tokens: Tensor,
    budget: Any,
    *,
    hidden_states: Tensor | None = None,
    attention: Tensor | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    saliency: Tensor | None = None,
    mask: Tensor | None = None,
    protect: Tensor | None = None,
    method: str = "average",
    order: str = "last",
    temperature: float = 0.1,
    epsilon: float = 0.01,
    weights: Any = "mass",
    weighted_linkage: bool = False,
    seed: int | None = 0,
    sequence_offset: int = 0,
) -> Merged[Tensor]:
    """`qm_cupy.quickmerge`, whose tokens, saliency and mass are differentiable.

    To `tokens`, to what the saliency comes from, and to `weights` if they are a tensor.
    """
    tokens, mask = check_tensor("tokens", tokens), check_tensor("mask?", mask)
    return _composed.quickmerge(
        _HERE, torch, _torch.fresh, tokens, budget, hidden_states, attention, query,
        key, saliency, mask, protect, method, order, temperature, epsilon, weights,
        weighted_linkage, seed, sequence_offset,
    )  # fmt: skip


class MLPPrior(nn.Module):
    """`qm_cupy.MLPPrior`, with weights that torch trains.

    ``forward_prior`` and ``backward_prior`` are each the paper's ``nn.Sequential(
    nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))``; called, it is `alignment_loss`.

    Parameters
    ----------
    forward, backward : MLP
        Their first weights, of `qm_cupy.MLPPrior` for example; they are copied.

    Examples
    --------
    >>> merged = torch.ones(5, 8)
    >>> prior = MLPPrior.init(8)
    >>> prior(merged).total.backward()
    >>> prior.forward_prior[0].weight.grad.shape
    torch.Size([256, 8])
    >>> constant = prior.detach()
    >>> bool(alignment_loss(merged, constant).total == prior(merged).total)
    True
    """

    def __init__(self, forward: MLP, backward: MLP) -> None:
        super().__init__()
        self.forward_prior = _network(forward)
        self.backward_prior = _network(backward)

    @classmethod
    def init(cls, dim: int, *, hidden_dim: int = 256, seed: int = 0) -> "MLPPrior":
        """Return the prior that `qm_cupy.MLPPrior.init` draws."""
        drawn = mlp_prior.MLPPrior.init(dim, hidden_dim=hidden_dim, seed=seed)
        return cls(drawn.forward, drawn.backward)

    @classmethod
    def from_state_dict(
        cls, forward: Mapping[str, Any], backward: Mapping[str, Any]
    ) -> "MLPPrior":
        """Return the prior of two networks, as `qm_cupy.MLPPrior.from_state_dict`."""
        given = mlp_prior.MLPPrior.from_state_dict(forward, backward)
        return cls(given.forward, given.backward)

    def detach(self) -> mlp_prior.MLPPrior:
        """Return the `qm_cupy.MLPPrior` of the weights as they are now: copies."""
        return mlp_prior.MLPPrior.from_state_dict(
            self.forward_prior.state_dict(), self.backward_prior.state_dict()
        )

    def forward(
        self, merged: Tensor | Merged[Tensor], *, num_groups: Any = None
    ) -> AlignmentLoss[Tensor]:
        """Return `alignment_loss` under this prior."""
        return alignment_loss(merged, self, num_groups=num_groups)


def _network(weights: MLP) -> nn.Sequential:
    layers = []
    for weight, bias in (weights[:2], weights[2:]):
        out_dim, in_dim = weight.shape
        layer = nn.Linear(in_dim, out_dim, device="meta")  # which draws nothing
        layer.weight = nn.Parameter(torch.tensor(weight))
        layer.bias = nn.Parameter(torch.tensor(bias))
        layers.append(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def alignment_loss(
    merged: Tensor | Merged[Tensor], prior: Any, *, num_groups: Any = None
) -> AlignmentLoss[Tensor]:
    """`qm_cupy.alignment_loss`, differentiable to `merged` and the prior's weights.

    Under an `MLPPrior`, that is, from here or from `qm_cupy`, whose weights are then
    constants. Any other prior has no gradient: `merged` must not require one.
    """
    if isinstance(prior, mlp_prior.MLPPrior):
        tokens = merged.tokens if isinstance(merged, Merged) else merged
        arrays = (*prior.forward, *prior.backward)
        weights = [torch.as_tensor(w, device=tokens.device) for w in arrays]
    elif isinstance(prior, MLPPrior):
        weights = list(prior.parameters())
    else:
        return alignment.alignment_loss(merged, prior, num_groups=num_groups)
    if isinstance(merged, Merged):
        if num_groups is None:
            num_groups = (merged.sizes > 0).sum(-1)
        merged = merged.tokens
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


class BidirectionalARAlignment(nn.Module):
    """`qm_cupy.BidirectionalARAlignment` with a prior that torch trains.

    Called, it is `compute_alignment_loss`.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_dim: int = 256,
        *,
        seed: int = 0,
        prior: Any = None,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        if prior is None:
            prior = MLPPrior.init(embedding_dim, hidden_dim=hidden_dim, seed=seed)
        self.prior = prior

    def forward_loss(self, merged: Tensor, *, num_groups: Any = None) -> Tensor:
        """Return the left-to-right loss, the mean over the batch."""
        return _mean(alignment_loss(merged, self.prior, num_groups=num_groups).forward)

    def backward_loss(self, merged: Tensor, *, num_groups: Any = None) -> Tensor:
        """Return the right-to-left loss, the mean over the batch."""
        return _mean(alignment_loss(merged, self.prior, num_groups=num_groups).backward)

    def compute_alignment_loss(
        self, merged: Tensor, *, num_groups: Any = None
    ) -> Tensor:
        """Return the sum of both losses, the mean over the batch."""
        return _mean(alignment_loss(merged, self.prior, num_groups=num_groups).total)

    forward = compute_alignment_loss


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(losses.numel(), 1)


class QuickMergePP(nn.Module):
    """`qm_cupy.QuickMergePP` as a module whose losses are tensors.

    Its parameters are those of the prior; the losses are differentiable to these and to
    the tokens.

    Examples
    --------
    >>> tokens = torch.arange(96.0).sin().reshape(2, 12, 4).requires_grad_()
    >>> model = QuickMergePP(embedding_dim=4)
    >>> merged, losses = model(tokens, 3)
    >>> losses["total"].backward()
    >>> tokens.grad.shape, len([*model.parameters()])
    (torch.Size([2, 12, 4]), 8)
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
        super().__init__()
        self.embedding_dim = embedding_dim
        self.saliency_estimator = EntropyAwareSaliency(embedding_dim, num_layers)
        self.token_merger = DifferentiableTokenMerging(
            temperature, epsilon, method=method, order=order, seed=seed
        )
        self.ar_alignment = BidirectionalARAlignment(embedding_dim, seed=seed or 0)
        self.fidelity_constraint = NormBasedFidelityConstraint(gamma)

    def forward(
        self, tokens: Tensor, K: Any, alpha: float = 0.1, *, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Merge tokens to K; total loss = alpha · alignment + fidelity."""
        return _composed.merged_and_losses(self, tokens, K, alpha, mask)

    def inference(
        self, tokens: Tensor, K: int, ar_model: Callable[[Any], Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Return merged tokens (K, D) and a model's predictions (K, E) over them."""
        with torch.no_grad():
            scores = self.saliency_estimator(tokens)
            merged = self.token_merger.merge(tokens, scores, K).tokens
            return merged, [] if ar_model is None else decode(merged, ar_model)
