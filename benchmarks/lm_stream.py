"""A language model that reads on with constant memory: its cache merges as it grows.

    python benchmarks/lm_stream.py [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct (smollm2.py). It reads 1,024 tokens of a held-out
document (documents.py), and then 2,048 more in parts of 64: those of the document, or
those that the model itself has generated after the 1,024, with the whole cache. After
each part, the cache is shortened to 512 entries of each head, as
`MergedCache(model, 512, every=64)` does while it decodes one token at a time. KL is the
divergence from the predictions with the whole cache, a mean over the 2,048 tokens. The
contenders:

- merged: `MergedCache`, with one budget for all layers, and with equal budgets.
- KVStream: `KVStream(512, buffer=64)` of all layers, which have equal budgets. It knows
  the last queries, and not the attention that its entries have received.
- H2O: the most recent half of the budget, and the entries that received the most
  attention so far.
- the most recent: the first 4 entries and the most recent ones.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import smollm2
import torch
from cache_methods import SINKS
from cache_reading import (
    Shortened,
    filled_cache,
    mean_divergence,
    mean_loss,
    read,
    take_queries,
)
from documents import byte_documents, documents
from quality_tables import interval
from report import write_json

import qm_cupy as qm
from qm_cupy.transformers import MergedCache, merged_layer

Report = dict[str, Any]
PROMPT, FOLLOWING, PART, BUDGET = 1024, 2048, 64, 512


def h2o(keys: Any, values: Any, count: int, *, attention: Any, **rest: Any) -> Any:
    """Keep the most recent half, and the most attended of the others."""
    options = {"scores": attention, "bias": rest["bias"], "sinks": SINKS}
    return qm.evict(keys, values, count, recent=count // 2, **options)


def most_recent(
    keys: Any, values: Any, count: int, *, attention: Any, **rest: Any
) -> Any:
    """Keep the first entries and the most recent ones."""
    options = {"scores": attention, "bias": rest["bias"], "sinks": SINKS}
    return qm.evict(keys, values, count, recent=count - SINKS, **options)


# What shortens the cache, and the options of `MergedCache`.
CONTENDERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "merged, one budget for all layers": (qm.merge_kv_cache, {}),
    "merged": (qm.merge_kv_cache, {"per_layer": False}),
    "H2O": (h2o, {"per_layer": False}),
    "the most recent": (most_recent, {"per_layer": False}),
}


STREAM = "KVStream"
TEXTS = "documents", "generated"


@contextmanager
def shortening_by(function: Callable[..., Any]) -> Iterator[None]:
    """Let `MergedCache` shorten its layers by another function."""
    with mock.patch.object(merged_layer, "merge_kv_cache", function):
        yield


@torch.no_grad()
def predictions(
    model: Any, ids: list[int], cache: Any, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """Return log-probabilities (T, V) of the tokens after a prompt, read in parts."""
    prompt, following, part = sizes
    tokens = torch.tensor([ids])
    model.model(tokens[:, :prompt], cache=cache)
    logits = [
        model(tokens[:, start : start + part], cache=cache).logits[0]
        for start in range(prompt, prompt + following, part)
    ]
    return torch.cat(logits).log_softmax(-1)


@torch.no_grad()
def stream_predictions(
    model: Any, ids: list[int], stream: qm.KVStream, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """Return log-probabilities (T, V) after a prompt; a stream has all entries."""
    prompt, following, part = sizes
    first = read(model, ids[:prompt])
    arrays = first.keys, first.values, first.queries
    stream.append(*map(torch.stack, arrays))  # (L, 1, H, N, d)
    logits = []
    for start in range(prompt, prompt + following, part):
        # What each layer has stored, with the axis of sequences.
        rows = zip(stream.keys, stream.values, stream.bias, strict=True)
        layers = [Shortened(*row) for row in rows]
        queries: list[torch.Tensor] = []
        with filled_cache(model, layers, start, hooks=True) as cache:
            for layer in cache.layers:
                layer.after_attention = partial(take_queries, layer, queries)
            tokens = torch.tensor([ids[start : start + part]])
            logits.append(model(tokens, cache=cache).logits[0])
            new = [
                torch.stack([getattr(x, name)[:, :, -part:] for x in cache.layers])
                for name in ("keys", "values")
            ]
        # The stream merges when 64 entries were added.
        stream.append(*new, torch.stack(queries))
    return torch.cat(logits).log_softmax(-1)


@torch.no_grad()
def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """Return the tokens of a prompt, and `count` more that the model draws."""
    generator = torch.Generator().manual_seed(0)
    tokens, cache, text = torch.tensor([ids]), None, list(ids)
    for _ in range(count):
        output = model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        # A text of the most probable tokens would soon repeat itself.
        cache, weights = output.cache, output.logits[0, -1].softmax(-1)
        tokens = weights.multinomial(1, generator=generator)[None]
        text.append(int(tokens))
    return text


def measure(
    model: Any, ids: list[int], sizes: tuple[int, int, int], budget: int
) -> Report:
    """Return KL and loss of each contender on the tokens of a document."""
    with smollm2.other_kernels():
        from transformers import DynamicCache

    prompt, following, part = sizes
    true = ids[prompt + 1 : prompt + following + 1]
    whole = DynamicCache(config=model.config)
    expected = predictions(model, ids, whole, sizes)
    report: Report = {"full": mean_loss(expected, true)}

    def add(name: str, result: torch.Tensor, stored: int) -> None:
        report.setdefault("stored", {})[name] = stored
        report[name] = mean_divergence(expected, result), mean_loss(result, true)

    for name, (function, options) in CONTENDERS.items():
        with shortening_by(function), MergedCache(model, budget, **options) as cache:
            result = predictions(model, ids, cache, sizes)
            add(name, result, cache.num_stored)
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()
    stream = qm.KVStream(budget, buffer=part, inv_freq=inv_freq)
    add(STREAM, stream_predictions(model, ids, stream, sizes), stream.keys.shape[-2])
    return report


def show(report: Report) -> None:
    """Print the means of all documents, with 95 % intervals."""
    for text in TEXTS:
        parts = list(report[text].values())
        full = np.exp(np.mean([x["full"] for x in parts]))
        print(f"{text}: {len(parts)}; perplexity with all entries: {full:.2f}")
        for name in (*CONTENDERS, STREAM):
            figures = np.array([x[name] for x in parts])
            mean, low, high = interval(figures[:, 0])
            print(
                f"{name:36s} KL {mean:.4f} [{low:.4f}, {high:.4f}]  perplexity "
                f"{np.exp(figures[:, 1].mean()):6.2f}"
            )


def main() -> None:
    """Measure all documents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a random model, briefly")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    options = parser.parse_args()
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}")
    if options.quick:
        model, picked = smollm2.random_model(), byte_documents(1)
        sizes, budget = (128, 96, 32), 64
    else:
        model, tokenizer = smollm2.load()
        picked = documents(tokenizer, "held_out", 1)
        sizes, budget = (PROMPT, FOLLOWING, PART), BUDGET
    report: Report = {text: {} for text in TEXTS}
    prompt, following, _ = sizes
    for document in picked:
        own = generated(model, document.ids[:prompt], following + 1)
        for text, ids in zip(TEXTS, (document.ids, own), strict=True):
            report[text][document.name] = measure(model, ids, sizes, budget)
            print(f"{text}: {document.name} is done", flush=True)
            if options.json:
                write_json(options.json, report)
    show(report)


if __name__ == "__main__":
    main()
