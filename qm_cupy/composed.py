from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays.checks import check_choice, check_shape
from .arrays.shapes import lift_source
from .pipeline import check_one_source
from .results import Merged
from .stages.budget import token_budget
from .stages.clustering.checks import check_weighted_linkage


def quickmerge(
    stages: Any,
    xp: Any,
    fresh: Callable[..., Any],
    tokens: Any,
    budget: Any,
    hidden_states: Any,
    attention: Any,
    query: Any,
    key: Any,
    saliency: Any,
    mask: Any,
    protect: Any,
    method: str,
    order: str,
    temperature: float,
    epsilon: float,
    weights: Any,
    weighted_linkage: bool,
    seed: int | None,
    sequence_offset: int,
) -> Merged[Any]:
    """Return what `qm_cupy.quickmerge` does, made of the functions of another module.

    `xp` is its array library; ``fresh(x, mask)`` copies an array into float32 at least,
    with 0 for padding.
    """
    check_weighted_linkage(weighted_linkage, method)
    check_one_source(saliency, hidden_states, attention, query, key)
    shape = tuple(tokens.shape[:-1])
    if mask is not None:
        check_shape("mask", mask, "BN", shape)
    for name, given in (("saliency", saliency), ("weights", weights)):
        if given is not None and not isinstance(given, str):
            check_shape(name, given, "BN", shape)
    num_groups = _num_groups(tokens, budget, mask)
    noise = {"seed": seed, "mask": mask, "sequence_offset": sequence_offset}
    if saliency is None:
        padding = None if mask is None else mask.reshape(-1, shape[-1])  # (B, N)
        entropy = _entropy(
            stages, tokens, hidden_states, attention, query, key, padding
        )
        scores = stages.saliency(entropy, mask=padding).reshape(shape)
    else:
        scores = fresh(saliency, mask)
    if not isinstance(weights, str):
        mass = fresh(weights, mask)
    else:
        check_choice("weights", weights, ("mass", "saliency", "uniform"))
        mass = scores if weights == "saliency" else xp.ones_like(scores)
        if weights == "mass":
            chosen = stages.gumbel_softmax(scores, temperature=temperature, **noise)
            mass = stages.saliency_mass(scores, chosen, epsilon=epsilon)
        mass = fresh(mass, mask)
    anchors = None
    if method == "nearest":
        ranked = scores
        if protect is not None:  # noise is nothing to this
            most = xp.finfo(scores.dtype).max / 2
            ranked = xp.where(protect, most, scores)
        chosen = stages.gumbel_softmax(ranked, hard=num_groups, **noise)
        anchors = stages.select_tokens(chosen, num_groups, mask=mask)
    labels = stages.cluster_tokens(
        tokens, num_groups, method=method, mass=mass if weighted_linkage else None,
        anchors=anchors, protect=protect, mask=mask, order=order,
    )  # fmt: skip
    merged = stages.merge_tokens(tokens, labels, num_groups, mass=mass)
    sizes = stages.group_sizes(labels, num_groups)
    positions = stages.group_positions(labels, num_groups)
    return Merged(merged, labels, sizes, positions, scores, mass)


def _num_groups(tokens: Any, budget: Any, mask: Any) -> Any:
    share = isinstance(budget, float | np.floating)
    sizes = tokens.shape[-2] if mask is None or not share else mask.sum(-1)
    if type(budget) is int and 1 <= budget <= sizes:
        return budget  # by a way that a compiler can follow
    return token_budget(budget, sizes)


def _entropy(
    stages: Any,
    tokens: Any,
    hidden_states: Any,
    attention: Any,
    query: Any,
    key: Any,
    mask: Any,
) -> Any:
    """Return entropy with a batch axis, by default of the tokens."""
    if attention is not None:
        lifted = lift_source("attention", attention, tokens)
        return stages.attention_entropy(lifted, mask=mask)
    if query is not None and key is not None:
        both = lift_source("query", query, tokens), lift_source("key", key, tokens)
        return stages.query_key_entropy(*both, mask=mask)
    x = tokens if hidden_states is None else hidden_states
    lifted = lift_source("hidden_states", x, tokens)
    return stages.self_attention_entropy(lifted, mask=mask)


def merged_and_losses(
    model: Any, tokens: Any, num_groups: Any, alpha: float, mask: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the merged tokens and the losses of a `QuickMergePP`, as arrays."""
    scores = model.saliency_estimator(tokens, mask=mask)
    merged = model.token_merger.merge(tokens, scores, num_groups, mask=mask)
    alignment = model.ar_alignment.compute_alignment_loss(
        merged.tokens, num_groups=num_groups
    )
    fidelity = model.fidelity_constraint.compute_fidelity_loss(
        tokens, merged.tokens, labels=merged.labels, mask=mask
    )
    losses = {
        "ar_alignment": alignment,
        "fidelity": fidelity,
        "total": alpha * alignment + fidelity,
    }
    return merged.tokens, losses
