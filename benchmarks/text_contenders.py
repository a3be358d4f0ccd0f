"""The contenders of quality_text.py, by name.

"Saliency", "received" and "entropy" come from the attention of the encoder, except
where a name says "tokens only". The saliency is that of all layers up to the merge. The
others are those of the last layer. "Mass" weights the linkage and the means; "weights"
only the means.
"""

import numpy as np
from contenders import (
    Contender,
    Inside,
    Weights,
    focused,
    ours,
    quickmerge,
    received,
    received_saliency,
    saliency,
    size,
    squared_norms,
)
from peers import (
    at_random,
    authors,
    keep_best,
    kmeans,
    norms,
    not_protected,
    tome,
    uniform_chunks,
)


def key(inside: Inside) -> np.ndarray:
    return inside.key


def tokens(inside: Inside) -> np.ndarray:
    return inside.tokens


def with_mass(method: str, mass: Weights) -> Contender:
    return ours(method, mass=mass, weights=mass)


TOKENS_ONLY = quickmerge()
# The options that the README once advised; here without the attention of the encoder.
WEIGHTED_WARD = quickmerge(method="ward", weights="saliency", weighted_linkage=True)

IN_PLACE: dict[str, Contender] = {
    "quickmerge, tokens only": TOKENS_ONLY,
    "quickmerge, attention": quickmerge("attention"),
    "quickmerge, attention of all layers so far": quickmerge("all attentions"),
    "quickmerge, saliency passed": quickmerge("saliency"),
    "quickmerge, weighted ward, tokens only": WEIGHTED_WARD,
    "quickmerge, tokens only, nothing protected": not_protected(TOKENS_ONLY),
    "quickmerge, weighted ward, tokens only, nothing protected": not_protected(
        WEIGHTED_WARD
    ),
    "the authors' labels": authors,
    **{name: ours(name) for name in ("average", "ward", "complete", "single")},
    **{name: ours(name) for name in ("nearest", "bipartite", "contiguous")},
    "average, nothing protected": not_protected(ours()),
    "ward, nothing protected": not_protected(ours("ward")),
    "bipartite in steps of 16": ours("bipartite", step=16),
    "ward by keys": ours("ward", by=key),
    "ward, Euclidean": ours("ward", metric="euclidean"),
    "ward, Euclidean, received × exp(-entropy) mass": ours(
        "ward", mass=focused, weights=focused, metric="euclidean"
    ),
    "ward, squared norm mass": with_mass("ward", squared_norms),
    "average, saliency weights": ours(weights=saliency),
    "average, saliency mass": with_mass("average", saliency),
    "average, received mass": with_mass("average", received),
    "average, received × exp(-entropy) weights": ours(weights=focused),
    "average, received × exp(-entropy) mass": with_mass("average", focused),
    "ward, saliency weights": ours("ward", weights=saliency),
    "ward, saliency mass": with_mass("ward", saliency),
    "ward, received weights": ours("ward", weights=received),
    "ward, received mass": with_mass("ward", received),
    "ward, received × saliency mass": with_mass("ward", received_saliency),
    "ward, received × exp(-entropy) weights": ours("ward", weights=focused),
    "ward, received × exp(-entropy) mass": with_mass("ward", focused),
    "k-means": kmeans(),
    "k-means, unit vectors": kmeans(unit=True),
    "k-means, saliency mass": kmeans(saliency),
    "k-means, received × exp(-entropy) mass": kmeans(focused),
    "ToMe in large steps, tokens": tome(tokens),
    "ToMe in large steps, keys": tome(key),
    "ToMe in large steps, nothing protected": not_protected(tome(tokens)),
    "ToMe in steps of 16, tokens": tome(tokens, 16),
    "ToMe in steps of 16, keys": tome(key, 16),
    "uniform chunks": uniform_chunks,
    "uniform chunks, nothing protected": not_protected(uniform_chunks),
    "pruned at random": keep_best(at_random),
    "pruned at random, nothing protected": not_protected(keep_best(at_random)),
    "pruned by norm": keep_best(norms),
    "pruned by entropy": keep_best(saliency),
    "pruned by attention": keep_best(received),
}
# Those that also merge after other layers.
MAIN = [
    "quickmerge, tokens only",
    "quickmerge, attention",
    "quickmerge, weighted ward, tokens only",
    "quickmerge, weighted ward, tokens only, nothing protected",
    "average",
    "ward",
    "ward, squared norm mass",
    "average, saliency weights",
    "ward, saliency mass",
    "ward, received mass",
    "ward, received × saliency mass",
    "ward, received × exp(-entropy) mass",
    "k-means",
    "ToMe in large steps, tokens",
    "ToMe in steps of 16, tokens",
    "ToMe in steps of 16, keys",
    "uniform chunks",
    "pruned at random",
]
QUICK = ["quickmerge, attention", "ward", "ToMe in steps of 16, tokens"]

# A layer merges by its own attention. Without "mass", the linkage ignores the sizes.
OVER: dict[str, Contender] = {
    "quickmerge, tokens only": TOKENS_ONLY,
    "quickmerge, attention": quickmerge("attention"),
    "average": ours(),
    "average, size mass": ours(mass=size),
    "average, received × exp(-entropy) mass": with_mass("average", focused),
    "ward": ours("ward"),
    "ward, size mass": ours("ward", mass=size),
    "ward, squared norm mass": with_mass("ward", squared_norms),
    "ward, size × saliency mass": with_mass("ward", saliency),
    "ward, received mass": with_mass("ward", received),
    "ward, received × saliency mass": with_mass("ward", received_saliency),
    "ward, received × exp(-entropy) mass": with_mass("ward", focused),
    "bipartite": ours("bipartite"),
    "ToMe, tokens": tome(tokens),
    "ToMe, keys": tome(key),
    "pruned by attention": keep_best(received),
}
QUICK_OVER = ["quickmerge, attention", "ToMe, tokens"]
