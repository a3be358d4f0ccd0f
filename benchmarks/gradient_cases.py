"""Cases of benchmarks/gradients.py: inputs, our functions and the plain formulas."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from machine import Machine, torch_or_none

import qm_cupy as qm

torch = torch_or_none()
if torch is None:
    qt = None
else:
    import qm_cupy.torch as qt

TAU, EPSILON, GAMMA, ALPHA = 0.1, 0.01, 0.8, 0.1
TOLERANCE = 5e-3  # largest error of float32 gradients / largest gradient
# The same for inputs of 16 bits. An error of 0.07 was seen in bfloat16, whose 8 bits
# round the merged tokens and their gradients on the way. Exact comparisons are in the
# tests.
HALF_TOLERANCE = 2**-3

Loss = Callable[..., Any]


class Case(NamedTuple):
    """One function of tensors that require grad: our form and the plain formula."""

    inputs: tuple[Any, ...]
    ours: Loss
    plain: Loss


# -------------------------------------------------------------- the plain formulas


def entropy(scores: Any) -> Any:
    """Return H_i = -Σ_j A_ij log A_ij, where A is the softmax of the scores."""
    log_attention = torch.log_softmax(scores.float(), dim=-1)
    return -(log_attention.exp() * log_attention).sum(dim=-1)


def self_attention(x: Any) -> Any:
    return entropy(x @ x.mT / x.shape[-1] ** 0.5)


def query_key(query: Any, key: Any) -> Any:
    return entropy(query @ key.mT / query.shape[-1] ** 0.5)


def given_attention(attention: Any) -> Any:
    """Return the entropy of each row of given probabilities."""
    p = attention.float()
    # Rows of 16 bits do not sum to 1 exactly.
    p = p / p.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1)


def received(query: Any, key: Any) -> Any:
    """Return the mean attention that each key gets from the queries."""
    scores = (query @ key.mT / query.shape[-1] ** 0.5).float()
    return torch.softmax(scores, dim=-1).mean(dim=-2)


def mass(values: Any, noise: Any) -> Any:
    """Return the mass m = π s + (1 - π) ε of entropies (B, N)."""
    # Two calls, because `aminmax` has no derivative in torch 2.11.
    low, high = (f(values, dim=-1, keepdim=True) for f in (torch.amin, torch.amax))
    saliency = 1 - (values - low) / (high - low)
    probabilities = torch.softmax((saliency + noise) / TAU, dim=-1)
    return probabilities * saliency + (1 - probabilities) * EPSILON


def merge(x: Any, labels: Any, num_groups: int, weights: Any) -> Any:
    """Return the weighted means of the groups, Σ m_j x_j / Σ m_j."""
    index = labels.long()[..., None]  # (B, N, 1)
    batch, _, dim = x.shape
    total = x.new_zeros(batch, num_groups, dim, dtype=torch.float32)
    weighted = x.float() * weights[..., None]
    total = total.scatter_add(1, index.expand(x.shape), weighted)
    whole = total.new_zeros(batch, num_groups, 1)
    whole = whole.scatter_add(1, index, weights[..., None])  # Σ m_j, (B, K, 1)
    return (total / whole).to(x.dtype)


def unmerge(merged: Any, labels: Any) -> Any:
    index = labels.long()[..., None].expand(*labels.shape, merged.shape[-1])
    return merged.gather(1, index)


def alignment(merged: Any, prior: Any) -> Any:
    """Return the alignment losses (B,) of an `MLPPrior`, all steps at once."""
    x = merged.float()
    steps = torch.arange(1, x.shape[1], device=x.device)[:, None]
    total = 0
    # The backward loss is the forward loss of the reversed sequence.
    ways = (prior.forward_prior, x), (prior.backward_prior, x.flip(1))
    for network, y in ways:
        # Means of all prefixes by a running sum: row t holds the mean of y_1..y_t.
        context = y.cumsum(dim=1)[:, :-1] / steps
        total = total + ((network(context) - y[:, 1:]) ** 2).mean(dim=(1, 2))
    return total


def fidelity(x: Any, merged: Any, labels: Any) -> Any:
    """Return the mean over sequences of max(0, |X - X̂|² / |X|² - (1 - γ)²)."""
    gap = x.float() - unmerge(merged, labels).float()
    error = (gap**2).sum(dim=(1, 2)) / (x.float() ** 2).sum(dim=(1, 2))
    return (error - (1 - GAMMA) ** 2).clamp_min(0).mean()


# ------------------------------------------------------------------------- cases


def our_mass(values: Any) -> Any:
    """Return the mass of entropies (B, N) by our functions, with noise of seed 0."""
    saliency = qm.saliency(values)
    probabilities = qm.gumbel_softmax(saliency, temperature=TAU, seed=0)
    return qm.saliency_mass(saliency, probabilities, epsilon=EPSILON)


def half_dtype() -> Any:
    """Return bfloat16, or float16 where CuPy has no bfloat16."""
    return torch.bfloat16 if importlib.util.find_spec("ml_dtypes") else torch.float16


class Inputs:
    """Inputs of the operations at one size, with K = N / 4; made when first used."""

    def __init__(self, machine: Machine, batch: int, num_tokens: int, dim: int) -> None:
        self.sizes = batch, num_tokens, dim
        self.num_groups = num_tokens // 4
        self.device = "cuda" if machine.gpu else "cpu"
        self.dtype = half_dtype() if machine.gpu else torch.float32
        self.random = torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int) -> Any:
        """Return a normal tensor that requires grad."""
        where = {"device": self.device, "dtype": self.dtype, "generator": self.random}
        return torch.randn(shape, **where).requires_grad_()

    @functools.cached_property
    def x(self) -> Any:
        """Return tokens so small that no row of attention is all on its diagonal.

        In such a row, the plain formula loses the entropy to rounding.
        """
        return (0.3 * self.draw(*self.sizes).detach()).requires_grad_()

    @functools.cached_property
    def values(self) -> Any:
        """Return the entropies (B, N) of the tokens."""
        return qm.self_attention_entropy(self.x.detach()).requires_grad_()

    @functools.cached_property
    def weights(self) -> Any:
        return our_mass(self.values.detach()).requires_grad_()

    @functools.cached_property
    def labels(self) -> Any:
        return qm.cluster_tokens(self.x, self.num_groups)

    @functools.cached_property
    def merged(self) -> Any:
        x = self.x.detach()
        return qm.merge_tokens(x, self.labels, self.num_groups).requires_grad_()

    @functools.cached_property
    def noise(self) -> Any:
        """Return the noise that our functions draw for seed 0, for the plain form."""
        return torch.from_numpy(qm.gumbel_noise(self.sizes[:2], 0)).to(self.device)

    @functools.cached_property
    def model(self) -> Any:
        # In evaluation mode, each call has the same noise.
        return qt.QuickMergePP(self.sizes[-1]).to(self.device).eval()

    @property
    def trained(self) -> tuple[Any, ...]:
        """Return the weights of the model's prior."""
        return tuple(self.model.ar_alignment.prior.parameters())


