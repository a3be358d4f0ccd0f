"""Eviction and attention matching with one budget for all layers and heads.

The contenders of cache_methods.py have equal budgets, as in their papers, and
`merge_kv_cache(per_layer=True, per_head=True)` has not. Here all heads compete for the
budget by their scores, as those of a layer do with Ada-KV.
"""

from functools import partial
from typing import Any

import torch
from cache_methods import SINKS, Shorten, snapkv_scores
from cache_reading import REPEATED, Prompt, Shortened

import qm_cupy as qm


def kept_of_all(scores: torch.Tensor, count: int, recent: int) -> torch.Tensor:
    """Return which entries (L, H, N) remain, with a mean of K for each head.

    The sinks and the `recent` last entries of each head do, and those with the largest
    scores (L, H, N).
    """
    # Entries that always remain come first.
    scores = scores.clone()
    scores[..., :SINKS] = scores[..., scores.shape[-1] - recent :] = torch.inf
    # Equal scores: exactly K remain on average.
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    best = scores.flatten().topk(count * scores[..., 0].numel()).indices
    wanted.view(-1)[best] = True
    return wanted


def evicted(
    prompt: Prompt, scores: torch.Tensor, count: int, recent: int
) -> list[Shortened]:
    """Keep the entries with the largest scores (L, H, N) of all layers and heads."""
    layers = []
    wanted = kept_of_all(scores, count, recent)
    for kept, keys, values in zip(wanted, prompt.keys, prompt.values, strict=True):
        # Heads are padded to the longest of their layer.
        longest = int(kept.sum(-1).max())
        order = kept.byte().sort(dim=-1, descending=True, stable=True).indices
        order = order[:, :longest]  # (H, K), the entries that remain first
        bias = torch.zeros(order.shape)
        bias[~kept.gather(-1, order)] = -torch.inf
        both = (x[0].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))[None]
                for x in (keys, values))  # fmt: skip
        layers.append(Shortened(*both, bias[None]))
    return layers


def rms(prompt: Prompt) -> torch.Tensor:
    """Return the root mean squares (L, H, N) of the attention of the last queries."""
    pairs = zip(prompt.queries, prompt.keys, strict=True)
    scores = [qm.score_keys(q[:, :, -256:], k, how="rms")[0] for q, k in pairs]
    return torch.stack(scores)


def scored(prompt: Prompt, count: int, *, how: str, recent: float) -> list[Shortened]:
    """Evict by the scores "rms", "received" (H2O) or "snapkv".

    `recent` is the fraction of K that the most recent entries take.
    """
    if how == "rms":
        scores = rms(prompt)
    elif how == "received":
        scores = torch.stack(prompt.received)[:, 0]
    else:
        layers = range(len(prompt.keys))
        # As with equal budgets, so that other entries are kept, too.
        window = min(64, count // 2)
        scores = torch.stack([snapkv_scores(prompt, x, window)[0] for x in layers])
    return evicted(prompt, scores, count, int(recent * count))


def matched(
    prompt: Prompt, count: int, *, recent: float, ridge: float
) -> list[Shortened]:
    """Fit attention matching to the numbers that heads keep by its own scores."""
    queries = [x[:, :, -REPEATED:] for x in prompt.repeated]
    scores = torch.stack([
        qm.score_keys(q, k, how="rms", causal=False)[0]
        for q, k in zip(queries, prompt.keys, strict=True)
    ])  # fmt: skip
    last = int(recent * count)
    counts = kept_of_all(scores, count, last).sum(-1)  # (L, H)
    layers = []
    for i, query in enumerate(queries):
        options: Any = {"scores": scores[i][None], "sinks": SINKS, "recent": last}
        cache = qm.match_attention(
            query, prompt.keys[i], prompt.values[i], counts[i].numpy(), causal=False,
            ridge=ridge, **options,
        )  # fmt: skip
        layers.append(Shortened(cache.keys, cache.values, cache.bias))
    return layers


_NAMES = {"RMS attention": "rms", "H2O": "received", "SnapKV": "snapkv"}
# The settings that `language_model.py --tune` compares.
ONE_BUDGET_CONTENDERS: dict[str, list[Shorten]] = {
    "attention matching, one budget": [
        partial(matched, recent=x, ridge=1e-4) for x in (0.1, 0.5)
    ],
    **{
        f"{name}, one budget": [
            partial(scored, how=how, recent=x) for x in (0.1, 0.25, 0.5, 0.75)
        ]
        for name, how in _NAMES.items()
    },
}
# Those with the least KL divergence on the tuning documents.
ONE_BUDGET: dict[str, Shorten] = {
    "attention matching, one budget": partial(matched, recent=0.1, ridge=1e-4),
    "RMS attention, one budget": partial(scored, how="rms", recent=0.5),
    "H2O, one budget": partial(scored, how="received", recent=0.75),
    "SnapKV, one budget": partial(scored, how="snapkv", recent=0.5),
}
