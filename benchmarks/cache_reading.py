"""Reading a prompt, shortening its key-value cache, and reading on from there.

A model of transformers reads N tokens with whole caches. What each layer has stored
becomes a `Prompt`. A method returns the entries that each layer keeps, as `Shortened`.
The model then reads the next tokens, at their true positions, or generates them.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from qm_cupy.transformers import MergedCache

REPEATED = 256  # last tokens of a prompt that are read again, for attention matching
_ROWS = 256  # queries at once


class Shortened(NamedTuple):
    """The entries of one layer that attention reads."""

    keys: torch.Tensor  # (1, H, K, d)
    values: torch.Tensor  # (1, H, K, d)
    bias: torch.Tensor  # (1, H, K); -inf for padding of heads with fewer entries


class Prompt(NamedTuple):
    """A text that a model has read, and what its layers have stored."""

    ids: torch.Tensor  # (1, N)
    keys: list[torch.Tensor]  # of each layer, (1, H, N, d)
    values: list[torch.Tensor]
    queries: list[torch.Tensor]  # rotated, (1, H_q, N, d)
    received: list[torch.Tensor]  # mean attention that each entry received, (1, H, N)
    inv_freq: Any  # of the rotation of keys (d/2,)
    repeated: list[torch.Tensor]
    """Queries (1, H_q, T, d) of the prompt's last tokens, read once more after it."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.ids.shape[-1]

    def layers_from(self, first: int) -> "Prompt":
        """Return the prompt without the layers before `first`."""
        names = "keys", "values", "queries", "received", "repeated"
        return self._replace(**{name: getattr(self, name)[first:] for name in names})

    @property
    def whole(self) -> list[Shortened]:
        """All entries of each layer."""
        return [
            Shortened(k, v, torch.zeros(k.shape[:-1]))
            for k, v in zip(self.keys, self.values, strict=True)
        ]


def layers_of(cache: Any) -> list[Shortened]:
    """Return the layers of a `KVCache` (L, 1, H, K, d), each without common padding.

    They are copies, each as long as its longest head, so that the rest is freed.
    """
    counts = cache.valid.sum(-1).amax((-2, -1)).tolist()
    rows = zip(cache.keys, cache.values, cache.bias, counts, strict=True)
    return [
        Shortened(k[..., :n, :].clone(), v[..., :n, :].clone(), b[..., :n].clone())
        for k, v, b, n in rows
    ]


def mean_kept(layers: list[Shortened]) -> float:
    """Return the mean number of entries of a head, without padding."""
    present = [x.bias.isfinite().sum(-1).float().mean() for x in layers]
    return float(torch.stack(present).mean())


def mean_divergence(expected: torch.Tensor, predicted: torch.Tensor) -> float:
    """Return the mean KL divergence of log-probabilities (T, V), in nats."""
    return float((expected.exp() * (expected - predicted)).sum(-1).mean())


def mean_loss(predicted: torch.Tensor, true: list[int]) -> float:
    """Return the mean negative log-probability of the T true tokens."""
    return -float(predicted.gather(1, torch.tensor(true)[:, None]).mean())


@torch.no_grad()
def read(model: Any, ids: list[int], repeated: int = REPEATED) -> Prompt:
    """Let the model read a prompt, and keep all keys, values and queries.

    Its last `repeated` tokens are then read once more, after it.
    """
    queries: list[torch.Tensor] = []
    tokens = torch.tensor([ids])
    with MergedCache(model, 1.0) as cache:
        for layer in cache.layers:
            layer.after_attention = partial(take_queries, layer, queries)
        model.model(tokens, cache=cache)  # without the logits
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        num_layers = len(queries)
        model.model(tokens[:, -repeated:], cache=cache)  # keys and values stay
    queries, again = queries[:num_layers], queries[num_layers:]
    received = [mean_received(q, k) for q, k in zip(queries, keys, strict=True)]
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()
    return Prompt(tokens, keys, values, queries, received, inv_freq, again)


def take_queries(
    layer: Any, queries: list[torch.Tensor], query: torch.Tensor, num_new: int
) -> None:
    """Append the queries of a layer to a list, instead of merging its entries."""
    layer.waits = False
    queries.append(query)


def mean_received(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mean attention that each entry receives (1, H, N).

    It is the result of `score_keys(query, keys)`, faster: torch has a faster exp.
    """
    heads, num_tokens, dim = keys.shape[1:]
    rows = query.reshape(heads, -1, num_tokens, dim)  # (H, G, N, d)
    total = torch.zeros(heads, num_tokens, device=keys.device)
    for start in range(0, num_tokens, _ROWS):
        end = min(start + _ROWS, num_tokens)
        visible = keys[0, :, None, :end].transpose(-1, -2)
        scores = rows[:, :, start:end] @ visible * dim**-0.5  # (H, G, rows, end)
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(start + 1)
        scores = scores.masked_fill_(later, -torch.inf).softmax(-1)
        total[:, :end] += scores.sum((1, 2))
    # Entry j receives attention from N - j queries of each of the G heads.
    counts = torch.arange(num_tokens, 0, -1, device=keys.device) * rows.shape[1]
    return (total / counts)[None]


def filled_cache(
    model: Any, layers: list[Shortened], num_seen: int, hooks: bool = False
) -> MergedCache:
    """Return a cache with these entries, after which position `num_seen` follows.

    With `hooks`, the model brings it the queries.
    """
    cache = MergedCache(model if hooks else model.config, 1.0)
    for layer, (keys, values, bias) in zip(cache.layers, layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.bias = keys, values, bias.float()
        layer.seen = num_seen
        state = torch.zeros_like(layer.bias)
        layer.positions, layer.received, layer.counts = state.long(), state, state
    return cache


@torch.no_grad()
def predict(
    model: Any, prompt: Prompt, layers: list[Shortened], ids: list[int]
) -> torch.Tensor:
    """Return log-probabilities (T, V) after each of the T tokens that follow."""
    cache = filled_cache(model, layers, prompt.num_tokens)
    logits: torch.Tensor = model(torch.tensor([ids]), cache=cache).logits
    return logits[0].log_softmax(-1)


@torch.no_grad()
def generate(
    model: Any,
    prompt: Prompt,
    layers: list[Shortened],
    ids: list[int],
    count: int,
    stop: frozenset[int] = frozenset(),
) -> list[int]:
    """Read `ids`, then generate up to `count` tokens; each is the most probable one.

    A token of `stop` ends the text, and is not a part of it.
    """
    cache = filled_cache(model, layers, prompt.num_tokens)
    text: list[int] = []
    logits = model(torch.tensor([ids]), cache=cache, logits_to_keep=1).logits
    for _ in range(count):
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        text.append(token)
        logits = model(torch.tensor([[token]]), cache=cache).logits
    return text
