"""Modules for torch: `MLPPrior` and the classes of the paper.

Most functions of `qm_cupy` accept tensors that require grad, so this module has no
functions of its own. They call operations, such as `merge_tokens`. Each operation is a
custom operator of torch, in ``torch.ops.qm_cupy``. torch computes gradients with the
vector–Jacobian product of each operation. A graph of `torch.compile` or `torch.export`
contains each operator as one node.

If the shape of a result depends on a tensor of counts, the CPU reads the counts. It
waits for a tensor on a GPU, and the compiler may break its graph at this read. Each
operation can be differentiated once, in reverse mode, by `torch.autograd` but not by
`torch.func`. The settings of a forward pass, such as `use_kernels`, also apply to its
backward pass. If `torch.utils.checkpoint` repeats a forward pass, the repeated pass
runs under the settings of the Python thread in which it runs: for a GPU, this is a
thread of autograd, which has the defaults.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import paper
from .pipeline import quickmerge
from .priors import mlp_prior
from .priors.mlp import MLP
from .priors.weight_checks import check_networks
from .results import Merged
from .stages.alignment.alignment_loss import AlignmentLoss, alignment_loss
from .stages.alignment.decode import decode
from .stages.alignment.models import check_model, check_prior
from .stages.clustering.cluster_tokens import Method
from .stages.clustering.labels import Order
from .stages.selection.gumbel_softmax import gumbel_softmax
from .stages.selection.saliency_mass import saliency_mass

__all__ = [
    "BidirectionalARAlignment",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "MLPPrior",
    "NormBasedFidelityConstraint",
    "QuickMergePP",
]


class MLPPrior(nn.Module):
    """`qm_cupy.MLPPrior` as a torch module with trainable weights.

    ``forward_prior`` and ``backward_prior`` are two networks of the paper,
    ``nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))``, for tokens of width
    D and a hidden layer of width H. A call returns `alignment_loss`.

    Parameters
    ----------
    forward, backward : MLP
        Initial weights, for example those of a `qm_cupy.MLPPrior`. They are copied.

    Examples
    --------
    >>> import qm_cupy as qm
    >>> merged = torch.ones(5, 8)
    >>> prior = MLPPrior.init(8)
    >>> prior(merged).total.backward()
    >>> prior.forward_prior[0].weight.grad.shape
    torch.Size([256, 8])
    >>> constant = prior.detach()
    >>> bool(qm.alignment_loss(merged, constant).total == prior(merged).total)
    True
    """

    def __init__(self, forward: MLP, backward: MLP) -> None:
        super().__init__()
        check_networks(forward, backward)
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
        loaded = mlp_prior.MLPPrior.from_state_dict(forward, backward)
        return cls(loaded.forward, loaded.backward)

    def detach(self) -> mlp_prior.MLPPrior:
        """Return a `qm_cupy.MLPPrior` with copies of the current weights."""
        return mlp_prior.MLPPrior.from_state_dict(
            self.forward_prior.state_dict(), self.backward_prior.state_dict()
        )

    def forward(
        self, merged: Tensor | Merged[Tensor], *, num_groups: Any = None
    ) -> AlignmentLoss[Tensor]:
        """Return `alignment_loss` under this prior."""
        # `alignment_loss` reads the parameters by `network_weights`, so that autograd
        # records them.
        return alignment_loss(merged, self, num_groups=num_groups)

    def network_weights(self) -> tuple[Tensor, ...]:
        """Return the weights of both networks, in the order of `MLP`'s fields."""
        # torch returns parameters in the order of assignment in `__init__`: first those
        # of the forward network.
        return tuple(self.parameters())


