"""Hidden states merged in the middle of a language model, against shorter caches.

    python benchmarks/lm_hidden_states.py [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct (smollm2.py). It reads 1,024 tokens of a held-out
document (documents.py). Before layer l, its hidden states are shortened to a fraction,
and the later layers read what remains; the earlier layers keep all their entries. The
model then predicts the 128 tokens that follow. KL is the divergence from the
predictions of the model as it is. Layer 0 reads the embeddings: that is the pipeline of
the paper. The contenders:

- merged: ward linkage of the hidden states, weighted by the attention that their tokens
  received in layer l; merged tokens have the position of their last member, and count
  log(size) in attention. The sinks and the most recent third do not merge.
- dropped by attention: the tokens that received the most attention, the sinks and the
  most recent half remain.
- the most recent: the first 4 tokens and the most recent ones remain.
- caches merged: hidden states stay as they are, and the entries of layers l and later
  are merged by `merge_kv_cache` to the same number.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import torch
from cache_methods import SINKS
from cache_methods import merged as merged_caches
from cache_reading import (
    Prompt,
    Shortened,
    mean_divergence,
    mean_loss,
    predict,
    read,
)
from documents import Document, byte_documents, documents
from quality_tables import interval
from report import write_json

import qm_cupy as qm

Report = dict[str, Any]
LENGTH, LAYERS, BUDGETS, COUNT = 1024, (0, 10, 20), (0.5, 0.25), 2


@torch.no_grad()
def hidden_states(model: Any, prompt: Prompt) -> tuple[torch.Tensor, ...]:
    """Return the hidden states (1, N, D) before each layer."""
    output = model.model(prompt.ids, output_hidden_states=True, use_cache=False)
    return tuple(output.hidden_states)


@torch.no_grad()
def later_layers(
    model: Any, hidden: torch.Tensor, sizes: Any, positions: Any, first: int
) -> list[Shortened]:
    """Return the entries of the layers from `first` on, which read tokens (1, K, D)."""
    with smollm2.other_kernels():
        from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    bias = torch.as_tensor(sizes).float().log()  # (K,)
    visible = torch.ones(len(bias), len(bias), dtype=torch.bool).tril()
    mask = torch.where(visible, bias, -torch.inf)[None, None]
    position_ids = torch.as_tensor(positions)[None].long()
    embeddings = model.model.rotary_emb(hidden, position_ids)
    for layer in model.model.layers[first:]:
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=embeddings, cache=cache
        )
    return [
        Shortened(x.keys, x.values, bias.expand(x.keys.shape[:-1]).clone())
        for x in cache.layers[first:]
    ]


def merged(hidden: torch.Tensor, received: torch.Tensor, count: int) -> tuple[Any, ...]:
    """Return merged tokens (1, K, D), their sizes and positions."""
    num_tokens = hidden.shape[1]
    protect = torch.zeros(num_tokens, dtype=torch.bool)
    protect[:SINKS] = protect[num_tokens - count // 3 :] = True
    mass = received * torch.arange(num_tokens, 0, -1)  # all attention, not the mean
    labels = qm.cluster_tokens(
        hidden[0], count, method="ward", mass=mass, protect=protect
    )
    tokens = qm.merge_tokens(hidden[0], labels, count, mass=mass)
    sizes = qm.group_sizes(labels, count)
    return tokens[None], sizes, qm.group_positions(labels, count)


def kept(hidden: torch.Tensor, positions: torch.Tensor) -> tuple[Any, ...]:
    """Return the tokens at ascending positions, their sizes and positions."""
    return hidden[:, positions], torch.ones(len(positions)), positions


def by_attention(received: torch.Tensor, count: int) -> torch.Tensor:
    """Return ascending positions: the most attended, the sinks, the most recent."""
    scores = received.clone()
    scores[:SINKS] = scores[len(scores) - count // 2 :] = torch.inf
    return scores.topk(count).indices.sort().values


def most_recent(num_tokens: int, count: int) -> torch.Tensor:
    """Return ascending positions: the sinks and the most recent."""
    recent = torch.arange(num_tokens - (count - SINKS), num_tokens)
    return torch.cat([torch.arange(SINKS), recent])


def measure(model: Any, document: Document, length: int, layers: Any) -> Report:
    """Return KL and loss by layer, budget and contender of one document."""
    prompt = read(model, document.context(length))
    states = hidden_states(model, prompt)
    ids, true = document.continuation[:-1], document.continuation[1:]
    expected = predict(model, prompt, prompt.whole, ids)
    report: Report = {"full": mean_loss(expected, true)}
    for first in layers:
        hidden, received = states[first], prompt.received[first].mean((0, 1))
        for budget in BUDGETS:
            count = int(length * budget)
            shorter = {
                "hidden states merged": merged(hidden, received, count),
                "dropped by attention": kept(hidden, by_attention(received, count)),
                "the most recent": kept(hidden, most_recent(length, count)),
            }
            later = {
                name: later_layers(model, *parts, first)
                for name, parts in shorter.items()
            }
            part = prompt.layers_from(first)
            later["caches merged"] = merged_caches(part, count, per_layer=True)
            for name, entries in later.items():
                result = predict(model, prompt, prompt.whole[:first] + entries, ids)
                row = report.setdefault(str(first), {}).setdefault(str(budget), {})
                kl = mean_divergence(expected, result)
                row[name] = kl, mean_loss(result, true)
    return report


def show(report: Report) -> None:
    """Print the means of all documents, with 95 % intervals."""
    parts = report["documents"].values()
    full = np.array([x["full"] for x in parts])
    print(f"{len(full)} documents; perplexity as it is: {np.exp(full.mean()):.2f}")
    first = next(iter(parts))
    for layer in (x for x in first if x != "full"):
        for budget, row in first[layer].items():
            for name in row:
                figures = np.array([x[layer][budget][name] for x in parts])
                mean, low, high = interval(figures[:, 0])
                print(
                    f"before layer {layer:2s} to {float(budget):4.0%} {name:22s} "
                    f"KL {mean:.4f} [{low:.4f}, {high:.4f}]  perplexity "
                    f"{np.exp(figures[:, 1].mean()):7.2f}"
                )


def main() -> None:
    """Measure all documents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a random model, briefly")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    options = parser.parse_args()
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}")
    if options.quick:
        model, picked, layers, length = (
            smollm2.random_model(),
            byte_documents(1),
            (0, 2),
            256,
        )
    else:
        model, tokenizer = smollm2.load()
        picked = documents(tokenizer, "held_out", COUNT)
        layers, length = LAYERS, LENGTH
    report: Report = {"documents": {}}
    for document in picked:
        report["documents"][document.name] = measure(model, document, length, layers)
        print(f"{document.name} is done", flush=True)
        if options.json:
            write_json(options.json, report)
    show(report)


if __name__ == "__main__":
    main()
