"""Every public function with the arguments of a call, for the tests on a GPU."""

import functools
from enum import Enum

import numpy as np

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES

BATCH = 3  # sequences; no other axis has this length, so tests can find the batch axis
# 64 and 72 values are whole vectors of 16 bytes in every dtype; 1 and 37 are not.
WIDTHS = {1: 1, 33: 37, 128: 64, 257: 72}  # N -> D


class Variant(Enum):
    """The role of a result, which decides its dtype and its tolerance."""

    TOKENS = "tokens"  # in the dtype of the input
    SUMS = "sums"  # in the accumulation dtype
    INTEGERS = "integers"
    DENDROGRAM = "dendrogram"
    GRADIENT = "gradient"  # in the dtype of the argument that it belongs to
    WEIGHTS = "weights"  # of a fit, on the CPU


MERGED = {
    "tokens": Variant.TOKENS,
    "labels": Variant.INTEGERS,
    "sizes": Variant.INTEGERS,
    "positions": Variant.INTEGERS,
    "mass": Variant.SUMS,
}
METRICS = {"": "cosine", ", euclidean": "euclidean"}  # suffixes of the names of calls
PIPELINE = tuple(MERGED[field] for field in qm.Merged._fields)
# The variants of results of a call, unless it returns one array of sums.
RESULTS = {
    **dict.fromkeys(
        ["merge_tokens", "unmerge_tokens", "Merged.apply", "Merged.unmerge"],
        (Variant.TOKENS,),
    ),
    **dict.fromkeys(
        [
            "select_tokens",
            "group_sizes",
            "group_positions",
            "cut_linkage",
            "cut_linkage, max_distance",
            "cluster_tokens, ward, max_error",
            "cluster_tokens, contiguous, max_distance",
            *(f"cluster_tokens, {method}" for method in METHODS),
            *(f"cluster_tokens, {method}, euclidean" for method in METHODS),
            "cluster_tokens, steps",
            "norm_budget",
        ],
        (Variant.INTEGERS,),
    ),
    **dict.fromkeys(
        [
            *(f"linkage, {method}" for method in LINKAGES),
            *(f"linkage, {method}, euclidean" for method in LINKAGES),
        ],
        (Variant.DENDROGRAM,),
    ),
    **dict.fromkeys(
        ["alignment_loss", "alignment_loss, transformer"], 3 * (Variant.SUMS,)
    ),
    **dict.fromkeys(
        [
            "quickmerge",
            "quickmerge, mass",
            "quickmerge, attention",
            "quickmerge, query and key",
            "quickmerge, hidden states",
            "quickmerge, protected anchors",
            "quickmerge, saliency and bipartite",
            "quickmerge, contiguous",
        ],
        PIPELINE,
    ),
    "choose_merge": (*PIPELINE, Variant.SUMS, Variant.INTEGERS),
    "MLPPrior.fit": 8 * (Variant.WEIGHTS,),
    **dict.fromkeys(
        [
            "attention_entropy_vjp",
            "attention_received_vjp",
            "self_attention_entropy_vjp",
            "saliency_vjp",
            "norm_saliency_vjp",
            "gumbel_softmax_vjp",
            "unmerge_tokens_vjp",
        ],
        (Variant.GRADIENT,),
    ),
    **dict.fromkeys(
        [
            "query_key_entropy_vjp",
            "query_key_entropy_vjp, causal",
            "attention_received_vjp, queries and keys",
            "attention_received_vjp, queries and keys, causal",
            "attention_mass_vjp",
            "saliency_mass_vjp",
            "merge_tokens_vjp",
            "reconstruction_error_vjp",
            "reconstruction_error_vjp, nearest",
            "fidelity_loss_vjp",
        ],
        2 * (Variant.GRADIENT,),
    ),
    # The gradient of the tokens, and those of the four weights of two MLPs.
    "alignment_loss_vjp": (Variant.GRADIENT, *(8 * (Variant.SUMS,))),
}