def of_given_attention(inputs: Inputs) -> Case:
    batch, num_tokens, _ = inputs.sizes
    attention = torch.softmax(inputs.draw(batch, num_tokens, num_tokens).detach(), -1)
    tensors = (attention.requires_grad_(),)
    return Case(tensors, qm.attention_entropy, given_attention)


def heads_of(inputs: Inputs) -> tuple[Any, ...]:
    """Return queries and keys: one layer, 4 heads of width 64."""
    batch, num_tokens, _ = inputs.sizes
    return tuple(inputs.draw(batch, 4, num_tokens, 64) for _ in range(2))


def of_query_key(inputs: Inputs) -> Case:
    return Case(heads_of(inputs), qm.query_key_entropy, query_key)


def of_received(inputs: Inputs) -> Case:
    return Case(
        heads_of(inputs),
        lambda query, key: qm.attention_received(query=query, key=key),
        received,
    )


def of_self_attention(inputs: Inputs) -> Case:
    return Case((inputs.x,), qm.self_attention_entropy, self_attention)


def of_mass(inputs: Inputs) -> Case:
    return Case((inputs.values,), our_mass, lambda y: mass(y, inputs.noise))


def of_merge(inputs: Inputs) -> Case:
    labels, num_groups = inputs.labels, inputs.num_groups
    return Case(
        (inputs.x, inputs.weights),
        lambda x, m: qm.merge_tokens(x, labels, num_groups, mass=m),
        lambda x, m: merge(x, labels, num_groups, m),
    )


def of_unmerge(inputs: Inputs) -> Case:
    labels = inputs.labels
    return Case(
        (inputs.merged,),
        lambda y: qm.unmerge_tokens(y, labels),
        lambda y: unmerge(y, labels),
    )


def of_alignment(inputs: Inputs) -> Case:
    prior = inputs.model.ar_alignment.prior
    # The weights are inputs as well, so that their gradients are compared too. Both
    # forms read them through the prior and ignore the arguments.
    return Case(
        (inputs.merged, *inputs.trained),
        lambda y, *_: qm.alignment_loss(y, prior).total,
        lambda y, *_: alignment(y, prior),
    )


def of_fidelity(inputs: Inputs) -> Case:
    labels = inputs.labels
    # At the means themselves the gradient is 0, and only rounding would be compared.
    merged = (1.25 * inputs.merged.detach()).requires_grad_()
    return Case(
        (inputs.x, merged),
        lambda x, y: qm.fidelity_loss(x, y, labels=labels, gamma=GAMMA),
        lambda x, y: fidelity(x, y, labels),
    )


def of_whole(inputs: Inputs) -> Case:
    model, num_groups, noise = inputs.model, inputs.num_groups, inputs.noise

    def whole(x: Any, *_: Any) -> Any:
        return model(x, num_groups, ALPHA)[1]["total"]

    def plain(x: Any, *_: Any) -> Any:
        weights = mass(self_attention(x), noise)
        # Cluster the tokens in our dtype: in float32, near ties can merge differently.
        labels = qm.cluster_tokens(x.detach().to(inputs.dtype), num_groups)
        # Round the merged tokens as ours are rounded, or the losses would differ.
        merged = merge(x, labels, num_groups, weights).to(inputs.dtype)
        loss = ALPHA * alignment(merged, model.ar_alignment.prior).mean()
        return loss + fidelity(x, merged, labels)

    return Case((inputs.x, *inputs.trained), whole, plain)


CASES: dict[str, Callable[[Inputs], Case]] = {
    "attention_entropy": of_given_attention,
    "query_key_entropy": of_query_key,
    "attention_received": of_received,
    "self_attention_entropy": of_self_attention,
    "saliency, Gumbel, mass": of_mass,
    "merge_tokens": of_merge,
    "unmerge_tokens": of_unmerge,
    "alignment_loss": of_alignment,
    "fidelity_loss": of_fidelity,
    "the whole": of_whole,
}
