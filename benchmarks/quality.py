"""Measure what merging loses on real tokens, by method: text, search and pictures.

    python benchmarks/quality.py [--quick] [--json PATH] [--plot PATH]

Task 1, text: passages of Python's language reference and of the licences of installed
packages go through layers 1-3 of a sentence encoder (see minilm.py). Then they are
merged to a fraction of their tokens, and go through layers 4-6, where attention to a
token is weighted by its size. Error = 1 - cosine to the embedding of the unmerged
passage.

Task 2, search: late-interaction search (MaxSim) among sections of the same text. A
query is the title and the sentence before a section, and must find that section. The
vectors of the sections are pooled by a factor.

Task 3, pictures: 8 x 8 patches of photographs, tile by tile, rebuilt from the merged
patches.

Figures are means over documents (or tiles), with 95 % intervals by a bootstrap over
documents (or tiles). Passages and queries of one document are averaged first.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from minilm import MiniLM, pooled, unit
from peers import (
    Contender,
    Inside,
    at_random,
    authors,
    euclidean_kmeans,
    keep_best,
    kmeans,
    norms,
    ours,
    quickmerge,
    tome,
    uniform_chunks,
)
from PIL import Image
from report import write_json
from sklearn.datasets import load_sample_images
from texts import Document, cut, documents, licences, sections

import qm_cupy as qm
from qm_cupy.cli.progress import progress

# Word pieces of a passage or a section, including [CLS] and [SEP], and how many of them
# a document gives at most.
LENGTH, PASSAGES = 256, 2
SECTION, SECTIONS = 128, 6
SPLIT = 3  # layers before the merge
BATCH = 8  # passages in one pass of the encoder
FRACTIONS = 0.5, 0.25, 0.1
FACTORS = 2, 3, 4, 6  # N / K of the pooled sections
BEST = 10  # places of the ranking that count
TILE, PATCH = 256, 8  # pixels
RESAMPLES = 2000  # of the bootstrap
PEER = "ToMe, tokens"  # the contender that all others are compared with

Report = dict[str, Any]


# Each of these functions selects the weights, or the vectors, of a contender.


def saliency(inside: Inside) -> np.ndarray:
    return inside.saliency


def cubed(inside: Inside) -> np.ndarray:
    return inside.saliency**3


def own(inside: Inside) -> np.ndarray:
    """Return the saliency that `quickmerge` computes from the tokens alone."""
    return qm.saliency(qm.self_attention_entropy(inside.tokens))


def received(inside: Inside) -> np.ndarray:
    return inside.received


def key(inside: Inside) -> np.ndarray:
    return inside.key


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


def most_salient(inside: Inside) -> np.ndarray:
    """Return True for the four tokens with the least entropy."""
    return qm.gumbel_softmax(inside.saliency, seed=None, hard=4) > 0


CONTENDERS: dict[str, Contender] = {
    "quickmerge": quickmerge,
    "the authors' labels": authors,
    **{f"{method}": ours(method) for method in ("average", "ward", "complete")},
    **{f"{method}": ours(method) for method in ("single", "nearest", "bipartite")},
    "contiguous": ours("contiguous"),
    "average, saliency weights": ours(weights=saliency),
    "average, saliency mass": ours(mass=saliency, weights=saliency),
    "ward, saliency weights": ours("ward", weights=saliency),
    "ward, saliency³ weights": ours("ward", weights=cubed),
    "ward, attention weights": ours("ward", weights=received),
    "ward, saliency mass": ours("ward", mass=saliency, weights=saliency),
    "ward, own saliency mass": ours("ward", mass=own, weights=own),
    "ward, attention mass": ours("ward", mass=received, weights=received),
    "ward by keys": ours("ward", by=key),
    "ward by place too": ours("ward", by=placed),
    "ward, 4 protected": ours("ward", protect=most_salient),
    "ToMe, keys": tome(key),
    "ToMe, tokens": tome(tokens),
    "k-means, unit": kmeans,
    "uniform chunks": uniform_chunks,
    "pruned at random": keep_best(at_random),
    "pruned by norm": keep_best(norms),
    "pruned by entropy": keep_best(saliency),
    "pruned by attention": keep_best(received),
}
# Contenders that merge in two steps, with a layer between; see `over_two_layers`.
OVER_TWO = {"average, over two layers": "average", "ward, over two layers": "ward"}
OF_VECTORS = [  # the contenders that need only the tokens, for search and pictures
    "average", "ward", "complete", "single", "bipartite", "contiguous",
    "ward by place too", "ToMe, tokens", "k-means, unit", "uniform chunks",
    "pruned at random", "pruned by norm",
]  # fmt: skip


def in_batches(x: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(x), BATCH):
        yield x[first : first + BATCH]


def looked_into(model: MiniLM, ids: np.ndarray, last: int) -> Inside:
    """Run the first layers, and return their last tokens, keys and attention."""
    x, entropies, attention = model.embed(ids), [], np.empty(0)
    key = x
    for i in range(last):
        x, _, key, attention = model.layer(i, x)
        entropies.append(qm.attention_entropy(attention))
    score = qm.saliency(np.stack(entropies))
    # Keys: the mean over heads. Attention received: the mean over heads and queries.
    return Inside(x, key.mean(axis=1), score, attention.mean(axis=(1, 2)))


def merged(inside: Inside, contender: Contender, num_groups: int) -> tuple[Any, Any]:
    """Return the merged tokens (B, K, D) of a contender, and their sizes (B, K)."""
    labels, weights = contender(inside, num_groups)
    x = qm.merge_tokens(inside.tokens, labels, num_groups, mass=weights)
    return x, qm.group_sizes(labels, num_groups)


def over_two_layers(
    model: MiniLM, x: np.ndarray, method: str, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge (B, N, D) to √(N K) tokens before layer `SPLIT`, and to K after it."""
    middle = round((x.shape[1] * num_groups) ** 0.5)
    labels = qm.cluster_tokens(x, middle, method=method)
    sizes = qm.group_sizes(labels, middle).astype(np.float32)
    x = model.layer(SPLIT - 1, qm.merge_tokens(x, labels, middle), sizes).hidden
    # Tokens of the first merge count by their sizes in the second.
    labels = qm.cluster_tokens(x, num_groups, method=method, mass=sizes)
    x = qm.merge_tokens(x, labels, num_groups, mass=sizes)
    member = labels[:, None] == np.arange(num_groups)[:, None]  # (B, K, N)
    return x, np.einsum("bkn,bn->bk", member, sizes)


