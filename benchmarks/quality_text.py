"""Task 1 of quality.py: text that is merged in a sentence encoder, in two schemes.

In one place: N tokens are merged to K after some layer, and the later layers read K
tokens. Over the layers: every layer merges r = (N - K) / 6 tokens between its attention
and its MLP, as the authors of ToMe use it. Both schemes process equally many tokens if
the one place is after layer 3 of 6, because 6 layers then process 3 N + 3 K tokens.

Later attention to a token is weighted by its size. The error is 1 - cosine between the
sentence embeddings with and without merging.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from contenders import Contender, Inside, attention_received
from minilm import NUM_LAYERS, Layer, MiniLM, pooled
from peers import summed
from quality_tables import Report, table
from text_contenders import IN_PLACE, MAIN, OVER, QUICK, QUICK_OVER
from texts import Document, cut
from threadpoolctl import threadpool_limits

import qm_cupy as qm
from qm_cupy.cli.progress import progress

LENGTH = 256  # word pieces of a passage, including [CLS] and [SEP]
BATCH = 8  # passages in one pass of the encoder
FRACTIONS = 0.5, 0.25, 0.1
PROTECTED = 2  # [CLS] and [SEP]
DEPTHS = 1, 3, 5  # layers before a merge in one place
MIDDLE = 3  # all contenders merge here; elsewhere only the main ones do
OVER_THE_LAYERS = 0  # in a job, instead of the layers before the merge
# The contenders that all others are compared with.
PEER, PEER_OVER = "ToMe in steps of 16, tokens", "ToMe, tokens"

Job = tuple[int, str]  # layers before the merge, or OVER_THE_LAYERS; a contender


class Unmerged(NamedTuple):
    """Data of passages without a merge, which all contenders use."""

    tokens: np.ndarray  # (B, N, D), before layer 1
    attended: Layer  # of the attention part of layer 1
    inside: dict[int, Inside]  # after as many layers
    embedding: np.ndarray  # (B, D)


def special_first(x: np.ndarray) -> np.ndarray:
    """Move [SEP], the last token of (B, N, D), to position 1, behind [CLS].

    The layers do not depend on the order, because positions were added by `embed`.
    """
    return np.concatenate([x[:, :1], x[:, -1:], x[:, 1:-1]], axis=1)


def unmerged(model: MiniLM, ids: np.ndarray) -> Unmerged:
    tokens = x = special_first(model.embed(ids))
    layers, entropies, inside = [model.attend(0, x)], [], {}
    for i in range(NUM_LAYERS):
        if i:
            layers.append(model.attend(i, x))
        x = model.feed_forward(i, layers[i].hidden)
        entropies.append(qm.attention_entropy(layers[i].attention))
        if i + 1 in DEPTHS:
            sizes = np.ones(x.shape[:2], np.float32)
            inside[i + 1] = inside_of(x, layers, entropies, sizes)
    return Unmerged(tokens, layers[0], inside, pooled(x))


def inside_of(
    x: np.ndarray, layers: list[Layer], entropies: list[np.ndarray], sizes: np.ndarray
) -> Inside:
    """Return the data of contenders from some layers and their entropies (B, H, N)."""
    attentions = tuple(layer.attention for layer in layers)
    return Inside(
        tokens=x,
        key=layers[-1].key.mean(axis=1),  # over heads, as in ToMe
        saliency=qm.saliency(tuple(entropies)),
        entropy=entropies[-1].mean(axis=1),  # over heads
        received=attention_received(attentions[-1]),
        sizes=sizes,
        num_protected=PROTECTED,
        attentions=attentions,
    )


def in_place(
    model: MiniLM, before: Unmerged, layers: int, contender: Contender, num_groups: int
) -> np.ndarray:
    """Return embeddings (B, D) with a merge after this many layers."""
    inside = before.inside[layers]
    labels, weights = contender(inside, num_groups)
    x = qm.merge_tokens(inside.tokens, labels, num_groups, mass=weights)
    sizes = summed(inside.sizes, labels, num_groups)
    return pooled(model.run(x, layers, NUM_LAYERS, sizes), sizes)


def over_the_layers(
    model: MiniLM, before: Unmerged, contender: Contender, counts: list[int]
) -> np.ndarray:
    """Return embeddings (B, D), where layer i merges to `counts[i]` tokens."""
    x, sizes = before.tokens, np.ones(before.tokens.shape[:2], np.float32)
    for i, num_groups in enumerate(counts):
        layer = model.attend(i, x, sizes) if i else before.attended
        # Entropy and attention received are those of this layer alone.
        entropies = [qm.attention_entropy(layer.attention)]
        inside = inside_of(layer.hidden, [layer], entropies, sizes)
        labels, weights = contender(inside, num_groups)
        x = qm.merge_tokens(layer.hidden, labels, num_groups, mass=weights)
        sizes = summed(sizes, labels, num_groups)
        x = model.feed_forward(i, x)
    return pooled(x, sizes)


def schedule(num_tokens: int, num_groups: int) -> list[int]:
    """Return the tokens after each layer: r fewer, as far as ToMe's cap allows."""
    r, counts = -(-(num_tokens - num_groups) // NUM_LAYERS), []  # rounded up
    for _ in range(NUM_LAYERS):
        num_tokens -= min(r, (num_tokens - PROTECTED) // 2)
        counts.append(num_tokens)
    return counts


def processed(num_tokens: int, counts: list[int]) -> float:
    """Return how many tokens the layers process, in a merge over the layers.

    The attention and the MLP of a layer count half each.
    """
    return (num_tokens + 2 * sum(counts) - counts[-1]) / 2


@cache
def encoder() -> MiniLM:
    """Return the encoder of this process."""
    return MiniLM()


def errors(jobs: list[Job], ids: np.ndarray) -> np.ndarray:
    """Return the errors (jobs, fractions, B) of passages (B, N)."""
    # The processes use one core each.
    with threadpool_limits(1):
        model = encoder()
        before = unmerged(model, ids)
        result = np.empty((len(jobs), len(FRACTIONS), len(ids)))
        for j, (layers, name) in enumerate(jobs):
            for f, fraction in enumerate(FRACTIONS):
                budget = int(LENGTH * fraction)
                if layers == OVER_THE_LAYERS:
                    counts = schedule(LENGTH, budget)
                    x = over_the_layers(model, before, OVER[name], counts)
                else:
                    x = in_place(model, before, layers, IN_PLACE[name], budget)
                result[j, f] = 1 - np.einsum("bd,bd->b", x, before.embedding)
    return result


def text(texts: list[Document], quick: bool) -> Report:
    """Print and return the errors of task 1, by scheme, contender and fraction."""
    passages = [cut(x.text, LENGTH) for x in texts]
    ids = np.array([x[0] for x in passages if len(x)])  # the first of each document
    in_one_place = {
        depth: QUICK if quick else list(IN_PLACE) if depth == MIDDLE else MAIN
        for depth in DEPTHS
    }
    over = QUICK_OVER if quick else list(OVER)
    jobs = [(depth, name) for depth in DEPTHS for name in in_one_place[depth]]
    jobs += [(OVER_THE_LAYERS, name) for name in over]
    values = np.concatenate(list(_all_errors(jobs, ids, quick)), axis=-1)
    columns = [f"{s:.0%}" for s in FRACTIONS]

    def rows(depth: int) -> np.ndarray:
        return values[[j for j, (layers, _) in enumerate(jobs) if layers == depth]]

    report: Report = {"passages": len(ids), "length": LENGTH}
    for depth, names in in_one_place.items():
        title = f"error of a merge after layer {depth}, {len(ids)} passages"
        report[f"after layer {depth}"] = table(title, names, columns, rows(depth), PEER)
    title = "error of a merge over all layers, between attention and MLP"
    report["over the layers"] = table(
        title, over, columns, rows(OVER_THE_LAYERS), PEER_OVER
    )
    report["tokens"] = {
        column: _token_counts(int(LENGTH * s))
        for column, s in zip(columns, FRACTIONS, strict=True)
    }
    return report


def _token_counts(num_groups: int) -> Report:
    """Return how many tokens the layers process in both schemes."""
    counts = schedule(LENGTH, num_groups)
    return {
        "after each layer": counts,
        "processed over the layers": processed(LENGTH, counts),
        "processed with one merge in the middle": MIDDLE * (LENGTH + num_groups),
    }


def _all_errors(jobs: list[Job], ids: np.ndarray, quick: bool) -> Iterator[np.ndarray]:
    """Yield the errors of each batch of passages, computed on all cores."""
    batches = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    run = partial(errors, jobs)
    if quick:  # processes would take seconds to start
        yield from map(run, batches)
        return
    with (
        progress(len(batches), "batches") as shown,
        ProcessPoolExecutor(os.cpu_count()) as pool,
    ):
        for done, result in enumerate(pool.map(run, batches), 1):
            yield result
            shown(done)