def alignment_loss_vjp(forward, backward, total, **arguments):
    """Return the gradients as one flat tuple; each loss's gradient is an argument."""
    by_merged, weights = qm.alignment_loss_vjp((forward, backward, total), **arguments)
    return by_merged, *weights[0], *weights[1]


def of_attention_received_vjp(**arguments):
    """Return the gradients without None, which stands for the absent source."""
    gradients = [x for x in qm.attention_received_vjp(**arguments) if x is not None]
    return gradients[0] if len(gradients) == 1 else tuple(gradients)


def choose_merge(**arguments):
    """Return the selected merge, the scores and its index as one flat tuple."""
    choice = qm.choose_merge(**arguments)
    return *choice.merged, choice.scores, choice.best


def apply(x, merged, labels, mass):
    """Merge an array by a plan that has only what `apply` reads."""
    return qm.Merged(merged, labels, None, None, mass).apply(x)


def unmerge(merged, labels):
    """Unmerge a plan that has only what `unmerge` reads."""
    return qm.Merged(merged, labels, None, None, None).unmerge()


def decode(tokens, sizes, positions, model):
    """Decode a merge that has only what `step` reads: tokens, sizes and positions."""
    # A flat signature, because the parity tests convert arrays by argument.
    return qm.decode(qm.Merged(tokens, None, sizes, positions, None), model)


def fit(prior, **arguments):
    """Return the weights of a prior that is fitted, then refined for two steps."""
    fitted = prior.fit(steps=2, **arguments)
    return *fitted.forward, *fitted.backward


def _pipelines(tokens, num_groups, protect, mask, rng):
    """Return the calls of whole pipelines, from every source of saliency."""
    batch, num_tokens, dim = tokens.shape
    heads = rng.standard_normal((2, 2, batch, 2, num_tokens, 8))  # (2, L, B, H, N, d)
    attention = rng.random((2, batch, 2, num_tokens, num_tokens))
    common = {"tokens": tokens, "budget": num_groups, "mask": mask}
    alone = {**common, "protect": protect}
    # The candidates of `choose_merge`.
    ways = [{"method": "average"}, {"method": "single"}, {"method": "contiguous"}]
    prior = qm.MLPPrior.init(dim, hidden_dim=20, seed=1)
    return {
        "quickmerge": (qm.quickmerge, common),
        "quickmerge, mass": (
            qm.quickmerge,
            {**common, "weights": "mass", "noise_seed": 7},
        ),
        "quickmerge, attention": (qm.quickmerge, {**alone, "attention": attention}),
        "quickmerge, query and key": (
            qm.quickmerge,
            {**alone, "query": heads[0], "key": heads[1], "method": "average"},
        ),
        "quickmerge, hidden states": (
            qm.quickmerge,
            {**alone, "hidden_states": (tokens, 2 - tokens)},  # two layers
        ),
        "quickmerge, protected anchors": (
            qm.quickmerge,
            {**alone, "method": "nearest", "weights": "saliency"},
        ),
        "quickmerge, saliency and bipartite": (
            qm.quickmerge,
            {
                **{**alone, "method": "bipartite", "weights": "uniform"},
                "saliency": rng.random((batch, num_tokens)),
            },
        ),
        "quickmerge, contiguous": (qm.quickmerge, {**alone, "method": "contiguous"}),
        "choose_merge": (
            choose_merge,
            {**common, "candidates": ways, "prior": prior},
        ),
    }