def interval(values: np.ndarray) -> list[float]:
    """Return the mean over documents and its 95 % interval, by a bootstrap."""
    # Every sample draws as many documents as there are, with replacement.
    samples = np.random.default_rng(0).integers(
        0, len(values), (RESAMPLES, len(values))
    )
    means = values[samples].mean(axis=1)
    return [float(values.mean()), *map(float, np.quantile(means, (0.025, 0.975)))]


def ratio(values: np.ndarray, peer: np.ndarray) -> list[float]:
    """Return the ratio of two means over the same documents, and its interval."""
    # Both means use the same samples: the documents are paired.
    samples = np.random.default_rng(0).integers(
        0, len(values), (RESAMPLES, len(values))
    )
    ratios = values[samples].mean(axis=1) / peer[samples].mean(axis=1)
    whole = values.mean() / peer.mean()
    return [float(whole), *map(float, np.quantile(ratios, (0.025, 0.975)))]


def mid_network(model: MiniLM, texts: list[Document], names: list[str]) -> Report:
    """Print and return the errors of task 1, by contender and fraction of tokens."""
    cuts = [cut(x.text, LENGTH)[:PASSAGES] for x in texts]
    parts = [(d, ids) for d, of_text in enumerate(cuts) for ids in of_text]
    owner, passages = np.array([d for d, _ in parts]), np.array([x for _, x in parts])
    # Contenders over two layers run only if all others do.
    names = [*names, *(OVER_TWO if len(names) == len(CONTENDERS) else ())]
    errors = np.zeros((len(names), len(FRACTIONS), len(passages)))
    done = 0
    with progress(len(passages), sys.stderr, "passages") as shown:
        for ids in in_batches(passages):
            inside = looked_into(model, ids, SPLIT)
            before = model.run(model.embed(ids), 0, SPLIT - 1)  # for `OVER_TWO`
            whole = pooled(model.run(inside.tokens, SPLIT, 6))  # unmerged embeddings
            here = slice(done, done + len(ids))
            for n, name in enumerate(names):
                for s, fraction in enumerate(FRACTIONS):
                    budget = int(LENGTH * fraction)
                    if name in OVER_TWO:
                        method = OVER_TWO[name]
                        x, sizes = over_two_layers(model, before, method, budget)
                    else:
                        x, sizes = merged(inside, CONTENDERS[name], budget)
                    embeddings = pooled(model.run(x, SPLIT, 6, sizes), sizes)
                    errors[n, s, here] = 1 - np.einsum("bd,bd->b", embeddings, whole)
            done += len(ids)
            shown(done)
    document_errors = by_document(errors, owner)
    title = f"error of a merge after layer {SPLIT}, {len(passages)} passages of "
    title += f"{document_errors.shape[-1]} documents"
    return table(title, names, [f"{s:.0%}" for s in FRACTIONS], document_errors, PEER)


