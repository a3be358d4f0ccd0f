"""Pytrees for JAX: `MLPPrior` and the classes of the paper.

Most functions of `qm_cupy` accept tracers, so this module has no functions of its own.
JAX computes gradients with the vector–Jacobian product of each function. Arrays whose
values are known are passed to the library directly, without a copy. Under `jax.jit` and
`jax.vmap`, JAX copies the values to the CPU as soon as they are known, and the library
computes there with NumPy. `jax.vmap` calls the library once for each index of the
mapped axis. Each of these calls counts its sequences from the start again, so every
index gets the same Gumbel noise.

Seeds, counts that determine the shape of a result, and all other options must be known
while tracing. Settings such as `use_kernels` have the values that were set during
tracing. Each function can be differentiated once, in reverse mode.

Importing this module makes `MLPPrior` a pytree of its weights. It makes
`BidirectionalARAlignment` and `QuickMergePP` pytrees of the weights of their prior, and
the other classes of the paper pytrees without weights. Options are part of the
structure of a tree: trees of equal classes and options have equal structures.

A function of JAX has no hidden state, so `QuickMergePP` draws the noise of its `seed`
in each call, also while it is trained. A seed is an option: a model with another seed
compiles the function again.

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

from .paper import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    NormBasedFidelityConstraint,
    QuickMergePP,
)
from .priors.mlp_prior import MLPPrior

__all__ = [
    "BidirectionalARAlignment",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "MLPPrior",
    "NormBasedFidelityConstraint",
    "QuickMergePP",
]


def _register(cls: type, *leaves: str) -> None:
    """Register a class as a pytree whose children are the attributes `leaves`.

    The other attributes are numbers and words. They are static: they are part of the
    structure of the tree.
    """

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        # JAX compares `rest` to decide whether two trees have the same structure.
        rest = {name: y for name, y in vars(x).items() if name not in leaves}
        return tuple(getattr(x, name) for name in leaves), tuple(rest.items())

    def unflatten(rest: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        # Do not call `__init__`, because JAX also passes placeholders instead of
        # weights.
        made: Any = object.__new__(cls)
        vars(made).update(rest, **dict(zip(leaves, children, strict=True)))
        return made

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def _unflatten_prior(_: None, networks: Any) -> MLPPrior:
    # Do not call `__init__`: its checks would refuse the placeholders of JAX, and
    # gradients that are not finite. Methods check JAX arrays when they read them.
    made: MLPPrior = object.__new__(MLPPrior)
    forward, backward = networks
    vars(made).update(forward=forward, backward=backward, _copies={})
    return made


# An MLPPrior has two `MLP`, which are tuples of arrays. `_register` does not fit it,
# because its third attribute, the copies of the weights on GPUs, must not be part of
# the tree.
jax.tree_util.register_pytree_node(
    MLPPrior,
    lambda prior: ((prior.forward, prior.backward), None),
    _unflatten_prior,
)
# Only the prior has weights. The classes without weights are trees without leaves, so
# that JAX compares their options and not their identity.
_register(EntropyAwareSaliency)
_register(DifferentiableTokenMerging)
_register(BidirectionalARAlignment, "prior")
_register(NormBasedFidelityConstraint)
_register(
    QuickMergePP,
    "saliency_estimator",
    "token_merger",
    "ar_alignment",
    "fidelity_constraint",
)