def _priors(tokens, merged, num_groups, prior, transformer, rng):
    """Return the calls of priors, with random but valid sizes and positions."""
    batch, max_groups, _ = merged.shape
    sizes = rng.integers(1, 5, (batch, max_groups)).astype(np.int32)
    # The last member of each group.
    positions = np.cumsum(sizes, axis=-1, dtype=np.int32) - 1
    layout = {"sizes": sizes, "positions": positions}
    pairs = np.concatenate([tokens, 1 - tokens], axis=1)  # N >= 2, so there is a step
    learned = qm.TransformerPrior.init(
        tokens.shape[-1], hidden_dim=48, num_heads=3, num_positions=5 * max_groups
    )
    return {
        "MLPPrior.predict": (prior.predict, {"tokens": merged}),
        "MLPPrior.predict, reverse": (
            prior.predict,
            {"tokens": merged, "reverse": True, "num_groups": num_groups},
        ),
        "TransformerPrior.predict": (transformer.predict, {"tokens": merged, **layout}),
        "TransformerPrior.predict, reverse": (
            transformer.predict,
            {"tokens": merged, "reverse": True, "num_groups": num_groups},
        ),
        "MLPPrior.step": (decode, {"tokens": merged, **layout, "model": prior}),
        "TransformerPrior.step": (
            decode,
            {"tokens": merged, **layout, "model": transformer},
        ),
        "TransformerPrior.predict, learned positions": (
            learned.predict,
            {"tokens": merged, **layout},
        ),
        "TransformerPrior.step, learned positions": (
            decode,
            {"tokens": merged, **layout, "model": learned},
        ),
        "MLPPrior.fit": (fit, {"prior": prior, "sequences": pairs}),
    }


