"""Calls of every differentiable function, in NumPy's float64, for torch and JAX."""

from typing import Any, NamedTuple

import numpy as np

import qm_cupy as qm

RNG = np.random.default_rng(20260102)

# The public functions by their gradients; all others refuse traced arrays.
DIFFERENTIABLE = {  # a gradient flows through these
    "alignment_loss",
    "attention_entropy",
    "attention_mass",
    "attention_received",
    "fidelity_loss",
    "gumbel_softmax",
    "merge_tokens",
    "norm_saliency",
    "query_key_entropy",
    "quickmerge",
    "reconstruction_error",
    "saliency",
    "saliency_mass",
    "self_attention_entropy",
    "unmerge_tokens",
}
CONSTANT = {  # integers, or a budget: the gradient is 0
    "cluster_tokens",
    "cut_linkage",
    "group_positions",
    "group_sizes",
    "norm_budget",
    "select_tokens",
}


class Call(NamedTuple):
    """The arguments of a public function: those with gradients, and the rest."""

    function: str
    inputs: dict[str, np.ndarray]
    rest: dict[str, Any]


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def attention(*shape: int) -> np.ndarray:
    # Away from 0, where the slope of a log a is infinite.
    weights = RNG.random(shape) + 0.1
    return weights / weights.sum(axis=-1, keepdims=True)


# Padding in between, at a different token in each sequence.
MASK = np.array([[True, False, True, True, True], [True, True, True, False, True]])
LABELS = np.array([[1, -1, 0, 1, 2], [0, 1, 0, -1, 1]], np.int32)  # a group of one
COUNTS = np.array([3, 2])  # K per sequence
TOKENS = draw(2, 5, 3)

# Arrays are small, because differences need two calls for each element.
CALLS = {
    "attention_entropy": Call(
        "attention_entropy", {"attention": attention(2, 5, 5)}, {}
    ),
    "attention_entropy, heads, mask": Call(
        "attention_entropy", {"attention": attention(2, 2, 2, 5, 5)}, {"mask": MASK}
    ),
    "attention_received": Call(
        "attention_received", {"attention": attention(5, 5)}, {"causal": True}
    ),
    "attention_received, heads, mask": Call(
        "attention_received", {"attention": attention(2, 2, 2, 5, 5)}, {"mask": MASK}
    ),
    "attention_received, queries and keys": Call(
        "attention_received", {"query": draw(5, 3), "key": draw(5, 3)}, {"scale": 0.7}
    ),
    "attention_received, queries and keys, causal, mask": Call(
        "attention_received",
        {"query": draw(2, 4, 5, 3), "key": draw(2, 2, 5, 3)},  # two groups of heads
        {"causal": True, "mask": MASK},
    ),
    "query_key_entropy": Call(
        "query_key_entropy", {"query": draw(5, 3), "key": draw(5, 3)}, {"scale": 0.7}
    ),
    "query_key_entropy, causal, mask": Call(
        "query_key_entropy",
        {"query": draw(2, 4, 5, 3), "key": draw(2, 2, 5, 3)},  # two groups of heads
        {"causal": True, "mask": MASK},
    ),
    "self_attention_entropy": Call(
        "self_attention_entropy", {"tokens": TOKENS}, {"mask": MASK}
    ),
    "saliency": Call("saliency", {"entropy": draw(5)}, {"salient": "high"}),
    "saliency, layers, mask": Call(
        "saliency", {"entropy": draw(2, 2, 2, 5)}, {"mask": MASK}
    ),
    "norm_saliency": Call("norm_saliency", {"tokens": TOKENS}, {"mask": MASK}),
    "gumbel_softmax": Call(
        "gumbel_softmax",
        {"saliency": RNG.random((2, 5))},
        # The seed needs all of its 64 bits.
        {"temperature": 0.5, "seed": 2**64 - 3, "mask": MASK, "sequence_offset": 7},
    ),
    "attention_mass": Call(
        "attention_mass",
        {"received": RNG.random((2, 2, 2, 5)), "entropy": RNG.random((2, 2, 2, 5))},
        {"causal": True, "mask": MASK},
    ),
    "saliency_mass": Call(
        "saliency_mass",
        {"saliency": RNG.random(5), "probabilities": RNG.random(5)},
        {"epsilon": 0.2},
    ),
    "merge_tokens": Call(
        "merge_tokens", {"tokens": TOKENS}, {"labels": LABELS, "num_groups": 4}
    ),
    "merge_tokens, mass": Call(
        "merge_tokens",
        {"tokens": TOKENS, "mass": RNG.random((2, 5)) + 0.1},
        {"labels": LABELS, "num_groups": COUNTS},
    ),
    "unmerge_tokens": Call(
        "unmerge_tokens", {"merged": draw(2, 3, 3)}, {"labels": LABELS}
    ),
    "alignment_loss": Call(
        "alignment_loss",
        {"merged": draw(2, 3, 3)},
        {"prior": qm.MLPPrior.init(3, hidden_dim=4), "num_groups": COUNTS},
    ),
    "reconstruction_error": Call(
        "reconstruction_error",
        {"tokens": TOKENS, "merged": draw(2, 3, 3)},
        {"num_groups": COUNTS, "mask": MASK},
    ),
    "fidelity_loss": Call(
        "fidelity_loss",
        {"tokens": TOKENS, "merged": draw(2, 3, 3)},
        {"labels": LABELS, "gamma": 0.7},
    ),
    "quickmerge": Call(
        "quickmerge",
        {"tokens": TOKENS},
        {
            "budget": 2,
            "mask": MASK,
            "temperature": 1.0,
            "weights": "mass",
            "noise_seed": 0,
        },
    ),
    "quickmerge, attention": Call(
        "quickmerge",
        {"tokens": TOKENS, "query": draw(2, 2, 5, 3), "key": draw(2, 1, 5, 3)},
        {"budget": 2, "mask": MASK, "scale": 0.7},
    ),
    "quickmerge, of everything": Call(
        "quickmerge",
        {"tokens": TOKENS, "hidden_states": draw(2, 5, 3)},
        {
            "budget": COUNTS,
            "method": "nearest",
            "weights": "saliency",
            "protect": np.array([[True] + 4 * [False]] * 2),
        },
    ),
    "quickmerge, one sequence": Call(
        "quickmerge",
        {
            "tokens": draw(6, 3),
            "weights": RNG.random(6) + 0.1,
        },
        {"budget": 0.5, "method": "ward", "weighted_linkage": True},
    ),
    "quickmerge, saliency": Call(
        "quickmerge",
        {"tokens": draw(6, 3), "saliency": RNG.random(6)},
        {"budget": 0.5},
    ),
}


def flat(results: Any) -> list[Any]:
    """Return the floating-point results of a call."""
    several = results if isinstance(results, tuple) else (results,)
    return [x for x in several if "float" in str(x.dtype)]
