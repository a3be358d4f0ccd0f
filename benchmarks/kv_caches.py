"""A language model that reads merged key-value caches: its output, and the times.

    python benchmarks/kv_caches.py [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct (smollm2.py). A prompt of 768 tokens of Python's
documentation (`pydoc_data.topics`) fills its cache. Every layer and head is shortened
by one method, and the model then predicts the 96 tokens that follow. KL is the mean
divergence of these predictions from those with the whole cache, in nats; lower is
better. Perplexity is that of the true tokens. The options of `merge_kv_cache` were
tuned on the other 22 texts of this length, except `recent`, which was chosen on all 28.

The second part merges a cache of 32,768 random entries in every layer and head, and
decodes tokens from it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import smollm2
import torch
from report import write_json

import qm_cupy as qm
from qm_cupy.transformers import MergedCache

PROMPT, PREDICTED = 768, 96
SINKS, WINDOW = 4, 64
# Numbers in alphabetical order; the other texts were for tuning.
TEST_TEXTS = 0, 4, 8, 12, 16, 22


class Prompt(NamedTuple):
    """A text whose prompt the model has read, and what its layers have stored."""

    ids: torch.Tensor  # (1, PROMPT + PREDICTED + 1)
    keys: list[torch.Tensor]  # each (1, H, N, d)
    values: list[torch.Tensor]
    queries: list[torch.Tensor]  # (1, H_q, N, d)
    received: list[torch.Tensor]  # (1, H, N)
    expected: torch.Tensor  # (PREDICTED, V), log-probabilities


Shortened = tuple[Any, Any, Any]  # keys, values and biases of a layer
Method = Callable[[Prompt, int, int], Shortened]


def texts(tokenizer: Any) -> dict[str, list[int]]:
    """Return the tokens of all texts that are long enough, by their names."""
    from pydoc_data.topics import topics

    length = PROMPT + PREDICTED + 1
    tokens = {name: tokenizer(topics[name]).input_ids for name in sorted(topics)}
    return {name: ids[:length] for name, ids in tokens.items() if len(ids) >= length}


@torch.no_grad()
def read(model: Any, ids: list[int]) -> Prompt:
    """Let the model read a prompt, and keep all keys, values and queries."""
    cache, queries = MergedCache(model, 1.0), []
    for layer in cache.layers:
        layer.after_attention = lambda query, num_new: queries.append(query)
    tokens = torch.tensor([ids])
    model(tokens[:, :PROMPT], cache=cache)
    cache.remove()
    keys = [layer.keys for layer in cache.layers]
    values = [layer.values for layer in cache.layers]
    received = [qm.score_keys(q, k) for q, k in zip(queries, keys, strict=True)]
    zeros = [torch.zeros(k.shape[:-1]) for k in keys]
    whole = list(zip(keys, values, zeros, strict=True))
    expected = predict(model, tokens, whole)
    return Prompt(tokens, keys, values, queries, received, expected)


@torch.no_grad()
def predict(model: Any, ids: torch.Tensor, layers: list[Shortened]) -> torch.Tensor:
    """Return the log-probabilities of the tokens after the prompt (PREDICTED, V)."""
    cache = MergedCache(model.config, 1.0)
    for layer, (keys, values, bias) in zip(cache.layers, layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.bias = keys, values, bias.float()
        layer.seen = PROMPT
        state = torch.zeros(bias.shape)
        layer.positions, layer.received, layer.counts = state.long(), state, state
    tokens = ids[:, PROMPT : PROMPT + PREDICTED]
    logits: torch.Tensor = model(tokens, cache=cache).logits
    return logits[0].log_softmax(-1)


def kept(cache: qm.KVCache[Any]) -> Shortened:
    """Return what attention reads of a shortened cache."""
    return cache.keys, cache.values, cache.bias


def merged(inv_freq: Any, **options: Any) -> Method:
    """Return `merge_kv_cache` with the queries of the prompt."""

    def shorten(prompt: Prompt, layer: int, count: int) -> Shortened:
        cache = qm.merge_kv_cache(
            prompt.keys[layer],
            prompt.values[layer],
            count,
            query=prompt.queries[layer][:, :, -32:],
            attention=prompt.received[layer],
            inv_freq=inv_freq,
            **options,
        )
        return kept(cache)

    return shorten


def methods(inv_freq: Any) -> dict[str, Method]:
    """Return all methods by their names."""

    def keys_alone(prompt: Prompt, layer: int, count: int) -> Shortened:
        arrays = prompt.keys[layer], prompt.values[layer], count
        return kept(qm.merge_kv_cache(*arrays, inv_freq=inv_freq))

    def evicted(scores: Any, prompt: Prompt, layer: int, count: int, **options: Any):
        arrays = prompt.keys[layer], prompt.values[layer], count
        return kept(qm.evict(*arrays, scores=scores, **options))

    def snapkv(prompt: Prompt, layer: int, count: int) -> Shortened:
        query = prompt.queries[layer][:, :, -WINDOW:]
        scores = qm.score_keys(query, prompt.keys[layer], how="snapkv")
        recent = min(WINDOW, count // 2)
        return evicted(scores, prompt, layer, count, recent=recent)

    def h2o(prompt: Prompt, layer: int, count: int) -> Shortened:
        options = {"sinks": SINKS, "recent": count // 2}
        return evicted(prompt.received[layer], prompt, layer, count, **options)

    def recent(prompt: Prompt, layer: int, count: int) -> Shortened:
        options = {"sinks": SINKS, "recent": count - SINKS}
        return evicted(prompt.received[layer], prompt, layer, count, **options)

    def expected(prompt: Prompt, layer: int, count: int) -> Shortened:
        arrays = prompt.queries[layer], prompt.keys[layer]
        scores = qm.score_keys(*arrays, values=prompt.values[layer], how="expected")
        return evicted(scores, prompt, layer, count, sinks=SINKS)

    def matched(prompt: Prompt, layer: int, count: int) -> Shortened:
        arrays = prompt.keys[layer], prompt.values[layer], count
        query = prompt.queries[layer][:, :, -256:]
        return kept(qm.match_attention(query, *arrays, sinks=SINKS, recent=32))

    return {
        "merge_kv_cache, per_head": merged(inv_freq, per_head=True),
        "merge_kv_cache, per_head, one window": merged(
            inv_freq, per_head=True, window=PROMPT
        ),
        "merge_kv_cache": merged(inv_freq),
        "merge_kv_cache, calibrate=False": merged(inv_freq, calibrate=False),
        "merge_kv_cache, keys alone": keys_alone,
        "H2O": h2o,
        "SnapKV": snapkv,
        "expected attention": expected,
        "attention matching": matched,
        "sinks and recent": recent,
    }


def quality(model: Any, tokenizer: Any, budgets: list[float], count: int) -> Any:
    """Print and return KL and perplexity of each method at each budget."""
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()
    every = texts(tokenizer)
    names = [list(every)[i] for i in TEST_TEXTS[:count]]
    prompts = [read(model, every[name]) for name in names]
    results: dict[str, Any] = {"texts": names, "methods": {}}
    print(f"{'method':38s}" + "".join(f"{b:>10.0%} KL   ×  ppl" for b in budgets))
    rows: dict[str, list[dict[str, float]]] = {}
    for budget in budgets:
        size = int(PROMPT * budget)
        for name, shorten in methods(inv_freq).items():
            rows.setdefault(name, []).append(_measure(model, prompts, shorten, size))
    for name, row in rows.items():
        cells = []
        for cell, reference in zip(row, rows["SnapKV"], strict=True):
            cell["ratio"] = cell["kl"] / reference["kl"]
            cells.append(
                f"{cell['kl']:13.4f} {cell['ratio']:4.2f} {cell['perplexity']:6.2f}"
            )
        print(f"{name:38s}" + "".join(cells))
        results["methods"][name] = dict(zip(map(str, budgets), row, strict=True))
    full = [_perplexity(p.expected, p.ids) for p in prompts]
    results["perplexity of the whole cache"] = float(np.exp(np.mean(full)))
    print(f"whole cache: perplexity {results['perplexity of the whole cache']:.2f}")
    return results


def _measure(
    model: Any, prompts: list[Prompt], shorten: Method, size: int
) -> dict[str, float]:
    """Return the mean KL and the perplexity of one method."""
    divergences, losses = [], []
    for prompt in prompts:
        layers = [shorten(prompt, layer, size) for layer in range(len(prompt.keys))]
        got = predict(model, prompt.ids, layers)
        p = prompt.expected.exp()
        divergences.append(float((p * (prompt.expected - got)).sum(-1).mean()))
        losses.append(_perplexity(got, prompt.ids))
    return {
        "kl": float(np.mean(divergences)),
        "perplexity": float(np.exp(np.mean(losses))),
        "kl of each text": divergences,  # type: ignore[dict-item]
    }


def _perplexity(predicted: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the mean negative log-probability of the true tokens."""
    true = ids[0, PROMPT + 1 : PROMPT + 1 + PREDICTED]
    return -float(predicted.gather(1, true[:, None]).mean())