def _network(weights: MLP) -> nn.Sequential:
    """Return Linear, ReLU, Linear with copies of the weights."""
    layers = []
    for weight, bias in (weights[:2], weights[2:]):
        out_dim, in_dim = weight.shape
        # With the device "meta" torch draws no random weights, so the state of its
        # random generator does not change.
        layer = nn.Linear(in_dim, out_dim, device="meta")
        layer.weight = nn.Parameter(_copy(weight))
        layer.bias = nn.Parameter(_copy(bias))
        layers.append(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def _copy(weight: Any) -> Tensor:
    # `torch.tensor` warns if its argument is a tensor.
    return torch.as_tensor(weight).detach().clone()


class EntropyAwareSaliency(nn.Module, paper.EntropyAwareSaliency):
    """`qm_cupy.EntropyAwareSaliency` as a module without weights."""

    def __init__(self, embedding_dim: int, num_layers: int = 12) -> None:
        nn.Module.__init__(self)
        paper.EntropyAwareSaliency.__init__(self, embedding_dim, num_layers)

    # torch calls `forward` for a call of the module.
    forward = paper.EntropyAwareSaliency.__call__

    def extra_repr(self) -> str:
        """Return the options, for the repr of the module."""
        return f"embedding_dim={self.embedding_dim}, num_layers={self.num_layers}"


class DifferentiableTokenMerging(nn.Module, paper.DifferentiableTokenMerging):
    """`qm_cupy.DifferentiableTokenMerging` as a module without weights.

    In training mode, each call draws new Gumbel noise from torch's generator, like
    dropout: `torch.manual_seed` makes it reproducible. In evaluation mode, each call
    has the noise of the module's own `seed`. With ``seed=None`` there is never noise.

    Examples
    --------
    >>> tokens, scores = torch.ones(6, 4).cumsum(0), torch.linspace(0, 1, 6)
    >>> merger = DifferentiableTokenMerging()
    >>> (one, _), (other, _) = merger(tokens, scores, 2), merger(tokens, scores, 2)
    >>> torch.equal(one, other)
    False
    """

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.01,
        *,
        method: Method = "average",
        order: Order = "last",
        seed: int | None = 0,
    ) -> None:
        nn.Module.__init__(self)
        paper.DifferentiableTokenMerging.__init__(
            self, temperature, epsilon, method=method, order=order, seed=seed
        )

    def forward(
        self,
        tokens: Tensor,
        saliency_scores: Tensor,
        K: Any,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return merged tokens (B, K, D) and selection probabilities (B, N)."""
        if self.training and self.seed is not None:
            merged, probabilities = self._with_new_noise(
                tokens, saliency_scores, K, mask
            )
            return merged.tokens, probabilities
        return paper.DifferentiableTokenMerging.__call__(
            self, tokens, saliency_scores, K, mask=mask
        )

    def merge(  # type: ignore[override]  # the base class also takes other arrays
        self,
        tokens: Tensor,
        saliency_scores: Tensor,
        K: Any,
        *,
        mask: Tensor | None = None,
    ) -> Merged[Tensor]:
        """Return the complete `Merged` result, with labels, sizes and positions."""
        if self.training and self.seed is not None:
            return self._with_new_noise(tokens, saliency_scores, K, mask)[0]
        return super().merge(tokens, saliency_scores, K, mask=mask)

    def _with_new_noise(
        self, tokens: Tensor, scores: Tensor, num_groups: Any, mask: Tensor | None
    ) -> tuple[Merged[Tensor], Tensor]:
        """Return the `Merged` and the probabilities, under noise of torch's generator.

        The noise is not that of a `noise_seed` drawn here: `torch.compile` needs the
        value of a seed while it traces, and would draw it only once.
        """
        # Half precision has too few values for noise.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # s
        # g = -log(e) of an exponential variable e, as in `F.gumbel_softmax`
        exponential = torch.empty_like(scores).exponential_()
        noise = -exponential.clamp_min(torch.finfo(scores.dtype).tiny).log()
        if mask is not None:  # padding may have any score
            valid = mask != 0
            scores = torch.where(valid, scores, 0)
        perturbed = scores + noise  # (B, N)
        # π = softmax((s + g) / τ) and m = π s + (1 - π) ε
        probabilities = gumbel_softmax(
            perturbed, temperature=self.temperature, seed=None, mask=mask
        )
        mass = saliency_mass(scores, probabilities, epsilon=self.epsilon)
        # The anchors of "nearest" are the tokens of greatest s + g. Only the order of
        # these values counts, and a saliency must not be negative.
        tokens_only = perturbed
        if mask is not None:
            tokens_only = torch.where(valid, perturbed, torch.inf)
        ranks = perturbed - tokens_only.amin(dim=-1, keepdim=True)
        merged = quickmerge(
            tokens,
            num_groups,
            saliency=ranks if self.method == "nearest" else None,
            mask=mask,
            method=self.method,
            order=self.order,
            weights=mass,
        )
        return merged, probabilities

    def extra_repr(self) -> str:
        """Return the options, for the repr of the module."""
        return (
            f"temperature={self.temperature}, epsilon={self.epsilon}, "
            f"method={self.method!r}, order={self.order!r}, seed={self.seed}"
        )


class BidirectionalARAlignment(nn.Module, paper.BidirectionalARAlignment):
    """`qm_cupy.BidirectionalARAlignment` with a prior that torch trains.

    It has the methods of that class. A call is ``compute_alignment_loss``.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_dim: int = 256,
        *,
        seed: int = 0,
        prior: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        if prior is None:
            prior = MLPPrior.init(embedding_dim, hidden_dim=hidden_dim, seed=seed)
        check_prior(prior)
        paper.BidirectionalARAlignment.__init__(self, embedding_dim, prior=prior)

    forward = paper.BidirectionalARAlignment.compute_alignment_loss


class NormBasedFidelityConstraint(nn.Module, paper.NormBasedFidelityConstraint):
    """`qm_cupy.NormBasedFidelityConstraint` as a module without weights.

    It has the method of that class. A call is ``compute_fidelity_loss``.
    """

    def __init__(self, gamma: float = 0.8) -> None:
        nn.Module.__init__(self)
        paper.NormBasedFidelityConstraint.__init__(self, gamma)

    forward = paper.NormBasedFidelityConstraint.compute_fidelity_loss

    def extra_repr(self) -> str:
        """Return the option, for the repr of the module."""
        return f"gamma={self.gamma}"


def _unchanged(loss: Tensor) -> Tensor:
    """Return a loss unchanged, where `qm_cupy.QuickMergePP` converts it to a float."""
    return loss


class QuickMergePP(nn.Module, paper.QuickMergePP):
    """`qm_cupy.QuickMergePP` as a torch module whose losses are tensors.

    Its parameters are those of the prior. The losses are differentiable with respect to
    these parameters and to the tokens. In training mode, each call draws new Gumbel
    noise, as in `DifferentiableTokenMerging`.

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
        method: Method = "average",
        order: Order = "last",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        # Only the prior of `ar_alignment` has weights.
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
        return paper.merge_with_losses(self, tokens, K, alpha, mask, _unchanged)

    def inference(  # type: ignore[override]
        self, tokens: Tensor, K: int, ar_model: Callable[[Any], Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Return merged tokens (B, K, D) and a model's predictions (B, K, E).

        For one sequence the axis B is absent. E is the width of a prediction. The model
        reads the merged tokens. Without a model the predictions are an empty list. The
        noise is that of evaluation mode, also in training mode.
        """
        if ar_model is not None:
            check_model(ar_model)
        with torch.no_grad():  # `decode` has no gradient
            scores = self.saliency_estimator(tokens)
            # The method of the base class has the noise of `seed` in both modes.
            merge = paper.DifferentiableTokenMerging.merge
            merged = merge(self.token_merger, tokens, scores, K).tokens
            return merged, [] if ar_model is None else decode(merged, ar_model)
