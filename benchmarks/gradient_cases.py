"""What benchmarks/gradients.py differentiates: inputs, ours, plain formulas."""

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
TOLERANCE = 5e-3  # of gradients in float32, over their largest
# The same where an input has 16 bits: 0.07 was seen in bfloat16, whose 8 bits round the
# merged tokens and their slopes on the way. Exact comparisons are those of the tests.
HALF_TOLERANCE = 2**-3

Loss = Callable[..., Any]


class Case(NamedTuple):
    """A function of tensors that require grad, in our form and in the plain one."""

    inputs: tuple[Any, ...]
    ours: Loss
    plain: Loss


# -------------------------------------------------------------- the plain formulas


def entropy(scores: Any) -> Any:
    log_attention = torch.log_softmax(scores.float(), dim=-1)
    return -(log_attention.exp() * log_attention).sum(dim=-1)


def self_attention(x: Any) -> Any:
    return entropy(x @ x.mT / x.shape[-1] ** 0.5)


def query_key(query: Any, key: Any) -> Any:
    return entropy(query @ key.mT / query.shape[-1] ** 0.5)


def given_attention(attention: Any) -> Any:
    p = attention.float()
    p = p / p.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1)


def mass(found: Any, noise: Any) -> Any:
    # `aminmax` has no derivative in torch 2.11.
    low, high = (f(found, dim=-1, keepdim=True) for f in (torch.amin, torch.amax))
    saliency = 1 - (found - low) / (high - low)
    chosen = torch.softmax((saliency + noise) / TAU, dim=-1)
    return chosen * saliency + (1 - chosen) * EPSILON


def merge(x: Any, labels: Any, num_groups: int, weights: Any) -> Any:
    index = labels.long()[..., None]
    batch, _, dim = x.shape
    total = x.new_zeros(batch, num_groups, dim, dtype=torch.float32)
    weighted = x.float() * weights[..., None]
    total = total.scatter_add(1, index.expand(x.shape), weighted)
    whole = total.new_zeros(batch, num_groups, 1)
    whole = whole.scatter_add(1, index, weights[..., None])
    return (total / whole).to(x.dtype)


def unmerge(merged: Any, labels: Any) -> Any:
    index = labels.long()[..., None].expand(*labels.shape, merged.shape[-1])
    return merged.gather(1, index)


def alignment(merged: Any, prior: Any) -> Any:
    """Return the losses (B,) of an `MLPPrior`, all steps at once."""
    x = merged.float()
    steps = torch.arange(1, x.shape[1], device=x.device)[:, None]
    total = 0
    ways = (prior.forward_prior, x), (prior.backward_prior, x.flip(1))
    for network, y in ways:
        context = y.cumsum(dim=1)[:, :-1] / steps
        total = total + ((network(context) - y[:, 1:]) ** 2).mean(dim=(1, 2))
    return total


def fidelity(x: Any, merged: Any, labels: Any) -> Any:
    gap = x.float() - unmerge(merged, labels).float()
    error = (gap**2).sum(dim=(1, 2)) / (x.float() ** 2).sum(dim=(1, 2))
    return (error - (1 - GAMMA) ** 2).clamp_min(0).mean()


# ------------------------------------------------------------------------- cases


def our_mass(found: Any) -> Any:
    saliency = qm.saliency(found)
    chosen = qm.gumbel_softmax(saliency, temperature=TAU)
    return qm.saliency_mass(saliency, chosen, epsilon=EPSILON)


def half_dtype() -> Any:
    """Return bfloat16, or float16 where CuPy has no bfloat16."""
    return torch.bfloat16 if importlib.util.find_spec("ml_dtypes") else torch.float16


