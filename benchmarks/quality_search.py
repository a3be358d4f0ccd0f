"""Task 2 of quality.py: search among sections, whose vectors are merged by a factor.

A section is stored as one vector per token. In late-interaction search (MaxSim), each
vector of a query is compared with all vectors of a section. A query is the title and
the sentence before a section, and must find that section.
"""

from collections.abc import Callable

import numpy as np
import packages
from contenders import Contender, Inside, ours
from minilm import MiniLM, unit
from peers import (
    at_random,
    keep_best,
    kmeans,
    norms,
    not_protected,
    tome,
    uniform_chunks,
)
from quality_tables import Report, by_document, interval, table
from quality_text import BATCH, special_first
from texts import Document, sections

import qm_cupy as qm
from qm_cupy.cli.progress import progress

# Word pieces of a section, including [CLS] and [SEP], and how many sections a document
# gives at most.
SECTION, SECTIONS = 128, 6
FACTORS = 2, 3, 4, 6
BEST = 10  # positions of the ranking that count
PROTECTED = 2  # [CLS] and [SEP]


def tokens(inside: Inside) -> np.ndarray:
    return inside.tokens


def placed(inside: Inside) -> np.ndarray:
    """Return unit tokens with two more coordinates: their position on a half circle.

    Tokens at distant positions are then less similar. The half circle has radius 0.5.
    """
    angle = np.pi * np.arange(inside.tokens.shape[1]) / inside.tokens.shape[1]
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    circle = np.broadcast_to(0.5 * circle, (len(inside.tokens), *circle.shape))
    return np.concatenate([unit(inside.tokens), circle.astype(np.float32)], axis=-1)


CONTENDERS: dict[str, Contender] = {
    **{name: ours(name) for name in ("average", "ward", "complete", "single")},
    **{name: ours(name) for name in ("bipartite", "contiguous")},
    "ward by position too": ours("ward", by=placed),
    "ward, nothing protected": not_protected(ours("ward")),
    "k-means, unit vectors": kmeans(unit=True, restarts=1),
    "ToMe in large steps, tokens": tome(tokens),
    "ToMe in steps of 8, tokens": tome(tokens, 8),
    "uniform chunks": uniform_chunks,
    "pruned at random": keep_best(at_random),
    "pruned at random, nothing protected": not_protected(keep_best(at_random)),
    "pruned by norm": keep_best(norms),
}
POOLERS: dict[str, Callable[[], packages.Pooler]] = {
    "sentence-transformers' pooler": packages.sentence_transformers,
    "PyLate's pooler": packages.pylate,
}
QUICK = "ward", "ToMe in large steps, tokens"


def search(
    model: MiniLM, texts: list[Document], quick: bool
) -> tuple[Report, dict[str, str]]:
    """Print and return nDCG@10 and recall@10 by contender, and who did not run."""
    cuts = [sections(x, SECTION, SECTIONS) for x in texts]
    owner = np.repeat(np.arange(len(texts)), [len(x) for x in cuts])
    parts = [part for of_text in cuts for part in of_text]
    passages = np.array([x.passage for x in parts])
    vectors = np.concatenate(
        [
            unit(model.run(special_first(model.embed(passages[i : i + BATCH])), 0, 6))
            for i in range(0, len(passages), BATCH)
        ]
    )
    queries = [unit(model.run(model.embed(x.query[None]), 0, 6))[0] for x in parts]
    plain = by_document(ranked(queries, vectors), owner)
    poolers, missing = packages.installed({} if quick else POOLERS)
    names = [*(QUICK if quick else CONTENDERS), *poolers]
    scores = np.empty((len(names), len(FACTORS), *plain.shape))
    with progress(len(names), "contenders") as shown:
        for n, name in enumerate(names):
            for f, factor in enumerate(FACTORS):
                if name in poolers:
                    x = pooled_by(poolers[name], vectors, factor)
                else:
                    x = merged(vectors, CONTENDERS[name], factor)
                scores[n, f] = by_document(ranked(queries, x), owner)
            shown(n + 1)
    report: Report = {}
    for which, measure in enumerate(("nDCG@10", "recall@10")):
        whole = interval(plain[which])
        title = f"{measure} / unpooled {measure} ({whole[0]:.3f}), {len(queries)} "
        title += f"queries and sections of {plain.shape[-1]} documents"
        columns = [f"1/{f}" for f in FACTORS]
        of_measure = scores[:, :, which]
        report[measure] = table(title, names, columns, of_measure, None, plain[which])
        report[measure]["unpooled"] = whole
    return report, missing


def merged(vectors: np.ndarray, contender: Contender, factor: int) -> np.ndarray:
    """Return unit vectors (S, K, D) of sections, K = 2 + (N - 2) // factor."""
    # Two vectors are protected, as the poolers count them. The vectors have no keys or
    # attention of their own, and weigh the same.
    ones = np.ones(vectors.shape[:2], np.float32)
    inside = Inside(vectors, vectors, ones, ones, ones, ones, PROTECTED)
    num_groups = PROTECTED + (vectors.shape[1] - PROTECTED) // factor
    labels, weights = contender(inside, num_groups)
    x = qm.merge_tokens(vectors, labels, num_groups, mass=weights)
    # An empty group repeats the first group, which changes no maximum over vectors.
    empty = qm.group_sizes(labels, num_groups) == 0  # (S, K)
    x = np.where(empty[..., None], x[:, :1], x)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def pooled_by(pooler: packages.Pooler, vectors: np.ndarray, factor: int) -> np.ndarray:
    """Return the vectors (S, K, D) of a package, as it returns them."""
    rows = [pooler(x, factor, PROTECTED) for x in vectors]
    longest = max(map(len, rows))
    # The first vector fills shorter results up, which changes no maximum.
    return np.stack(
        [np.concatenate([x, np.repeat(x[:1], longest - len(x), 0)]) for x in rows]
    )


def ranked(queries: list[np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """Return nDCG@10 and recall@10 (2, Q), where query q searches for section q."""
    metrics = []
    flat = vectors.reshape(-1, vectors.shape[-1])
    for q, query in enumerate(queries):
        scores = (query @ flat.T).reshape(len(query), *vectors.shape[:2])
        # MaxSim: each query vector takes its best vector of a section; sum over them.
        scores = scores.max(axis=-1).sum(axis=0)  # (sections,)
        rank = np.count_nonzero(scores > scores[q])
        # One section is relevant, so the ideal gain is 1: nDCG = 1 / log2(rank + 2).
        metrics.append((rank < BEST) * np.array([1 / np.log2(rank + 2), 1]))
    return np.array(metrics).T
