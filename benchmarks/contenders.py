"""Our ways to shorten token sequences, as functions of one form.

A contender takes `Inside`, the data of a batch of sequences, and K. It returns the
labels (B, N), which are -1 for tokens that are dropped, and the weights of the merge
(B, N). The first `Inside.num_protected` tokens stay tokens of their own, with labels 0,
1, …; K counts them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import qm_cupy as qm


class Inside(NamedTuple):
    """Tokens, and data from the layers that computed them."""

    tokens: np.ndarray  # (B, N, D)
    key: np.ndarray  # (B, N, d), mean of keys over heads; the tokens if there are none
    saliency: np.ndarray  # (B, N), 1 where attention has the least entropy
    entropy: np.ndarray  # (B, N), of the attention of the last layer, mean over heads
    received: np.ndarray  # (B, N), attention received; see `attention_received`
    sizes: np.ndarray  # (B, N), how many tokens of the input each token holds
    num_protected: int = 0
    attentions: tuple[np.ndarray, ...] = ()  # (B, H, N, N) of the layers so far


Grouping = tuple[np.ndarray, np.ndarray]  # labels, weights
Contender = Callable[[Inside, int], Grouping]
Weights = Callable[[Inside], np.ndarray]  # (B, N) of the data of a batch


def attention_received(attention: np.ndarray) -> np.ndarray:
    """Return the attention (B, N) that tokens receive, from (B, H, N, N).

    It is the mean over heads and queries. If attention is weighted by sizes, a token of
    size n receives what n tokens would.
    """
    return qm.attention_received(attention).mean(axis=1)


# Weights of tokens. Each includes the size of the token, which is 1 before any merge.


def size(inside: Inside) -> np.ndarray:
    return inside.sizes


def saliency(inside: Inside) -> np.ndarray:
    return inside.sizes * inside.saliency


def received(inside: Inside) -> np.ndarray:
    return inside.received


def received_saliency(inside: Inside) -> np.ndarray:
    return inside.received * inside.saliency


def focused(inside: Inside) -> np.ndarray:
    """Return attention received x exp(-entropy).

    exp(entropy) is the perplexity: how many tokens a token attends to, in effect.
    """
    return qm.attention_mass(inside.received, inside.entropy)


def squared_norms(inside: Inside) -> np.ndarray:
    return inside.sizes * np.einsum("bnd,bnd->bn", inside.tokens, inside.tokens)


def ours(
    method: str = "average",
    *,
    weights: Weights = size,
    mass: Weights | None = None,
    by: Weights | None = None,
    **options: Any,
) -> Contender:
    """Return the contender that clusters by a method of ours.

    By default it clusters the tokens, and merges them with their sizes as weights.
    `mass` weights the clustering, `weights` the merge, and `by` selects other vectors
    to cluster. Other options are those of `qm.cluster_tokens`.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        protect = first_tokens(inside)
        anchors = None
        if method == "nearest":
            # The protected tokens, and then the most salient ones: saliency is up to 1.
            anchors = qm.select_tokens(inside.saliency + protect, num_groups)
        # With order="first", the protected tokens have the labels 0, 1, ….
        labels = qm.cluster_tokens(
            by(inside) if by else inside.tokens,
            num_groups,
            method=method,
            mass=mass and mass(inside),
            anchors=anchors,
            protect=protect,
            order="first",
            **options,
        )
        return labels, weights(inside)

    return run


def first_tokens(inside: Inside) -> np.ndarray:
    """Return True for the protected tokens, (B, N)."""
    batch, count, _ = inside.tokens.shape
    return np.tile(np.arange(count) < inside.num_protected, (batch, 1))


def quickmerge(source: str = "tokens", **options: Any) -> Contender:
    """Return the contender that calls `qm.quickmerge` with a source of the saliency.

    "tokens": it gets nothing else. "attention": it gets the attention of the last
    layer. "all attentions": it gets that of the layers so far. "saliency": it gets
    `Inside.saliency`.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        sources: dict[str, Any] = {}
        if source == "attention":
            sources["attention"] = inside.attentions[-1]  # (B, H, N, N)
        if source == "all attentions":
            sources["attention"] = inside.attentions  # a tuple of layers
        if source == "saliency":
            sources["saliency"] = inside.saliency
        result = qm.quickmerge(
            inside.tokens,
            num_groups,
            protect=first_tokens(inside),
            order="first",
            **sources,
            **options,
        )
        # A token of size n already receives the attention of n tokens.
        by_attention = "attention" in sources and "weights" not in options
        return result.labels, result.mass * (1 if by_attention else inside.sizes)

    return run