@functools.cache
def calls(num_tokens, masked=False, ragged=False):
    """Return {name: (public function, arguments of a call as NumPy arrays)}.

    With `ragged`, K differs between the sequences.
    """
    rng = np.random.default_rng(num_tokens)
    batch, dim = BATCH, WIDTHS[num_tokens]
    mask = None
    if masked:  # padding on the left, and in between
        mask = rng.random((batch, num_tokens)) < 0.7
        mask[0] = np.arange(num_tokens) >= num_tokens // 3
        # The last token is valid, so no sequence is empty.
        mask[:, -1] = True
    valid = np.full(batch, num_tokens) if mask is None else mask.sum(-1)  # (B,)
    counts = np.maximum(valid // np.array([3, 4, 5]), 1)
    max_groups = int(counts.max()) if ragged else int(counts.min())
    num_groups = counts if ragged else max_groups
    below = counts[:, None] if ragged else max_groups
    labels = rng.integers(0, below, (batch, num_tokens)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.1] = -1  # padding
    tokens = rng.standard_normal((batch, num_tokens, dim))
    merged = rng.standard_normal((batch, max_groups, dim))
    score, other, mass = rng.random((3, batch, num_tokens))  # (B, N) each
    mass[labels == 0] = 0  # group 0 has no mass, so it takes the plain mean
    shape = (2, batch, 2, num_tokens)  # (L, B, H, N)
    attention = rng.random((*shape, num_tokens))
    # Exact zeros: 0 log 0 counts as 0.
    attention[..., ::3] = 0
    query, key = rng.standard_normal((2, *shape, min(dim, 64)))
    entropy = rng.random(shape)
    by_row, by_token_score = (
        rng.standard_normal(shape),
        rng.standard_normal(score.shape),
    )
    prior = qm.MLPPrior.init(dim, hidden_dim=50)
    transformer = qm.TransformerPrior.init(dim, hidden_dim=48, num_heads=3)
    padded = {"mask": mask}
    grouped = {"labels": labels, "num_groups": num_groups}
    softmax = {"saliency": score, "seed": 7, **padded}
    protect = np.zeros((batch, num_tokens), np.bool_)
    # Only sequences of ten tokens or more have a protected token.
    protect[:, -1] = num_tokens > 9
    tree = qm.linkage(tokens, "ward", **padded)
    weighed = {"tokens": tokens, **padded}
    rebuilt = {"tokens": tokens, "merged": merged}
    if ragged:  # otherwise a token could be rebuilt from a padded group
        rebuilt["num_groups"] = num_groups
    slope, slopes = rng.standard_normal(), rng.standard_normal((3, batch))
    by_score = {"gradient": rng.standard_normal((batch, num_tokens))}
    by_token = {"gradient": rng.standard_normal(tokens.shape)}
    by_merged = {"gradient": rng.standard_normal(merged.shape)}
    return {
        "attention_entropy": (qm.attention_entropy, {"attention": attention, **padded}),
        "query_key_entropy": (
            qm.query_key_entropy,
            {"query": query, "key": key, **padded},
        ),
        "query_key_entropy, causal": (
            qm.query_key_entropy,
            {"query": query, "key": key, "causal": True, **padded},
        ),
        "attention_received": (
            qm.attention_received,
            {"attention": attention, **padded},
        ),
        "attention_received, causal": (
            qm.attention_received,
            {"attention": attention, "causal": True, **padded},
        ),
        "attention_received, queries and keys": (
            qm.attention_received,
            {"query": query, "key": key, **padded},
        ),
        "attention_received, queries and keys, causal": (
            qm.attention_received,
            {"query": query, "key": key, "causal": True, **padded},
        ),
        "self_attention_entropy": (
            qm.self_attention_entropy,
            {"tokens": tokens, **padded},
        ),
        "saliency": (qm.saliency, {"entropy": entropy, **padded}),
        "norm_saliency": (qm.norm_saliency, {"tokens": tokens, **padded}),
        "attention_entropy_vjp": (
            qm.attention_entropy_vjp,
            {"gradient": by_row, "attention": attention, **padded},
        ),
        "query_key_entropy_vjp": (
            qm.query_key_entropy_vjp,
            {"gradient": by_row, "query": query, "key": key, **padded},
        ),
        "query_key_entropy_vjp, causal": (
            qm.query_key_entropy_vjp,
            {
                **{"gradient": by_row, "query": query, "key": key},
                **{"causal": True, **padded},
            },
        ),
        "attention_received_vjp": (
            of_attention_received_vjp,
            {"gradient": by_row, "attention": attention, **padded},
        ),
        "attention_received_vjp, queries and keys": (
            of_attention_received_vjp,
            {"gradient": by_row, "query": query, "key": key, **padded},
        ),
        "attention_received_vjp, queries and keys, causal": (
            of_attention_received_vjp,
            {
                **{"gradient": by_row, "query": query, "key": key},
                **{"causal": True, **padded},
            },
        ),
        "self_attention_entropy_vjp": (
            qm.self_attention_entropy_vjp,
            {"gradient": by_token_score, "tokens": tokens, **padded},
        ),
        "saliency_vjp": (
            qm.saliency_vjp,
            {"gradient": by_token_score, "entropy": entropy, **padded},
        ),
        "norm_saliency_vjp": (
            qm.norm_saliency_vjp,
            {"gradient": by_token_score, "tokens": tokens, **padded},
        ),
        "attention_mass": (
            qm.attention_mass,
            {"received": entropy, "entropy": 2 * entropy, "causal": True, **padded},
        ),
        "attention_mass_vjp": (
            qm.attention_mass_vjp,
            {**by_score, "received": entropy, "entropy": 2 * entropy},
        ),
        "gumbel_softmax": (qm.gumbel_softmax, softmax),
        "gumbel_softmax, hard": (qm.gumbel_softmax, {**softmax, "hard": num_groups}),
        "saliency_mass": (
            qm.saliency_mass,
            {"saliency": score, "probabilities": other},
        ),
        "select_tokens": (
            qm.select_tokens,
            {"scores": score, "num_groups": num_groups, **padded},
        ),
        "cosine_similarity": (qm.cosine_similarity, {"tokens": tokens}),
        **{
            f"linkage, {method}{suffix}": (
                qm.linkage,
                {
                    **{"method": method, "metric": metric},
                    **weighed,
                    **({"mass": other} if method in ("average", "ward") else {}),
                },
            )
            for method in LINKAGES
            for suffix, metric in METRICS.items()
        },
        "cut_linkage": (
            qm.cut_linkage,
            {"dendrogram": tree, "num_groups": num_groups, **padded},
        ),
        "cut_linkage, max_distance": (
            qm.cut_linkage,
            {"dendrogram": tree, "max_distance": 0.6, **padded},
        ),
        "cluster_tokens, ward, max_error": (
            qm.cluster_tokens,
            {
                **{"tokens": tokens, "max_error": 0.3, "method": "ward"},
                **{"protect": protect, **weighed},
            },
        ),
        "cluster_tokens, contiguous, max_distance": (
            qm.cluster_tokens,
            {
                **{"tokens": tokens, "max_distance": 0.9, "method": "contiguous"},
                **{"protect": protect, **padded},
            },
        ),
        **{
            f"cluster_tokens, {method}{suffix}": (
                qm.cluster_tokens,
                {
                    "tokens": tokens,
                    "num_groups": num_groups,
                    "method": method,
                    "metric": metric,
                    "protect": protect,
                    **padded,
                },
            )
            for method in METHODS
            for suffix, metric in METRICS.items()
        },
        "cluster_tokens, steps": (
            qm.cluster_tokens,
            {
                **{"tokens": tokens, "num_groups": num_groups},
                **{"method": "bipartite", "step": 3, **padded},
            },
        ),
        "merge_tokens": (qm.merge_tokens, {"tokens": tokens, **grouped, "mass": mass}),
        "unmerge_tokens": (qm.unmerge_tokens, {"merged": merged, "labels": labels}),
        "Merged.apply": (
            apply,
            {"x": key[0], "merged": merged, "labels": labels, "mass": mass},  # heads
        ),
        "Merged.unmerge": (unmerge, {"merged": merged, "labels": labels}),
        "group_sizes": (qm.group_sizes, grouped),
        "group_positions": (qm.group_positions, grouped),
        "alignment_loss": (
            qm.alignment_loss,
            {"merged": merged, "prior": prior, "num_groups": num_groups},
        ),
        "alignment_loss, transformer": (
            qm.alignment_loss,
            {"merged": merged, "prior": transformer, "num_groups": num_groups},
        ),
        "norm_mass": (
            qm.norm_mass,
            {"tokens": tokens, "num_groups": num_groups, **padded},
        ),
        "reconstruction_error": (
            qm.reconstruction_error,
            {**rebuilt, "labels": labels, **padded},
        ),
        "reconstruction_error, nearest": (
            qm.reconstruction_error,
            {**rebuilt, **padded},
        ),
        "fidelity_loss": (qm.fidelity_loss, {**rebuilt, "labels": labels, **padded}),
        "norm_budget": (qm.norm_budget, weighed),
        **_pipelines(tokens, num_groups, protect, mask, rng),
        **_priors(tokens, merged, num_groups, prior, transformer, rng),
        "gumbel_softmax_vjp": (qm.gumbel_softmax_vjp, {**by_score, **softmax}),
        "saliency_mass_vjp": (
            qm.saliency_mass_vjp,
            {**by_score, "saliency": score, "probabilities": other},
        ),
        "merge_tokens_vjp": (
            qm.merge_tokens_vjp,
            {**by_merged, "tokens": tokens, **grouped, "mass": mass},
        ),
        "unmerge_tokens_vjp": (qm.unmerge_tokens_vjp, {**by_token, **grouped}),
        "alignment_loss_vjp": (
            alignment_loss_vjp,
            {
                **dict(zip(("forward", "backward", "total"), slopes, strict=True)),
                **{"merged": merged, "prior": prior, "num_groups": num_groups},
            },
        ),
        "reconstruction_error_vjp": (
            qm.reconstruction_error_vjp,
            {"gradient": slopes[0], **rebuilt, "labels": labels, **padded},
        ),
        "reconstruction_error_vjp, nearest": (
            qm.reconstruction_error_vjp,
            {"gradient": slopes[0], **rebuilt, **padded},
        ),
        "fidelity_loss_vjp": (
            qm.fidelity_loss_vjp,
            {"gradient": slope, **rebuilt, "labels": labels, **padded},
        ),
    }


NAMES = list(calls(1))
