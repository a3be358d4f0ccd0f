from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import check_integer, check_number
from ..arrays.conversion import enter, on_callers_stream
from ..arrays.dtypes import accumulation_dtype
from ..cuda.launch import contiguous
from ..priors.mlp import MLP
from ..priors.mlp_prior import MLPPrior
from ..results import AlignmentLoss
from ..stages.alignment.alignment_loss import alignment_loss, alignment_loss_vjp
from ..stages.budget import norm_budget
from ..stages.clustering.cluster_tokens import cluster_tokens
from ..stages.clustering.cut_linkage import cut_linkage
from ..stages.fidelity.fidelity_loss import fidelity_loss, fidelity_loss_vjp
from ..stages.fidelity.reconstruction_error import (
    reconstruction_error,
    reconstruction_error_vjp,
)
from ..stages.merging.groups import group_positions, group_sizes
from ..stages.merging.merge_tokens import merge_tokens, merge_tokens_vjp
from ..stages.merging.unmerge_tokens import unmerge_tokens, unmerge_tokens_vjp
from ..stages.saliency.attention_entropy import attention_entropy, attention_entropy_vjp
from ..stages.saliency.norm_saliency import norm_saliency, norm_saliency_vjp
from ..stages.saliency.query_key_entropy import query_key_entropy, query_key_entropy_vjp
from ..stages.saliency.saliency import saliency, saliency_vjp
from ..stages.saliency.self_attention_entropy import (
    self_attention_entropy,
    self_attention_entropy_vjp,
)
from ..stages.selection.gumbel_softmax import gumbel_softmax, gumbel_softmax_vjp
from ..stages.selection.saliency_mass import saliency_mass, saliency_mass_vjp
from ..stages.selection.select_tokens import select_tokens

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """A function of arrays, and the gradients to some of them."""

    inputs: tuple[str, ...]
    """Arrays to which it is differentiated; "mass?" may be None."""
    constants: tuple[str, ...]
    """Arrays to which it is not."""
    options: tuple[str, ...]
    """With their types in a torch schema: "int? seed"."""
    dtype: str
    """Of the results: "int32", "stored" as the first input, "computed" in float32 at
    least, "widest" so too, but of all inputs."""
    shapes: Callable[..., tuple[Shape, ...]]
    """Returns the shapes of the results."""
    forward: Callable[..., Any]
    """Returns the result, or a tuple of them, in the caller's kind."""
    vjp: Callable[..., tuple[Any, ...]]
    """Returns the gradients to the inputs; before all else it takes the results'."""
    results: int = 1


