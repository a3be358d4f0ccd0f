"""Other ways to shorten token sequences, and ours, as functions of one form.

A contender takes `Inside`, the data of a batch of sequences, and K. It returns the
labels (B, N), which are -1 for tokens that are dropped, and the weights of the merge
(B, N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2
from sklearn.cluster import AgglomerativeClustering

import qm_cupy as qm


class Inside(NamedTuple):
    """Tokens, and data from the layers that computed them."""

    tokens: np.ndarray  # (B, N, D)
    key: np.ndarray  # (B, N, d), mean of keys over heads; the tokens if there are none
    saliency: np.ndarray  # (B, N), 1 where attention has the least entropy
    received: np.ndarray  # (B, N), mean attention that a token receives


Grouping = tuple[np.ndarray, np.ndarray]  # labels, weights
Contender = Callable[[Inside, int], Grouping]


def ours(
    method: str = "average",
    *,
    weights: Callable[[Inside], np.ndarray] | None = None,
    by: Callable[[Inside], np.ndarray] | None = None,
    mass: Callable[[Inside], np.ndarray] | None = None,
    protect: Callable[[Inside], np.ndarray] | None = None,
) -> Contender:
    """Return the contender that clusters by a method of ours.

    By default it clusters the tokens, and merges them with equal weights. `by` selects
    other vectors to cluster, `mass` weights the clustering, and `weights` the merge.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        options: dict[str, Any] = {}
        if mass:
            options["mass"] = mass(inside)
        if protect:
            options["protect"] = protect(inside)
        if method == "nearest":
            # The K most salient tokens are the anchors.
            options["anchors"] = qm.select_tokens(inside.saliency, num_groups)
        vectors = by(inside) if by else inside.tokens
        labels = qm.cluster_tokens(vectors, num_groups, method=method, **options)
        merge_weights = (
            weights(inside) if weights else np.ones(labels.shape, np.float32)
        )
        return labels, merge_weights

    return run


def quickmerge(inside: Inside, num_groups: int) -> Grouping:
    """Return the result of `qm.quickmerge`, with the saliency from the layers."""
    result = qm.quickmerge(inside.tokens, num_groups, saliency=inside.saliency)
    return result.labels, result.mass


def authors(inside: Inside, num_groups: int) -> Grouping:
    """Return labels by scikit-learn, as in the paper's own code, and our mass.

    These labels are in no particular order.
    """
    model = AgglomerativeClustering(num_groups, metric="cosine", linkage="average")
    labels = np.array([model.fit_predict(x) for x in inside.tokens])
    return labels, quickmerge(inside, num_groups)[1]


def uniform_chunks(inside: Inside, num_groups: int) -> Grouping:
    """Group neighbours into K chunks of nearly equal length."""
    batch, count, _ = inside.tokens.shape
    labels = np.tile(np.arange(count) * num_groups // count, (batch, 1))
    return labels, np.ones(labels.shape, np.float32)


def keep_best(scores: Callable[[Inside], np.ndarray]) -> Contender:
    """Return the contender that keeps the K tokens with the greatest scores."""

    def run(inside: Inside, num_groups: int) -> Grouping:
        positions = qm.select_tokens(scores(inside).astype(np.float32), num_groups)
        labels = np.full(inside.tokens.shape[:2], -1)  # dropped, unless selected
        np.put_along_axis(labels, positions, np.arange(num_groups), axis=1)
        return labels, np.ones(labels.shape, np.float32)

    return run


def at_random(inside: Inside) -> np.ndarray:
    return np.random.default_rng(0).random(inside.tokens.shape[:2])


def norms(inside: Inside) -> np.ndarray:
    return np.linalg.norm(inside.tokens, axis=-1)


def kmeans(inside: Inside, num_groups: int) -> Grouping:
    """Return groups by SciPy's k-means on unit vectors, some of which may be empty."""
    length = np.maximum(norms(inside)[..., None], 1e-30)
    return _kmeans(inside.tokens / length, num_groups)


def euclidean_kmeans(inside: Inside, num_groups: int) -> Grouping:
    """Return groups by SciPy's k-means on the tokens, some of which may be empty."""
    return _kmeans(inside.tokens, num_groups)


def _kmeans(vectors: np.ndarray, num_groups: int) -> Grouping:
    results = [
        kmeans2(x.astype(float), num_groups, minit="++", iter=20, rng=0, missing="warn")
        for x in vectors
    ]
    labels = np.array([row for _, row in results])  # without the centroids
    return labels, np.ones(labels.shape, np.float32)


def tome(metric: Callable[[Inside], np.ndarray]) -> Contender:
    """Return ToMe's bipartite soft matching [1]_, repeated until K tokens are left.

    ToMe merges some tokens in every layer. Here all steps follow each other.

    .. [1] D. Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023,
       arXiv:2210.09461.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        labels = np.array([tome_labels(m, num_groups) for m in metric(inside)])
        return labels, np.ones(labels.shape, np.float32)

    return run


def tome_labels(metric: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the labels (N,) of one sequence, by the vectors `metric` (N, D)."""
    labels, sizes = np.arange(len(metric)), np.ones(len(metric))
    while len(metric) > num_groups:
        # One step merges at most half of the tokens: those of A into those of B.
        count = min(len(metric) - num_groups, len(metric) // 2)
        unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
        # A holds the tokens at even positions, B those at odd ones. Each token of A has
        # its most similar token of B, and the most similar pairs merge.
        scores = unit[::2] @ unit[1::2].T  # (A, B)
        merging = np.argsort(-scores.max(axis=1), kind="stable")[:count]  # in A
        source, target = 2 * merging, 2 * scores.argmax(axis=1)[merging] + 1
        # Means weighted by size: add the sums and the sizes.
        total = metric * sizes[:, None]
        np.add.at(total, target, total[source])
        np.add.at(sizes, target, sizes[source])
        left = np.delete(np.arange(len(metric)), source)
        new_index = np.empty(len(metric), int)
        new_index[left] = np.arange(len(left))
        new_index[source] = new_index[target]  # a merged token has its target's index
        labels, sizes = new_index[labels], sizes[left]
        metric = total[left] / sizes[:, None]
    return labels
