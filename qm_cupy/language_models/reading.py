"""Reading of tokens after a state: attention to all entries, and the next state.

A pass reads T tokens of each of B sequences after N entries. A layer has H heads of
keys, which G heads of queries each read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..caches.attend import compute_attend
from ..caches.attention_columns import attention_columns
from ..caches.cache_features import MAX_QUERIES
from ..cuda.launch import contiguous
from .llama_weights import Settings
from .model_state import Attended, ModelState
from .network import run_head, run_layers
from .read_checks import Inputs
from .state_entries import Entries, padded


def predict_logits(inputs: Inputs, weights: Mapping[str, Any], model: Settings) -> Any:
    """Return the logits (B, T, V) of tokens that attend only to each other."""
    x, positions, bias = inputs
    scale = model.head_dim**-0.5
    if positions is None:
        positions = following(0, x)

    def attention(layer: int, query: Any, keys: Any, values: Any) -> Any:
        b = None if bias is None else np.broadcast_to(bias, keys.shape[:-1])
        arrays = contiguous(query), contiguous(keys), contiguous(values)
        return compute_attend(*arrays, bias=b, causal=True, scale=scale)[0]

    x = run_layers(x, positions, weights, model, attention)
    return run_head(x, weights, model)


def read_tokens(
    inputs: Inputs,
    state: ModelState | None,
    weights: Mapping[str, Any],
    model: Settings,
    convert_back: Callable[[Any], Any],
    last_only: bool = False,
) -> tuple[Any, ModelState]:
    """Return the logits (B, T, V), or (B, 1, V) with `last_only`, and the new state."""
    x, positions, bias = inputs
    first = 0 if state is None else state.next_position
    end = first + x.shape[1]
    if positions is None:
        positions = following(first, x)
    else:  # padding of merged tokens has position -1
        end = positions.max(axis=-1) + 1
    reading = Reading.after(state, x, positions, bias, model)
    x = run_layers(x, positions, weights, model, reading.attention)
    logits = run_head(x[:, -1:] if last_only else x, weights, model)
    return logits, reading.state(state, end, convert_back)


def following(first: Any, x: Any) -> Any:
    """Return the positions (T,) or (B, T) of tokens x from a first one () or (B,)."""
    count = np.arange(x.shape[1], like=x)
    return count + (first if isinstance(first, int) else first[:, None])


@dataclass
class Reading:
    """A pass that writes keys and values to the entries, layer by layer."""

    entries: tuple[Entries, ...]
    starts: tuple[int, ...]  # N, the entries of each layer before the pass
    num_new: int  # T
    biased: bool
    settings: Settings
    before: Attended | None
    received: list[Any] = field(default_factory=list)  # of each layer, (B, H, N + T)
    query: list[Any] = field(default_factory=list)  # of each layer, (B, G H, ≤ 256, d)

    @classmethod
    def after(
        cls,
        state: ModelState | None,
        x: Any,
        positions: Any,
        bias: Any,
        model: Settings,
    ) -> "Reading":
        """Return the pass of tokens x (B, T, D); `bias` (B, 1, T) or None."""
        num_new, layers = x.shape[1], range(model.num_layers)
        if state is None:
            starts: tuple[int, ...] = (0,) * model.num_layers
            entries = tuple(Entries.empty(x, model, num_new) for _ in layers)
        else:
            starts, old = state.counts, state.entries
            entries = tuple(old[i].with_room(starts[i], num_new) for i in layers)
        if positions.ndim > 1:
            positions = positions[:, None]  # (B, 1, T): those of every head
        for start, layer in zip(starts, entries, strict=True):
            new = slice(start, start + num_new)
            layer.bias[..., new] = 0 if bias is None else bias
            layer.positions[..., new] = positions
        biased = bias is not None or (state is not None and state.biased)
        attended = None if state is None else state.attended
        return cls(entries, starts, num_new, biased, model, attended)

    def attention(self, layer: int, query: Any, keys: Any, values: Any) -> Any:
        """Return the output (B, G H, T, d) of a layer; write its new entries."""
        entries, start = self.entries[layer], self.starts[layer]
        end = start + self.num_new
        entries.keys[:, :, start:end] = keys
        entries.values[:, :, start:end] = values
        keys, values = (x[:, :, :end] for x in (entries.keys, entries.values))
        query, keys = contiguous(query), contiguous(keys)
        bias = contiguous(entries.bias[:, :, :end]) if self.biased else None
        scale = self.settings.head_dim**-0.5
        options: Any = {"bias": bias, "causal": True, "scale": scale}
        output, z = compute_attend(query, keys, values, **options)
        self.received.append(attention_columns(query, keys, z, **options))
        self.query.append(query[:, :, -MAX_QUERIES:])
        return output

    def state(
        self,
        before: ModelState | None,
        next_position: Any,
        convert_back: Callable[[Any], Any],
    ) -> ModelState:
        """Return the state after the pass, whose layers have all run."""
        ends = tuple(start + self.num_new for start in self.starts)
        for layer, end in zip(self.entries, ends, strict=True):
            layer.length = end  # marks the slots as taken
        return ModelState(
            self.num_new + (0 if before is None else before.num_seen),
            ends,
            self.entries,
            self._attended(),
            next_position,
            self.biased,
            self.settings.inv_freq() if before is None else before.inv_freq,
            convert_back,
        )

    def _attended(self) -> Attended:
        group = self.settings.num_heads // self.settings.num_key_heads
        received = padded(self.received)  # (L, B, H, N + T)
        received /= received.dtype.type(group)  # the mean of the heads of queries
        # Entry j receives attention from the queries that may attend to it.
        ends = np.array(self.starts)[:, None, None, None] + self.num_new
        later = ends - np.arange(received.shape[-1])  # (L, 1, 1, N + T)
        host = np.clip(later, 0, self.num_new)
        counts = np.zeros(received.shape, received.dtype, like=received)
        counts += np.asarray(host, received.dtype, like=received)
        query = np.stack(self.query)
        if self.before is None:
            return Attended(received, counts, (query,))
        # Padding of shorter layers, whose slots have new entries, has none.
        num_before = self.before.counts.shape[-1]
        received[..., :num_before] += self.before.received
        counts[..., :num_before] += self.before.counts
        largest = self.before.largest
        if largest is not None:  # 0 for the new entries
            old, largest = largest, np.zeros(counts.shape, counts.dtype, like=counts)
            largest[..., :num_before] = old
        return Attended(received, counts, self.before.with_queries(query), largest)
