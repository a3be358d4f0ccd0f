"""Modules for torch: the classes of `qm_cupy` whose weights torch trains.

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
from .priors import mlp_prior
from .priors.mlp import MLP
from .priors.weight_checks import check_networks
from .results import Merged
from .stages.alignment.alignment_loss import AlignmentLoss, alignment_loss
from .stages.alignment.decode import decode
from .stages.alignment.models import check_model, check_prior
from .stages.clustering.cluster_tokens import Method
from .stages.clustering.labels import Order

__all__ = ["BidirectionalARAlignment", "MLPPrior", "QuickMergePP"]


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


class BidirectionalARAlignment(nn.Module):
    """`qm_cupy.BidirectionalARAlignment` with a prior that torch trains.

    A call returns `compute_alignment_loss`.
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
        check_prior(prior)
        self.prior = prior

    def forward_loss(self, merged: Tensor, *, num_groups: Any = None) -> Tensor:
        """Return the left-to-right loss, the mean over the batch."""
        return paper.mean_alignment_loss(merged, self.prior, num_groups, "forward")

    def backward_loss(self, merged: Tensor, *, num_groups: Any = None) -> Tensor:
        """Return the right-to-left loss, the mean over the batch."""
        return paper.mean_alignment_loss(merged, self.prior, num_groups, "backward")

    def compute_alignment_loss(
        self, merged: Tensor, *, num_groups: Any = None
    ) -> Tensor:
        """Return the sum of both losses, the mean over the batch."""
        return paper.mean_alignment_loss(merged, self.prior, num_groups, "total")

    forward = compute_alignment_loss  # torch calls `forward` for a call of the module


def _unchanged(loss: Tensor) -> Tensor:
    """Return a loss unchanged, where `qm_cupy.QuickMergePP` converts it to a float."""
    return loss


class QuickMergePP(nn.Module):
    """`qm_cupy.QuickMergePP` as a torch module whose losses are tensors.

    Its parameters are those of the prior. The losses are differentiable with respect to
    these parameters and to the tokens.

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
        self.saliency_estimator = paper.EntropyAwareSaliency(embedding_dim, num_layers)
        self.token_merger = paper.DifferentiableTokenMerging(
            temperature, epsilon, method=method, order=order, seed=seed
        )
        # The only submodule: the other steps have no weights, so they are plain
        # objects.
        self.ar_alignment = BidirectionalARAlignment(embedding_dim, seed=seed or 0)
        self.fidelity_constraint = paper.NormBasedFidelityConstraint(gamma)

    def forward(
        self, tokens: Tensor, K: Any, alpha: float = 0.1, *, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Merge tokens to K; total loss = alpha · alignment + fidelity."""
        return paper.merge_with_losses(self, tokens, K, alpha, mask, _unchanged)

    def inference(
        self, tokens: Tensor, K: int, ar_model: Callable[[Any], Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Return merged tokens (B, K, D) and a model's predictions (B, K, E).

        For one sequence the axis B is absent. E is the width of a prediction. The model
        reads the merged tokens. Without a model the predictions are an empty list.
        """
        if ar_model is not None:
            check_model(ar_model)
        with torch.no_grad():  # `decode` has no gradient
            scores = self.saliency_estimator(tokens)
            merged = self.token_merger.merge(tokens, scores, K).tokens
            return merged, [] if ar_model is None else decode(merged, ar_model)
