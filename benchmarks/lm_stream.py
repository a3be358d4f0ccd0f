"""A language model that reads on with constant memory: its cache merges as it grows.

    python benchmarks/lm_stream.py [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct (smollm2.py). It reads 1,024 tokens of a held-out
document (documents.py), and then 2,048 more in parts of 64. After each part, the cache
is shortened to 512 entries of each head, as `MergedCache(model, 512, every=64)` does
while it decodes one token at a time. KL is the divergence from the predictions with the
whole cache, a mean over the 2,048 tokens. The contenders:

- merged: `MergedCache`, with one budget for all layers, and with equal budgets.
- H2O: the most recent half of the budget, and the entries that received the most
  attention so far.
- the most recent: the first 4 entries and the most recent ones.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import smollm2
import torch
from cache_methods import SINKS
from cache_reading import mean_divergence, mean_loss
from documents import Document, byte_documents, documents
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


def measure(
    model: Any, document: Document, sizes: tuple[int, int, int], budget: int
) -> Report:
    """Return KL and loss of each contender on one document."""
    with smollm2.other_kernels():
        from transformers import DynamicCache

    prompt, following, _ = sizes
    true = document.ids[prompt + 1 : prompt + following + 1]
    whole = DynamicCache(config=model.config)
    expected = predictions(model, document.ids, whole, sizes)
    report: Report = {"full": mean_loss(expected, true)}
    for name, (function, options) in CONTENDERS.items():
        with shortening_by(function), MergedCache(model, budget, **options) as cache:
            result = predictions(model, document.ids, cache, sizes)
            report.setdefault("stored", {})[name] = cache.num_stored
        kl = mean_divergence(expected, result)
        report[name] = kl, mean_loss(result, true)
    return report


def show(report: Report) -> None:
    """Print the means of all documents, with 95 % intervals."""
    parts = list(report["documents"].values())
    full = np.mean([x["full"] for x in parts])
    print(f"{len(parts)} documents; perplexity with all entries: {np.exp(full):.2f}")
    for name in CONTENDERS:
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
    report: Report = {"documents": {}}
    for document in picked:
        report["documents"][document.name] = measure(model, document, sizes, budget)
        print(f"{document.name} is done", flush=True)
        if options.json:
            write_json(options.json, report)
    show(report)


if __name__ == "__main__":
    main()
