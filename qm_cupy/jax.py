"""Pytrees for JAX: the classes of `qm_cupy` that hold weights.

The functions need no twins: those of `qm_cupy` take tracers, and pass gradients on by
their vector–Jacobian products. Arrays that have values go straight to the library,
without a copy. Under `jax.jit` and `jax.vmap` the library is called back when they have
some, on the CPU (`jax.vmap`: for one example after the other, each of which counts as
sequence 0 to `gumbel_noise`). Seeds, counts that the shape of a result depends on, and
all other options must be known while tracing; settings such as `use_kernels` are those
of the time of tracing. Each function can be differentiated once, in reverse mode.

Importing this module makes `MLPPrior` a pytree of its weights, and
`BidirectionalARAlignment` and `QuickMergePP` pytrees of their prior's.

Examples
--------
>>> import jax.numpy as jnp
>>> tokens = jnp.sin(jnp.arange(96.0)).reshape(2, 12, 4)
>>> model = QuickMergePP(embedding_dim=4)
>>> slope = jax.grad(lambda model: model(tokens, 3)[1]["total"])(model)
>>> slope.ar_alignment.prior.forward.weight_in.shape
(256, 4)
"""

from typing import Any

import jax

from .paper import BidirectionalARAlignment, QuickMergePP
from .priors.mlp_prior import MLPPrior

__all__ = ["BidirectionalARAlignment", "MLPPrior", "QuickMergePP"]


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
