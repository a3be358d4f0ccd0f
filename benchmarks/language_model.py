"""A language model that reads fewer tokens: what it costs, against other methods.

    python benchmarks/language_model.py [--quick] [--lengths N ...] [--json FILE]
    python benchmarks/language_model.py --tune

The model is SmolLM2-135M-Instruct (smollm2.py), on documents of three classes
(documents.py). A context fills the cache, each method of cache_methods.py shortens it
to a fraction, and the model predicts the 128 tokens that follow. KL is the divergence
from its predictions with the whole cache, in nats. Figures are means over held-out
documents, with 95 % intervals by a bootstrap over documents.

`--tune` compares the settings of each method on the tuning documents, at a quarter of
the cache. `--quick` uses a random model with one short document: it only shows that the
code runs. With `--json`, the file is written after each document, and a document that
it has is not measured again.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import torch
from cache_budgets import ONE_BUDGET, ONE_BUDGET_CONTENDERS
from cache_improvements import TRIED
from cache_methods import (
    CONTENDERS,
    OURS,
    SELECTED,
    SNAPKV,
    VARIANTS,
    Shorten,
    settings_text,
)
from cache_reading import mean_divergence, predict, read
from cache_rereading import REREADING
from documents import Document, byte_documents, documents
from lm_continuation import Trial, continuation, summary
from report import write_json

import qm_cupy as qm

Report = dict[str, Any]
# How many held-out documents of each class are read with contexts of each length.
COUNTS = {512: 4, 1024: 4, 2048: 2, 4096: 1}
ALL_BUDGETS = 1024  # the length at which all budgets and variants are measured
BUDGETS, FEW_BUDGETS = (0.5, 0.25, 0.1, 0.05), (0.25, 0.1)
TUNING, TUNING_LENGTH = 2, 1024  # documents of each class, and their context
PEERS = SNAPKV, "H2O"


def plan(num_tokens: int) -> list[Trial]:
    """Return which methods are measured at which budgets."""
    whole = num_tokens == ALL_BUDGETS
    budgets = BUDGETS if whole else FEW_BUDGETS
    methods = {**OURS, **SELECTED}.items()
    trials = [Trial(name, x, budget) for name, x in methods for budget in budgets]
    if whole:
        trials += [Trial(name, x, 0.25) for name, x in VARIANTS.items()]
    return trials


def more_trials() -> list[Trial]:
    """Return what is compared with merging in a second table.

    These are methods that read the context twice, with all budgets, and at a quarter
    contenders with one budget for all heads, and what was tried to lose less. Merging
    itself is measured again beside them, because all of the context is read a second
    time here.
    """
    ours = ("merge_kv_cache, per_layer, per_head", "merge_kv_cache, per_layer")
    methods = {name: OURS[name] for name in ours} | ONE_BUDGET | TRIED
    trials = [Trial(name, x, 0.25) for name, x in methods.items()]
    again = REREADING.items()
    return trials + [Trial(name, x, budget) for name, x in again for budget in BUDGETS]


def candidates() -> dict[str, Shorten]:
    """Return every method with every setting, by a text that has both."""
    methods: dict[str, Shorten] = {}
    for name, some in CONTENDERS.items():
        methods |= {f"{name} {x.text}".strip(): x for x in some}
    for name, partials in ONE_BUDGET_CONTENDERS.items():
        for x in partials:
            # `how` is the method itself, and is in its name.
            settings = {key: y for key, y in x.keywords.items() if key != "how"}
            methods[f"{name} {settings_text(settings)}"] = x
    return methods


def tune(
    model: Any, some: list[Document], num_tokens: int, rows: dict[str, list[float]]
) -> Iterator[str]:
    """Append the KL of every setting on each document, and yield its name."""
    every = candidates()
    for index, document in enumerate(some):
        # An earlier run may have had fewer settings.
        missing = {x: y for x, y in every.items() if len(rows.get(x, [])) <= index}
        if not missing:
            continue
        prompt = read(model, document.context(num_tokens))
        ids = document.continuation[:-1]
        expected = predict(model, prompt, prompt.whole, ids)
        for name, method in missing.items():
            result = predict(model, prompt, method(prompt, num_tokens // 4), ids)
            rows.setdefault(name, []).append(mean_divergence(expected, result))
        yield document.name


def continuations(
    model: Any,
    read_documents: Callable[[int], list[Document]],
    counts: dict[int, int],
    report: Report,
    path: Path | None,
) -> None:
    """Measure contexts of each length, and write the report after each document."""
    parts = report.setdefault("continuation", {})
    for num_tokens, count in counts.items():
        part = parts.setdefault(str(num_tokens), {})
        picked = read_documents(count)
        for name in continuation(model, picked, num_tokens, plan(num_tokens), part):
            print(f"{num_tokens} tokens: {name} is done", flush=True)
            if path:
                write_json(path, report)
    num_tokens = ALL_BUDGETS if ALL_BUDGETS in counts else min(counts)
    part = report.setdefault("more", {}).setdefault(str(num_tokens), {})
    picked = read_documents(counts[num_tokens])
    args = model, picked, num_tokens, more_trials(), part
    for name in continuation(*args, repeated=num_tokens):
        print(f"{num_tokens} tokens, more methods: {name} is done", flush=True)
        if path:
            write_json(path, report)


def main() -> None:
    """Run the parts, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a random model, briefly")
    parser.add_argument("--tune", action="store_true", help="compare all settings")
    parser.add_argument(
        "--lengths", type=int, nargs="+", choices=COUNTS, default=COUNTS
    )
    parser.add_argument("--json", type=Path, help="add the results to a file")
    options = parser.parse_args()
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}")
    report: Report = {}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text(encoding="utf-8"))
    if options.quick:
        model = smollm2.random_model()
        counts, of_count = {512: 1}, byte_documents
    else:
        model, tokenizer = smollm2.load()
        counts = {length: COUNTS[length] for length in options.lengths}

        def of_count(count: int) -> list[Document]:
            return documents(tokenizer, "tuning" if options.tune else "held_out", count)

    if options.tune:
        rows = report.setdefault("tuning", {})
        length, count = (512, 1) if options.quick else (TUNING_LENGTH, TUNING)
        for name in tune(model, of_count(count), length, rows):
            print(f"{length} tokens, settings: {name} is done", flush=True)
            if options.json:
                write_json(options.json, report)
        for name in sorted(rows, key=lambda x: float(np.mean(rows[x]))):
            print(f"{np.mean(rows[name]):.4f}  {name}")
        return
    continuations(model, of_count, counts, report, options.json)
    for num_tokens, part in report["continuation"].items():
        summary(part, PEERS, int(num_tokens))
    for num_tokens, part in report["more"].items():
        summary(part, ("merge_kv_cache, per_layer",), int(num_tokens))


if __name__ == "__main__":
    main()