@torch.no_grad()
def cost(model: Any, num_entries: int, num_decoded: int) -> dict[str, float]:
    """Print and return the times of a merge and of decoding from the whole cache."""
    config = model.config
    heads, dim = config.num_key_value_heads, 64
    rng = torch.Generator().manual_seed(0)
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()
    seconds = 0.0
    cache = MergedCache(config, num_entries)
    for layer in cache.layers:
        keys, values = torch.randn((2, 1, heads, num_entries, dim), generator=rng)
        query = torch.randn((1, 3 * heads, 32, dim), generator=rng)
        received = torch.rand((1, heads, num_entries), generator=rng)
        start = time.perf_counter()
        qm.merge_kv_cache(
            keys, values, 0.25, query=query, attention=received, inv_freq=inv_freq
        )
        seconds += time.perf_counter() - start
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.seen = keys, values, num_entries
        state = torch.zeros(keys.shape[:-1])
        layer.positions, layer.received, layer.counts = state.long(), state, state
    start = time.perf_counter()
    for _ in range(num_decoded):
        model(torch.tensor([[1]]), cache=cache)
    step = (time.perf_counter() - start) / num_decoded
    print(
        f"{num_entries} entries × {config.num_hidden_layers} layers × {heads} heads: "
        f"merged in {seconds:.1f} s; a token is decoded in {step:.3f} s from the whole "
        f"cache, so the merge takes as long as {seconds / step:.0f} tokens"
    )
    return {"entries": num_entries, "merge seconds": seconds, "token seconds": step}


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one text, a short cache")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    options = parser.parse_args()
    model, tokenizer = smollm2.load()
    budgets = [0.25] if options.quick else [0.5, 0.25, 0.1]
    results = quality(model, tokenizer, budgets, 1 if options.quick else 6)
    results["cost"] = cost(model, *((2048, 2) if options.quick else (32768, 10)))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
