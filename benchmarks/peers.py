"""What others do to a token sequence, by their formulas, and ours by the same form.

A contender takes `Inside`, what is known of a batch of sequences, and K, and gives
labels (B, N), -1 for tokens that are dropped, and the weights of the merge (B, N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2
from sklearn.cluster import AgglomerativeClustering

import qm_cupy as qm


class Inside(NamedTuple):
    """Tokens and what the layers before saw of them."""

    tokens: np.ndarray  # (B, N, D)
    key: np.ndarray  # (B, N, d), the mean over heads; the tokens, if there are none
    saliency: np.ndarray  # (B, N), 1 where attention has the least entropy
    received: np.ndarray  # (B, N), attention that a token receives from all others


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
    """Cluster by a method and merge; by default tokens, with equal weights."""

    def run(inside: Inside, num_groups: int) -> Grouping:
        options: dict[str, Any] = {}
        if mass:
            options["mass"] = mass(inside)
        if protect:
            options["protect"] = protect(inside)
        if method == "nearest":
            options["anchors"] = qm.select_tokens(inside.saliency, num_groups)
        vectors = by(inside) if by else inside.tokens
        labels = qm.cluster_tokens(vectors, num_groups, method=method, **options)
        merged = weights(inside) if weights else np.ones(labels.shape, np.float32)
        return labels, merged

    return run


def quickmerge(inside: Inside, num_groups: int) -> Grouping:
    """`qm.quickmerge` as it is called, with the layers' saliency."""
    found = qm.quickmerge(inside.tokens, num_groups, saliency=inside.saliency)
    return found.labels, found.mass


def authors(inside: Inside, num_groups: int) -> Grouping:
    """The labels of the paper's own code, by scikit-learn, in no order; its mass."""
    model = AgglomerativeClustering(num_groups, metric="cosine", linkage="average")
    labels = np.array([model.fit_predict(x) for x in inside.tokens])
    return labels, quickmerge(inside, num_groups)[1]


def uniform_chunks(inside: Inside, num_groups: int) -> Grouping:
    batch, count, _ = inside.tokens.shape
    labels = np.tile(np.arange(count) * num_groups // count, (batch, 1))
    return labels, np.ones(labels.shape, np.float32)


def kept(scores: Callable[[Inside], np.ndarray]) -> Contender:
    """Prune to the K tokens of the greatest scores."""

    def run(inside: Inside, num_groups: int) -> Grouping:
        positions = qm.select_tokens(scores(inside).astype(np.float32), num_groups)
        labels = np.full(inside.tokens.shape[:2], -1)
        np.put_along_axis(labels, positions, np.arange(num_groups), axis=1)
        return labels, np.ones(labels.shape, np.float32)

    return run


def at_random(inside: Inside) -> np.ndarray:
    return np.random.default_rng(0).random(inside.tokens.shape[:2])


def norms(inside: Inside) -> np.ndarray:
    return np.linalg.norm(inside.tokens, axis=-1)


def kmeans(inside: Inside, num_groups: int) -> Grouping:
    """SciPy's k-means++ on unit vectors: groups may be empty."""
    length = np.maximum(norms(inside)[..., None], 1e-30)
    return _kmeans(inside.tokens / length, num_groups)


def euclidean_kmeans(inside: Inside, num_groups: int) -> Grouping:
    """SciPy's k-means++ on the tokens themselves."""
    return _kmeans(inside.tokens, num_groups)


def _kmeans(vectors: np.ndarray, num_groups: int) -> Grouping:
    labels = [
        kmeans2(x.astype(float), num_groups, minit="++", iter=20, rng=0, missing="warn")
        for x in vectors
    ]
    found = np.array([of_each for _, of_each in labels])
    return found, np.ones(found.shape, np.float32)


def tome(metric: Callable[[Inside], np.ndarray]) -> Contender:
    """ToMe's bipartite soft matching [1]_, repeated in one place until K are left.

    .. [1] D. Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023,
       arXiv:2210.09461.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        found = np.array([tome_labels(m, num_groups) for m in metric(inside)])
        return found, np.ones(found.shape, np.float32)

    return run


def tome_labels(metric: np.ndarray, num_groups: int) -> np.ndarray:
    labels, sizes = np.arange(len(metric)), np.ones(len(metric))
    while len(metric) > num_groups:
        count = min(len(metric) - num_groups, len(metric) // 2)
        unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
        scores = unit[::2] @ unit[1::2].T
        chosen = np.argsort(-scores.max(axis=1), kind="stable")[:count]  # among A
        source, target = 2 * chosen, 2 * scores.argmax(axis=1)[chosen] + 1
        total = metric * sizes[:, None]
        np.add.at(total, target, total[source])
        np.add.at(sizes, target, sizes[source])
        left = np.delete(np.arange(len(metric)), source)
        place = np.empty(len(metric), int)
        place[left] = np.arange(len(left))
        place[source] = place[target]
        labels, sizes = place[labels], sizes[left]
        metric = total[left] / sizes[:, None]
    return labels
