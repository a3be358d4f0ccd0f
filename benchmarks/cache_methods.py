"""Methods that shorten the cache of a prompt, with the settings that each can have.

Every method gets a prompt and K, the mean number of entries that a head keeps, and
returns what each layer keeps. `CONTENDERS` has the methods and, for each, the settings
that `language_model.py --tune` compares on the tuning documents. `SELECTED` has those
with the least KL divergence there, and other settings of the method where a figure
without one ingredient is of interest.

The scores are those of `score_keys`, whose references name the papers. Sources of the
others:

- Expected attention: A. Devoto et al., arXiv:2510.00636, as in its authors' library
  kvpress: with the queries before their rotation, and ε = 0.
- Attention matching: arXiv:2602.16284. Its queries are those of a second reading of the
  prompt's last tokens.
- PyramidKV: Z. Cai et al., arXiv:2406.02069. The budgets of the layers fall linearly,
  from 2 K - K_min in the first layer to K_min in the last one, by SnapKV's score.
- Ada-KV: Y. Feng et al., arXiv:2407.11550. The heads of a layer compete for its budget
  by SnapKV's score, and each of them keeps at least a fifth of K.
- key norm: A. Devoto et al., arXiv:2406.11430. Keys with small norms are kept.
- ToMe: D. Bolya et al., arXiv:2210.09461. Bipartite soft matching of keys, repeated
  until K are left; the bias of a merged entry is log n.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from cache_reading import REPEATED, Prompt, Shortened, layers_of

import qm_cupy as qm

OneLayer = Callable[..., Any]  # (prompt, layer, K, **settings) -> KVCache
SINKS = 4


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings as text."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


class Method(NamedTuple):
    """A method with its settings."""

    shorten: OneLayer
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    beta: int = 1
    """The last layer keeps K / beta entries; the budgets of all layers are a line."""

    @property
    def text(self) -> str:
        """The settings as text."""
        beta = {"beta": self.beta} if self.beta > 1 else {}
        return settings_text(self.settings | beta)

    def __call__(self, prompt: Prompt, count: int) -> list[Shortened]:
        """Return what each layer keeps, with a mean of `count` entries of each head."""
        least = max(count // self.beta, 1)
        largest = min(2 * count - least, prompt.num_tokens)
        budgets = np.linspace(largest, 2 * count - largest, len(prompt.keys))
        caches = [
            self.shorten(prompt, layer, round(budget), **self.settings)
            for layer, budget in enumerate(budgets)
        ]
        return [Shortened(x.keys, x.values, x.bias) for x in caches]


def merged(
    prompt: Prompt,
    count: int | None,
    *,
    queries: int = 256,
    received: bool = True,
    rotated: bool = False,
    **options: Any,
) -> list[Shortened]:
    """Merge all layers by `merge_kv_cache`.

    `queries=0` passes none of them, `received=False` not the attention received, and
    `rotated=True` compares rotated keys.
    """
    query = [x[:, :, -queries:] for x in prompt.queries]
    cache = qm.merge_kv_cache(
        torch.stack(prompt.keys),
        torch.stack(prompt.values),
        count,
        query=torch.stack(query) if queries else None,
        attention=torch.stack(prompt.received) if received else None,
        inv_freq=None if rotated else prompt.inv_freq,
        **options,
    )
    return layers_of(cache)


def kept(
    prompt: Prompt, layer: int, count: int, scores: Any, recent: float, **options: Any
) -> Any:
    """Keep the entries with the largest scores, the sinks and the most recent.

    `recent` is the fraction of K that the most recent entries take.
    """
    options.setdefault("sinks", SINKS)
    arrays = prompt.keys[layer], prompt.values[layer], count
    return qm.evict(*arrays, scores=scores, recent=int(recent * count), **options)


def scored(how: str, queries: int) -> OneLayer:
    """Return eviction by a score of `score_keys`, of the last queries."""

    def evicted(
        prompt: Prompt, layer: int, count: int, recent: float, **options: Any
    ) -> Any:
        query, keys = prompt.queries[layer][:, :, -queries:], prompt.keys[layer]
        scores = qm.score_keys(query, keys, how=how)
        return kept(prompt, layer, count, scores, recent, **options)

    return evicted


def expected(prompt: Prompt, layer: int, count: int, future: int, recent: float) -> Any:
    """Keep entries by the attention that the next `future` queries are to pay.

    The mean μ and the covariance Σ of the queries before their rotation are rotated by
    the mean rotation R of these positions: R μ and R Σ Rᵀ. The score is
    (softmax(c k · Rμ + c² kᵀ RΣRᵀ k / 2) + ε) |v|, averaged over query heads.
    """
    keys, values = prompt.keys[layer][0], prompt.values[layer][0]  # (H, N, d)
    heads, num_tokens, dim = keys.shape
    query = prompt.queries[layer][0].reshape(heads, -1, num_tokens, dim)
    rotation = rotations(np.arange(num_tokens), prompt.inv_freq)  # (N, d, d)
    straight = (query[..., SINKS:, None, :] @ rotation[SINKS:])[..., 0, :]
    mean = straight.mean(-2, keepdim=True)  # (H, G, 1, d)
    centred = straight - mean
    covariance = centred.mT @ centred / centred.shape[-2]
    average = rotations(num_tokens + np.arange(future), prompt.inv_freq).mean(0)
    mean, covariance = mean @ average.mT, average @ covariance @ average.mT
    wide = keys[:, None]  # (H, 1, N, d)
    scores = (wide @ mean.mT)[..., 0] * dim**-0.5  # (H, G, N)
    scores = scores + ((wide @ covariance) * wide).sum(-1) / (2 * dim)
    weights = scores.softmax(-1).mean(1)  # (H, N)
    return kept(prompt, layer, count, (weights * values.norm(dim=-1))[None], recent)


def rotations(positions: Any, inv_freq: Any) -> torch.Tensor:
    """Return R (n, d, d) of positions; R x is x after its rotation."""
    angle = torch.tensor(positions[:, None] * inv_freq)  # (n, d/2)
    cosine, sine = (torch.diag_embed(f(angle)) for f in (torch.cos, torch.sin))
    upper, lower = torch.cat([cosine, -sine], -1), torch.cat([sine, cosine], -1)
    return torch.cat([upper, lower], -2).float()


def h2o(prompt: Prompt, layer: int, count: int, recent: float, **options: Any) -> Any:
    """Keep entries by the mean or by the sum of the attention that they received."""
    scores = prompt.received[layer]
    if options.pop("total", False):
        scores = scores * torch.arange(scores.shape[-1], 0, -1)
    return kept(prompt, layer, count, scores, recent, **options)


def snapkv_scores(prompt: Prompt, layer: int, window: int) -> torch.Tensor:
    """Return SnapKV's scores (1, H, N) by the last `window` queries."""
    query = prompt.queries[layer][:, :, -window:]
    return qm.score_keys(query, prompt.keys[layer], how="snapkv")


