"""Other ways to shorten token sequences, as functions of the form in contenders.py.

ToMe and k-means by scikit-learn, chunks and pruning. packages.py has the peers that are
packages of their own.
"""

from collections.abc import Callable

import numpy as np
from contenders import Contender, Grouping, Inside, Weights, size
from sklearn.cluster import AgglomerativeClustering, KMeans

import qm_cupy as qm


def free(function: Callable[[Inside, int], np.ndarray]) -> Contender:
    """Return the contender that groups the tokens that are not protected.

    `function` returns labels (B, N - P) for these tokens, in K - P groups.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        p = inside.num_protected
        rest = Inside(*(x[:, p:] for x in inside[:6]))  # without attentions
        labels = function(rest, num_groups - p)
        labels = np.where(labels < 0, -1, labels + p)
        own = np.broadcast_to(np.arange(p), (len(labels), p))
        return np.concatenate([own, labels], axis=1), size(inside)

    return run


def not_protected(contender: Contender) -> Contender:
    """Return the contender that merges or drops protected tokens like all others."""
    return lambda inside, num_groups: contender(
        inside._replace(num_protected=0), num_groups
    )


@free
def authors(inside: Inside, num_groups: int) -> np.ndarray:
    """Return labels by scikit-learn's average linkage, as in the paper's own code."""
    model = AgglomerativeClustering(num_groups, metric="cosine", linkage="average")
    return np.array([model.fit_predict(x) for x in inside.tokens])


@free
def uniform_chunks(inside: Inside, num_groups: int) -> np.ndarray:
    """Group neighbours into K chunks of nearly equal length."""
    batch, count, _ = inside.tokens.shape
    return np.tile(np.arange(count) * num_groups // count, (batch, 1))


def keep_best(scores: Weights) -> Contender:
    """Return the contender that keeps the K tokens with the greatest scores."""

    @free
    def run(inside: Inside, num_groups: int) -> np.ndarray:
        positions = qm.select_tokens(scores(inside).astype(np.float32), num_groups)
        labels = np.full(inside.tokens.shape[:2], -1)  # dropped, unless selected
        np.put_along_axis(labels, positions, np.arange(num_groups), axis=1)
        return labels

    return run


def at_random(inside: Inside) -> np.ndarray:
    return np.random.default_rng(0).random(inside.tokens.shape[:2])


def norms(inside: Inside) -> np.ndarray:
    return np.linalg.norm(inside.tokens, axis=-1)


def kmeans(weights: Weights = size, unit: bool = False, restarts: int = 4) -> Contender:
    """Return k-means by scikit-learn: the best of some restarts, until convergence.

    `weights` are those of the tokens in k-means, and in the merge. With `unit`, k-means
    gets unit vectors.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        sample_weight = weights(inside)

        @free
        def group(rest: Inside, num_groups: int) -> np.ndarray:
            vectors = rest.tokens
            if unit:
                vectors = vectors / np.maximum(norms(rest)[..., None], 1e-30)
            model = KMeans(num_groups, n_init=restarts, max_iter=1000, random_state=0)
            rows = zip(vectors, weights(rest), strict=True)
            return np.array([model.fit(x, sample_weight=w).labels_ for x, w in rows])

        return group(inside, num_groups)[0], sample_weight

    return run


def tome(metric: Weights, step: int | None = None) -> Contender:
    """Return ToMe's bipartite soft matching [1]_, repeated until K tokens are left.

    A step merges `step` tokens, or as many as ToMe allows. The protected tokens are
    ToMe's class and distillation tokens, so there are two of them, or none.

    .. [1] D. Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023,
       arXiv:2210.09461.
    """

    def run(inside: Inside, num_groups: int) -> Grouping:
        vectors, sizes = metric(inside), inside.sizes
        labels = np.broadcast_to(np.arange(vectors.shape[1]), vectors.shape[:2])
        while vectors.shape[1] > num_groups:
            r = min(vectors.shape[1] - num_groups, step or vectors.shape[1])
            new, count = tome_step(vectors, r, inside.num_protected > 0)
            # Means weighted by size; sizes add up.
            vectors = qm.merge_tokens(vectors, new, count, mass=sizes)
            sizes = summed(sizes, new, count)
            labels = np.take_along_axis(new, labels, axis=1)
        return labels, size(inside)

    return run


def tome_step(metric: np.ndarray, r: int, protect: bool) -> tuple[np.ndarray, int]:
    """Merge r tokens into others, by their vectors (B, N, D).

    As ToMe's `bipartite_soft_matching`: with `protect`, token 0 is the class token and
    token 1 the distillation token. Returns labels (B, N), which number the tokens in
    ToMe's order, and how many tokens are left.
    """
    batch, count, _ = metric.shape
    r = min(r, (count - 2 * protect) // 2)
    # A holds the tokens at even positions, B those at odd positions. Each token of A
    # has its most similar token of B, and the r most similar pairs merge.
    length = np.maximum(np.linalg.norm(metric, axis=-1, keepdims=True), 1e-30)
    x = metric / length
    scores = x[:, ::2] @ x[:, 1::2].swapaxes(1, 2)  # (batch, A, B)
    if protect:
        scores[:, 0], scores[:, :, 0] = -np.inf, -np.inf
    edges = np.argsort(-scores.max(axis=2), axis=1, kind="stable")  # of A
    source, unmerged = edges[:, :r], np.sort(edges[:, r:], axis=1)
    # Then come the tokens of A that are left, and those of B. ToMe moves token 0 of B,
    # the distillation token, to position 1.
    left = unmerged.shape[1]
    of_a, of_b = np.arange(left), left + np.arange(count // 2)
    if protect:
        of_a[1:] += 1
        of_b[0] = 1
    labels = np.empty((batch, count), int)
    labels[:, 1::2] = of_b
    in_a = np.empty(edges.shape, int)
    np.put_along_axis(in_a, unmerged, np.broadcast_to(of_a, unmerged.shape), axis=1)
    target = np.take_along_axis(scores.argmax(axis=2), source, axis=1)
    np.put_along_axis(in_a, source, of_b[target], axis=1)
    labels[:, ::2] = in_a
    return labels, count - r


def summed(sizes: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the sizes (B, K) of groups: the sums of the sizes (B, N) of tokens.

    A token with label -1 counts nowhere.
    """
    member = labels[:, None] == np.arange(num_groups)[:, None]  # (B, K, N)
    return np.einsum("bkn,bn->bk", member, sizes).astype(np.float32)
