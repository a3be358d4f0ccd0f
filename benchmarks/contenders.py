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
    received: np.ndarray  # (B, N), attention received; see `attention_received`
    sizes: np.ndarray  # (B, N), how many tokens of the input each token holds
    num_protected: int = 0


Grouping = tuple[np.ndarray, np.ndarray]  # labels, weights
Contender = Callable[[Inside, int], Grouping]
Weights = Callable[[Inside], np.ndarray]  # (B, N) of the data of a batch


def attention_received(attention: np.ndarray) -> np.ndarray:
    """Return the attention (B, N) that tokens receive, from (B, H, N, N).

    It is the mean over heads and queries. If attention is weighted by sizes, a token of
    size n receives what n tokens would.
    """
    return attention.mean(axis=(1, 2))


# Weights of tokens. Each includes the size of the token, which is 1 before any merge.


def size(inside: Inside) -> np.ndarray:
    return inside.sizes


def saliency(inside: Inside) -> np.ndarray:
    return inside.sizes * inside.saliency


def own_saliency(inside: Inside) -> np.ndarray:
    """Return the saliency that `quickmerge` computes from the tokens alone."""
    return inside.sizes * qm.saliency(qm.self_attention_entropy(inside.tokens))


def received(inside: Inside) -> np.ndarray:
    return inside.received


def received_saliency(inside: Inside) -> np.ndarray:
    return inside.received * inside.saliency


def ours(
    method: str = "average",
    *,
    weights: Weights = size,
    mass: Weights | None = None,
    by: Weights | None = None,
    protects: bool = True,
) -> Contender:
    """Return the contender that clusters by a method of ours.

    By default it clusters the tokens, and merges them with their sizes as weights.
    `mass` weights the clustering, `weights` the merge, and `by` selects other vectors
    to cluster.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        options: dict[str, Any] = {}
        if mass:
            options["mass"] = mass(inside)
        protect = first_tokens(inside)
        if protects:
            options["protect"] = protect
        if method == "nearest":
            # The anchors are the protected tokens and the most salient other tokens.
            scores = inside.saliency + protect  # saliency is at most 1
            options["anchors"] = qm.select_tokens(scores, num_groups)
        # With order="first", the protected tokens have the labels 0, 1, ….
        labels = qm.cluster_tokens(
            by(inside) if by else inside.tokens,
            num_groups,
            method=method,  # type: ignore[arg-type]
            order="first",
            **options,
        )
        return labels, weights(inside)

    return run


def first_tokens(inside: Inside) -> np.ndarray:
    """Return True for the protected tokens, (B, N)."""
    batch, count, _ = inside.tokens.shape
    return np.tile(np.arange(count) < inside.num_protected, (batch, 1))


def quickmerge(**options: Any) -> Contender:
    """Return the contender that calls `qm.quickmerge`.

    The option ``saliency`` is a function of `Inside`. Without it, `quickmerge` computes
    the saliency from the tokens.
    """
    options = dict(options)
    source = options.pop("saliency", None)

    def run(inside: Inside, num_groups: int) -> Grouping:
        result = qm.quickmerge(
            inside.tokens,
            num_groups,
            saliency=source and source(inside),
            protect=first_tokens(inside),
            order="first",
            **options,
        )
        return result.labels, result.mass * inside.sizes

    return run