def by_document(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return means over the items of each document: (..., X) to (..., documents)."""
    means = [values[..., owner == d].mean(axis=-1) for d in np.unique(owner)]
    return np.stack(means, axis=-1)


def search(model: MiniLM, texts: list[Document], names: list[str]) -> Report:
    """Print and return the nDCG@10 and recall@10 of task 2, by contender and factor."""
    cuts = [sections(x, SECTION, SECTIONS) for x in texts]
    owner = np.repeat(np.arange(len(texts)), [len(x) for x in cuts])
    parts = [part for of_text in cuts for part in of_text]
    passages = np.array([x.passage for x in parts])
    vectors = np.concatenate(
        [unit(model.run(model.embed(x), 0, 6)) for x in in_batches(passages)]
    )
    queries = [unit(model.run(model.embed(x.query[None]), 0, 6))[0] for x in parts]
    # Vectors have no keys or attention of their own, and equal weights.
    none = np.ones(vectors.shape[:2], np.float32)
    inside = Inside(vectors, vectors, none, none)
    plain = by_document(ranked(queries, vectors), owner)
    pooled_scores = np.empty((len(names), len(FACTORS), *plain.shape))
    with progress(len(names), sys.stderr, "contenders") as shown:
        for n, name in enumerate(names):
            for f, factor in enumerate(FACTORS):
                x, sizes = merged(inside, CONTENDERS[name], SECTION // factor)
                # An empty group becomes a zero vector; the others become unit vectors.
                x = np.where(sizes[..., None] > 0, x, 0)
                length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
                pooled_scores[n, f] = by_document(ranked(queries, x / length), owner)
            shown(n + 1)
    report: Report = {}
    for which, measure in enumerate(("nDCG@10", "recall@10")):
        whole = interval(plain[which])
        title = f"{measure} / unpooled {measure} ({whole[0]:.3f}), {len(queries)} "
        title += f"queries and sections of {plain.shape[-1]} documents"
        scores = pooled_scores[:, :, which]
        columns = [f"1/{f}" for f in FACTORS]
        report[measure] = table(title, names, columns, scores, None, plain[which])
        report[measure]["unpooled"] = whole
    return report


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


def tiles() -> np.ndarray:
    """Return patches (B, N, D) of tiles of matplotlib's and scikit-learn's photos."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        photos = [np.asarray(file.convert("RGB")), *load_sample_images().images]
    # A tile is a sequence of side² patches; an edge that fills no tile is cut off.
    side, patches_by_photo = TILE // PATCH, []
    for photo in photos:
        rows, columns = (size // TILE for size in photo.shape[:2])
        cropped = photo[: rows * TILE, : columns * TILE].astype(np.float32) / 255
        patches = cropped.reshape(rows, side, PATCH, columns, side, PATCH, 3)
        patches_by_photo.append(
            patches.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, side**2, 192)
        )
    return np.concatenate(patches_by_photo)


def pictures(names: list[str], quick: bool) -> Report:
    """Print and return the PSNR in dB of task 3, by contender and fraction."""
    patches = tiles()[: 1 if quick else None, : 128 if quick else None]
    # The mean patch of each tile is subtracted. The errors do not change: adding the
    # mean back would change the tile and the rebuilt tile by the same amount.
    mean = patches.mean(axis=1, keepdims=True)
    x = patches - mean
    score = qm.saliency(qm.self_attention_entropy(x))
    inside = Inside(x, x, score, score)
    contenders = {**CONTENDERS, "k-means": euclidean_kmeans}
    psnr = np.empty((len(names) + 1, len(FRACTIONS), len(x)))
    with progress(len(names) + 1, sys.stderr, "contenders") as shown:
        for n, name in enumerate([*names, "k-means"]):
            for s, fraction in enumerate(FRACTIONS):
                budget = int(x.shape[1] * fraction)
                labels, weights = contenders[name](inside, budget)
                kept = qm.merge_tokens(x, labels, budget, mass=weights)
                rebuilt = qm.unmerge_tokens(kept, nearest_kept(x, kept, labels))
                psnr[n, s] = -10 * np.log10(((rebuilt - x) ** 2).mean(axis=(1, 2)))
            shown(n + 1)
    title = f"PSNR in dB of {len(x)} rebuilt tiles of {x.shape[1]} patches"
    columns = [f"{s:.0%}" for s in FRACTIONS]
    return table(title, [*names, "k-means"], columns, psnr, None)


def nearest_kept(x: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels in which each dropped token has its most similar kept token."""
    if (labels >= 0).all():
        return labels
    scores = qm.cosine_similarity(np.concatenate([x, kept], axis=1))
    best = scores[:, : x.shape[1], x.shape[1] :].argmax(axis=-1)
    return np.where(labels >= 0, labels, best)


def table(
    title: str,
    names: list[str],
    columns: list[str],
    scores: np.ndarray,
    peer: str | None,
    baseline: np.ndarray | None = None,
) -> Report:
    """Print and return means over documents with their intervals.

    `scores` has the axes (contender, column, document). If `peer` is given, the report
    also has the ratios to that contender. If `baseline` (document,) is given, all
    figures are ratios to it.
    """
    print(f"\n{title}")
    print(" " * 28 + "".join(f"{c:>24}" for c in columns))
    report: Report = {}
    for n, name in enumerate(names):
        row, report[name] = "", {}
        for c, column in enumerate(columns):
            values = scores[n, c]
            estimate = interval(values) if baseline is None else ratio(values, baseline)
            report[name][column] = {"mean" if baseline is None else "ratio": estimate}
            if peer in names:
                versus = ratio(values, scores[names.index(peer), c])
                report[name][column][f"over {peer}"] = versus
            text = f"{estimate[0]:.4g} ({estimate[1]:.3g}-{estimate[2]:.3g})"
            row += f"{text:>24}"
        print(f"{name:28}{row}")
    return report


def plot(report: Report, path: Path) -> None:
    """Draw the figures of each task over the percentage of tokens kept."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = ["average", "ward", "ToMe, keys", "ToMe, tokens", "k-means, unit"]
    shown += ["uniform chunks", "pruned at random"]
    tasks = {
        "text, merged after layer 3: error": report["mid-network"],
        "search: nDCG@10 / unpooled nDCG@10": report["search"]["nDCG@10"],
        "pictures: PSNR, dB": report["pictures"],
    }

    def percent(column: str) -> float:
        # "25%", or "1/4" in the search.
        return float(column[:-1]) if column[-1] == "%" else 100 / float(column[2:])

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, results) in zip(axes, tasks.items(), strict=True):
        for n, (name, marker) in enumerate(zip(shown, "osDd^vx", strict=True)):
            if name not in results:
                continue
            columns = results[name]
            x = [percent(column) for column in columns]
            # (columns, 3): mean or ratio, and the ends of its interval.
            y = np.array([next(iter(values.values())) for values in columns.values()])
            bars = np.abs(y[:, 1:] - y[:, :1]).T  # distances from the mean
            axis.errorbar(x, y[:, 0], bars, fmt=f"C{n}{marker}-", label=name, capsize=2)
        axis.set(title=title, xlabel="tokens kept, %")
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG")
    options = parser.parse_args()
    quick = options.quick
    model = MiniLM()
    python = platform.python_version()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}, text of Python {python}")
    limit = 3 if quick else None
    texts = documents(model, limit, SECTION) + licences(model, limit, SECTION)
    names = ["quickmerge", "ward", PEER] if quick else list(CONTENDERS)
    of_vectors = ["ward", "ToMe, tokens"] if quick else OF_VECTORS
    report: Report = {"machine": machine, "python": python}
    report["mid-network"] = mid_network(model, texts, names)
    report["search"] = search(model, texts, of_vectors)
    report["pictures"] = pictures(of_vectors, quick)
    if options.plot:
        plot(report, options.plot)
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