class Inputs:
    """What the operations of one size take, K = N / 4, made when first asked for."""

    def __init__(self, machine: Machine, batch: int, num_tokens: int, dim: int) -> None:
        self.sizes = batch, num_tokens, dim
        self.num_groups = num_tokens // 4
        self.device = "cuda" if machine.gpu else "cpu"
        self.dtype = half_dtype() if machine.gpu else torch.float32
        self.random = torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int) -> Any:
        where = {"device": self.device, "dtype": self.dtype, "generator": self.random}
        return torch.randn(shape, **where).requires_grad_()

    @functools.cached_property
    def x(self) -> Any:
        """Return tokens small enough that no row of attention is all on its diagonal.

        Where it is, the plain formula loses the entropy to rounding.
        """
        return (0.3 * self.draw(*self.sizes).detach()).requires_grad_()

    @functools.cached_property
    def values(self) -> Any:
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
        return torch.from_numpy(qm.gumbel_noise(self.sizes[:2], 0)).to(self.device)

    @functools.cached_property
    def model(self) -> Any:
        return qt.QuickMergePP(self.sizes[-1]).to(self.device)

    @property
    def trained(self) -> tuple[Any, ...]:
        return tuple(self.model.ar_alignment.prior.parameters())


def of_given_attention(given: Inputs) -> Case:
    batch, num_tokens, _ = given.sizes
    attention = torch.softmax(given.draw(batch, num_tokens, num_tokens).detach(), -1)
    inputs = (attention.requires_grad_(),)
    return Case(inputs, qm.attention_entropy, given_attention)


def of_query_key(given: Inputs) -> Case:
    batch, num_tokens, _ = given.sizes
    heads = tuple(given.draw(1, batch, 4, num_tokens, 64) for _ in range(2))
    return Case(heads, qm.query_key_entropy, query_key)


def of_self_attention(given: Inputs) -> Case:
    return Case((given.x,), qm.self_attention_entropy, self_attention)


def of_mass(given: Inputs) -> Case:
    return Case((given.values,), our_mass, lambda y: mass(y, given.noise))


def of_merge(given: Inputs) -> Case:
    labels, num_groups = given.labels, given.num_groups
    return Case(
        (given.x, given.weights),
        lambda x, m: qm.merge_tokens(x, labels, num_groups, mass=m),
        lambda x, m: merge(x, labels, num_groups, m),
    )


def of_unmerge(given: Inputs) -> Case:
    labels = given.labels
    return Case(
        (given.merged,),
        lambda y: qm.unmerge_tokens(y, labels),
        lambda y: unmerge(y, labels),
    )


def of_alignment(given: Inputs) -> Case:
    prior = given.model.ar_alignment.prior
    return Case(
        (given.merged, *given.trained),
        lambda y, *_: qm.alignment_loss(y, prior).total,
        lambda y, *_: alignment(y, prior),
    )


def of_fidelity(given: Inputs) -> Case:
    labels = given.labels
    # The gradient at the means themselves is 0, and its rounding nothing to compare.
    merged = (1.25 * given.merged.detach()).requires_grad_()
    return Case(
        (given.x, merged),
        lambda x, y: qm.fidelity_loss(x, y, labels=labels, gamma=GAMMA),
        lambda x, y: fidelity(x, y, labels),
    )


def of_whole(given: Inputs) -> Case:
    model, num_groups, noise = given.model, given.num_groups, given.noise

    def whole(x: Any, *_: Any) -> Any:
        return model(x, num_groups, ALPHA)[1]["total"]

    def plain(x: Any, *_: Any) -> Any:
        weights = mass(self_attention(x), noise)
        # Of the tokens as ours has them: in float32 a near tie may fall otherwise.
        labels = qm.cluster_tokens(x.detach().to(given.dtype), num_groups)
        # Rounded as ours are, or the losses differ by what storing them costs.
        merged = merge(x, labels, num_groups, weights).to(given.dtype)
        loss = ALPHA * alignment(merged, model.ar_alignment.prior).mean()
        return loss + fidelity(x, merged, labels)

    return Case((given.x, *given.trained), whole, plain)


CASES: dict[str, Callable[[Inputs], Case]] = {
    "attention_entropy": of_given_attention,
    "query_key_entropy": of_query_key,
    "self_attention_entropy": of_self_attention,
    "saliency, Gumbel, mass": of_mass,
    "merge_tokens": of_merge,
    "unmerge_tokens": of_unmerge,
    "alignment_loss": of_alignment,
    "fidelity_loss": of_fidelity,
    "the whole": of_whole,
}