def snapkv(prompt: Prompt, layer: int, count: int, window: int) -> Any:
    """Keep entries by SnapKV's score, and the window of its queries.

    The window is at most half of K, so that other entries are kept, too.
    """
    window = min(window, count // 2)
    scores = snapkv_scores(prompt, layer, window)
    arrays = prompt.keys[layer], prompt.values[layer], count
    return qm.evict(*arrays, scores=scores, recent=window)


def ada_kv(prompt: Prompt, layer: int, count: int, window: int) -> Any:
    """Let the heads of a layer compete by SnapKV's score, above a fifth of K."""
    window = min(window, count // 2)
    scores = snapkv_scores(prompt, layer, window)
    least = max(count // 5, 1)
    first = scores.topk(least, dim=-1).indices
    scores = scores.scatter(-1, first, float(scores.max()) + 1)  # never dropped
    arrays = prompt.keys[layer], prompt.values[layer], count
    return qm.evict(*arrays, scores=scores, recent=window, per_head=True)


def key_norm(
    prompt: Prompt, layer: int, count: int, recent: float, **options: Any
) -> Any:
    """Keep entries whose keys have small norms."""
    scores = -prompt.keys[layer].norm(dim=-1)
    return kept(prompt, layer, count, scores, recent, **options)


def sinks_and_recent(prompt: Prompt, layer: int, count: int) -> Any:
    """Keep the first entries and the most recent ones (StreamingLLM)."""
    scores = prompt.received[layer]
    arrays = prompt.keys[layer], prompt.values[layer], count
    return qm.evict(*arrays, scores=scores, sinks=SINKS, recent=count - SINKS)


def matched(prompt: Prompt, layer: int, count: int, recent: float, ridge: float) -> Any:
    """Keep entries, and fit their biases and values to queries that read it again."""
    query = prompt.repeated[layer][:, :, -REPEATED:]
    arrays = query, prompt.keys[layer], prompt.values[layer], count
    options = {"sinks": SINKS, "recent": int(recent * count), "ridge": ridge}
    return qm.match_attention(*arrays, causal=False, **options)


def tome(prompt: Prompt, layer: int, count: int, recent: float) -> Any:
    """Merge entries by ToMe's bipartite soft matching of their keys."""
    keys, values = prompt.keys[layer][0], prompt.values[layer][0]  # (H, N, d)
    last = int(recent * count)
    kept_apart = torch.zeros(keys.shape[1], dtype=torch.bool)
    kept_apart[:SINKS] = kept_apart[keys.shape[1] - last :] = True
    labels = qm.cluster_tokens(keys, count, method="bipartite", protect=kept_apart)
    bias = qm.group_sizes(labels, count).float().log()
    both = (qm.merge_tokens(x, labels, count)[None] for x in (keys, values))
    return Shortened(*both, bias[None])


def options(**lists: list[Any]) -> list[dict[str, Any]]:
    """Return all combinations of the values of settings."""
    return [
        dict(zip(lists, values, strict=True))
        for values in itertools.product(*lists.values())
    ]


_RECENT = [0.25, 0.5, 0.75, 0.9]
_WINDOWS = [16, 64]
# The settings that are compared on the tuning documents.
CONTENDERS: dict[str, list[Method]] = {
    "sinks and recent": [Method(sinks_and_recent)],
    "H2O": [Method(h2o, x) for x in options(recent=_RECENT, total=[False, True])],
    "SnapKV": [Method(snapkv, x) for x in options(window=_WINDOWS)],
    "PyramidKV": [
        Method(snapkv, x, beta) for x in options(window=_WINDOWS) for beta in (2, 5)
    ],
    "Ada-KV": [Method(ada_kv, x) for x in options(window=_WINDOWS)],
    "TOVA": [Method(scored("last", 1), x) for x in options(recent=_RECENT)],
    "expected attention": [
        Method(expected, x) for x in options(future=[128, 512], recent=_RECENT)
    ],
    "RMS attention": [Method(scored("rms", 256), x) for x in options(recent=_RECENT)],
    "key norm": [Method(key_norm, x) for x in options(recent=_RECENT)],
    "attention matching": [
        Method(matched, x) for x in options(recent=[0.1, 0.5], ridge=[1e-5, 1e-4, 1e-3])
    ],
    "ToMe matching": [Method(tome, x) for x in options(recent=[0.1, 0.3, 0.5])],
}

Shorten = Callable[[Prompt, int], list[Shortened]]
SNAPKV = "SnapKV"
# The settings with the least KL divergence on the tuning documents.
SELECTED: dict[str, Shorten] = {
    "attention matching": Method(matched, {"recent": 0.1, "ridge": 1e-4}),
    "H2O": Method(h2o, {"recent": 0.5, "total": False}),
    SNAPKV: Method(snapkv, {"window": 64}),
    "Ada-KV": Method(ada_kv, {"window": 64}),
    "PyramidKV": Method(snapkv, {"window": 64}, 2),
    "TOVA": Method(scored("last", 1), {"recent": 0.9}),
    "RMS attention": Method(scored("rms", 256), {"recent": 0.25}),
    "expected attention": Method(expected, {"future": 128, "recent": 0.5}),
    "key norm": Method(key_norm, {"recent": 0.9}),
    "ToMe matching": Method(tome, {"recent": 0.5}),
    "sinks and recent": Method(sinks_and_recent),
}
LAYERS = {"per_layer": True}
# Merging, with and without one budget of the layers, and of their heads.
OURS: dict[str, Shorten] = {
    "merge_kv_cache, per_layer, per_head": partial(merged, per_head=True, **LAYERS),
    "merge_kv_cache, per_layer": partial(merged, **LAYERS),
    "merge_kv_cache, per_head": partial(merged, per_head=True),
    "merge_kv_cache": merged,
}
# `per_layer` with another choice each.
VARIANTS: dict[str, Shorten] = {
    "per_layer, rotate_at=first": partial(merged, rotate_at="first", **LAYERS),
    "per_layer, not calibrated": partial(merged, calibrate=False, **LAYERS),
    "per_layer, 32 queries alone": partial(
        merged, queries=32, received=False, **LAYERS
    ),
    "per_layer, keys alone": partial(merged, queries=0, received=False, **LAYERS),
    "per_layer, rotated keys compared": partial(merged, rotated=True, **LAYERS),
}