def _by_name(
    function: Callable[..., Any], arguments: tuple[str, ...]
) -> Callable[..., Any]:
    """Let a public function take its arguments in the order of these names."""
    names = [argument.split()[-1].rstrip("?") for argument in arguments]

    def call(*values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        if "most" in given:
            counts, most = given.pop("counts"), given.pop("most")
            given["num_groups"] = most if counts is None else counts
        return function(**given)

    return call


def _no_gradient(*arguments: Any) -> tuple[Any, ...]:
    """Return the gradients of what has no inputs."""
    return ()


def _operation(
    forward: Callable[..., Any],
    vjp: Callable[..., Any] | None,
    inputs: tuple[str, ...],
    constants: tuple[str, ...],
    options: tuple[str, ...],
    dtype: str,
    shapes: Callable[..., tuple[Shape, ...]],
) -> Operation:
    """Describe an operation whose arguments have the names of the public function's."""
    arguments = inputs + constants + options
    back: Callable[..., tuple[Any, ...]] = _no_gradient
    if vjp is not None:
        call = _by_name(vjp, ("gradient", *arguments))

        def back(*values: Any) -> tuple[Any, ...]:
            found = call(*values)
            return found if isinstance(found, tuple) else (found,)

    run = _by_name(forward, arguments)
    return Operation(inputs, constants, options, dtype, shapes, run, back)


def _alike(x: Any, *others: Any) -> tuple[Shape, ...]:
    return (tuple(x.shape),)


def _rows(x: Any, *others: Any) -> tuple[Shape, ...]:
    return (tuple(x.shape[:-1]),)


def _sequences(x: Any, *others: Any) -> tuple[Shape, ...]:
    return (tuple(x.shape[:-2]),)


def _groups(labels: Any, *others: Any) -> tuple[Shape, ...]:
    return ((*labels.shape[:-1], others[-1]),)  # the last option is K


def _saliency_shape(entropy: Any, *others: Any) -> tuple[Shape, ...]:
    shape = tuple(entropy.shape)
    return (shape[1:2] + shape[-1:] if len(shape) > 2 else shape,)


def _merged_shape(tokens: Any, *others: Any) -> tuple[Shape, ...]:
    return ((*tokens.shape[:-2], others[-1], tokens.shape[-1]),)


def _unmerged_shape(merged: Any, labels: Any) -> tuple[Shape, ...]:
    return ((*labels.shape, merged.shape[-1]),)


def _tree_shape(dendrogram: Any, *others: Any) -> tuple[Shape, ...]:
    return ((*dendrogram.shape[:-2], dendrogram.shape[-2] + 1),)


def _gumbel_softmax(
    saliency: Any,
    mask: Any,
    counts: Any,
    temperature: float,
    seed: int | None,
    sequence_offset: int,
    most: int | None,
) -> Any:
    return gumbel_softmax(
        saliency,
        temperature=temperature,
        seed=_unsigned(seed),
        hard=most if counts is None else counts,
        mask=mask,
        sequence_offset=sequence_offset,
    )


def _gumbel_softmax_vjp(
    gradient: Any,
    saliency: Any,
    mask: Any,
    counts: Any,
    temperature: float,
    seed: int | None,
    sequence_offset: int,
    most: int | None,
) -> tuple[Any, ...]:
    """Return that of the soft probabilities for a hard mask too: straight through."""
    found = gumbel_softmax_vjp(
        gradient,
        saliency,
        temperature=temperature,
        seed=_unsigned(seed),
        mask=mask,
        sequence_offset=sequence_offset,
    )
    return (found,)


def _unsigned(seed: int | None) -> int | None:
    """Return a seed within 0..2⁶⁴ - 1: torch knows integers with a sign alone."""
    return None if seed is None else seed % 2**64


def _unmerge_tokens_vjp(gradient: Any, merged: Any, labels: Any) -> tuple[Any, ...]:
    return (unmerge_tokens_vjp(gradient, labels, merged.shape[-2]),)


_WEIGHTS = tuple(
    f"{direction}_{name}"
    for direction in ("forward", "backward")
    for name in MLP._fields
)


@on_callers_stream
def _alignment_loss(merged: Any, *others: Any) -> tuple[Any, Any]:
    *weights, counts, most = others
    given = most if counts is None else counts
    losses = alignment_loss(merged, _prior(weights), num_groups=given)
    return losses.forward, losses.backward


@on_callers_stream
def _alignment_loss_vjp(
    forward: Any, backward: Any, merged: Any, *others: Any
) -> tuple[Any, ...]:
    *weights, counts, most = others
    given = most if counts is None else counts
    gradient = AlignmentLoss(forward, backward, 0 * forward)
    tokens, networks = alignment_loss_vjp(
        gradient, merged, _prior(weights), num_groups=given
    )
    return (tokens, *networks[0], *networks[1])


def _prior(weights: list[Any]) -> MLPPrior:
    """Return the prior of these weights, without a copy unless they are halves."""
    _, *arrays = enter(**dict(zip(_WEIGHTS, weights, strict=True)))
    wide = [contiguous(w, accumulation_dtype(w.dtype)) for w in arrays]
    return MLPPrior(MLP(*wide[:4]), MLP(*wide[4:]))


def _losses(merged: Any, *others: Any) -> tuple[Shape, ...]:
    return (tuple(merged.shape[:-2]),) * 2


_MASK = ("mask?",)
_COUNTED = "counts?"
_NOISE = "float temperature", "int? seed", "int sequence_offset"
_K, _OPTIONAL_K = "int most", "int? most"

OPERATIONS = {
    "attention_entropy": _operation(
        attention_entropy, attention_entropy_vjp,
        ("attention",), _MASK, (), "computed", _rows,
    ),
    "query_key_entropy": _operation(
        query_key_entropy, query_key_entropy_vjp,
        ("query", "key"), _MASK, ("bool causal", "float? scale"), "computed", _rows,
    ),
    "self_attention_entropy": _operation(
        self_attention_entropy, self_attention_entropy_vjp,
        ("tokens",), _MASK, (), "computed", _rows,
    ),
    "saliency": _operation(
        saliency, saliency_vjp,
        ("entropy",), _MASK, ("str salient",), "computed", _saliency_shape,
    ),
    "norm_saliency": _operation(
        norm_saliency, norm_saliency_vjp,
        ("tokens",), _MASK, (), "computed", _rows,
    ),
    "gumbel_softmax": Operation(
        ("saliency",), ("mask?", _COUNTED), (*_NOISE, _OPTIONAL_K), "computed",
        _alike, _gumbel_softmax, _gumbel_softmax_vjp,
    ),
    "saliency_mass": _operation(
        saliency_mass, saliency_mass_vjp,
        ("saliency", "probabilities"), (), ("float epsilon",), "widest", _alike,
    ),
    "merge_tokens": _operation(
        merge_tokens, merge_tokens_vjp,
        ("tokens", "mass?"), ("labels", _COUNTED), (_K,), "stored", _merged_shape,
    ),
    "unmerge_tokens": Operation(
        ("merged",), ("labels",), (), "stored",
        _unmerged_shape, unmerge_tokens, _unmerge_tokens_vjp,
    ),
    "alignment_loss": Operation(
        ("merged", *_WEIGHTS), (_COUNTED,), (_OPTIONAL_K,), "computed",
        _losses, _alignment_loss, _alignment_loss_vjp, 2,
    ),
    "reconstruction_error": _operation(
        reconstruction_error, reconstruction_error_vjp,
        ("tokens", "merged"), ("labels?", "mask?", _COUNTED), (_OPTIONAL_K,),
        "computed", _sequences,
    ),
    "fidelity_loss": _operation(
        fidelity_loss, fidelity_loss_vjp,
        ("tokens", "merged"), ("labels?", "mask?", _COUNTED),
        ("float gamma", _OPTIONAL_K), "computed", lambda *_: ((),),
    ),
    "select_tokens": _operation(
        select_tokens, None,
        (), ("scores", "mask?", _COUNTED), (_K,), "int32", _groups,
    ),
    "norm_budget": _operation(
        norm_budget, None,
        (), ("tokens", "mask?"), ("float gamma",), "int32", _sequences,
    ),
    "cluster_tokens": _operation(
        cluster_tokens, None,
        (), ("tokens", "mass?", "anchors?", "protect?", "mask?", _COUNTED),
        ("str method", "str order", _K), "int32", _rows,
    ),
    "cut_linkage": _operation(
        cut_linkage, None,
        (), ("dendrogram", "mass?", "mask?", _COUNTED),
        ("float? max_error", "str order", _OPTIONAL_K), "int32", _tree_shape,
    ),
    "group_sizes": _operation(
        group_sizes, None, (), ("labels", _COUNTED), (_K,), "int32", _groups,
    ),
    "group_positions": _operation(
        group_positions, None, (), ("labels", _COUNTED), (_K,), "int32", _groups,
    ),
}  # fmt: skip


def check_option(declared: str, value: Any) -> Any:
    """Return an option as a Python value of the kind that is declared.

    What is one already is left alone: torch's compiler cannot follow the checks.
    """
    kind, name = declared.split()
    if value is None and kind.endswith("?"):
        return None
    if kind.startswith("int"):
        return integer(name, value)
    if kind.startswith("float") and type(value) is not float:
        return check_number(name, value, -np.inf, np.inf, "[]")
    if kind == "str" and not isinstance(value, str):
        raise TypeError(f"`{name}` must be a word, got {type(value).__name__}")
    return value


def integer(name: str, value: Any) -> int:
    """Return a Python integer, as `check_option` does."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain else check_integer(name, value)
