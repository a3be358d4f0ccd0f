"""The contenders of quality_text.py, by name.

"Saliency" and "received" come from the attention of the encoder, except where a name
says "tokens only". "Mass" weights the linkage and the means; "weights" only the means.
"""

import numpy as np
from contenders import (
    Contender,
    Inside,
    ours,
    own_saliency,
    quickmerge,
    received,
    received_saliency,
    saliency,
    size,
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


def first_saliency(inside: Inside) -> np.ndarray:
    """Return the saliency as users pass it to `quickmerge`."""
    return inside.saliency


IN_PLACE: dict[str, Contender] = {
    "quickmerge, tokens only": quickmerge(),
    "quickmerge, attention": quickmerge(saliency=first_saliency),
    "quickmerge, weighted ward, tokens only": quickmerge(
        method="ward", weights="saliency", weighted_linkage=True
    ),
    "the authors' labels": authors,
    **{name: ours(name) for name in ("average", "ward", "complete", "single")},
    **{name: ours(name) for name in ("nearest", "bipartite", "contiguous")},
    "average, nothing protected": ours(protects=False),
    "ward, nothing protected": ours("ward", protects=False),
    "ward by keys": ours("ward", by=key),
    "average, saliency weights": ours(weights=saliency),
    "average, saliency mass": ours(mass=saliency, weights=saliency),
    "average, received mass": ours(mass=received, weights=received),
    "average, received × saliency mass": ours(
        mass=received_saliency, weights=received_saliency
    ),
    "ward, saliency weights": ours("ward", weights=saliency),
    "ward, saliency mass": ours("ward", mass=saliency, weights=saliency),
    "ward, received mass": ours("ward", mass=received, weights=received),
    "ward, received × saliency weights": ours("ward", weights=received_saliency),
    "ward, received × saliency mass": ours(
        "ward", mass=received_saliency, weights=received_saliency
    ),
    "k-means": kmeans(),
    "k-means, unit vectors": kmeans(unit=True),
    "k-means, saliency mass": kmeans(saliency),
    "k-means, received × saliency mass": kmeans(received_saliency),
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
    "average",
    "ward",
    "average, saliency weights",
    "ward, saliency mass",
    "ward, received mass",
    "ward, received × saliency mass",
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
    "average": ours(),
    "average, size mass": ours(mass=size),
    "ward": ours("ward"),
    "ward, size mass": ours("ward", mass=size),
    "ward, size × saliency mass": ours("ward", mass=saliency, weights=saliency),
    "ward, received mass": ours("ward", mass=received, weights=received),
    "average, received × saliency mass": ours(
        mass=received_saliency, weights=received_saliency
    ),
    "ward, received × saliency mass": ours(
        "ward", mass=received_saliency, weights=received_saliency
    ),
    "bipartite": ours("bipartite"),
    "ToMe, tokens": tome(tokens),
    "ToMe, keys": tome(key),
    "pruned by attention": keep_best(received),
}
