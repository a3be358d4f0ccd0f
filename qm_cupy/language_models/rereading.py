"""A second reading of tokens after their state; see `caches.second_reading`.

A part of T tokens of each of B sequences is read after N entries. A layer has H heads
of keys, which G heads of queries each read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..arrays.libraries import is_cuda
from ..caches.attend import compute_attend
from ..caches.score_keys import Scored, compute_score_keys
from ..caches.second_reading import NUM_LAST, parts_of, random_order
from ..cuda.device import to_device
from ..cuda.launch import contiguous
from .llama_weights import Settings
from .model_state import ModelState
from .network import run_layers
from .reading import following
from .state_entries import padded


def read_tokens_again(
    x: Any, state: ModelState, weights: Mapping[str, Any], model: Settings
) -> ModelState:
    """Return a state with the attention of tokens (B, T, D) that are read once more.

    Its entries are those of the state.
    """
    largest, last = state.attended.largest, state.attended.query()
    queries = [] if last is None else [last[..., -NUM_LAST:, :]]
    for part, rows in parts_of(x.shape[1]):
        tokens = x[:, part]
        pass_ = _Pass(state, rows, model.head_dim**-0.5)
        positions = following(state.next_position, tokens)
        run_layers(tokens, positions, weights, model, pass_.attention)
        scores = padded(pass_.scores)  # (L, B, H, N)
        largest = scores if largest is None else np.maximum(largest, scores)
        queries.append(np.stack(pass_.queries))
    every = np.concatenate(queries, axis=-2)  # (L, B, G H, R, d)
    again = contiguous(_taken(every, random_order(every.shape[-2])))
    attended = replace(state.attended, largest=largest, again=again)
    return replace(state, attended=attended)


@dataclass
class _Pass:
    """A pass that leaves no entries, but scores of those of a state, and queries."""

    state: ModelState
    rows: Any  # (R,): the tokens whose queries are kept
    scale: float
    scores: list[Any] = field(default_factory=list)  # of each layer, (B, H, N)
    queries: list[Any] = field(default_factory=list)  # of each layer, (B, G H, R, d)

    def attention(self, layer: int, query: Any, keys: Any, values: Any) -> Any:
        """Return the output (B, G H, T, d) of a layer."""
        state, count = self.state, self.state.counts[layer]
        entries = state.entries[layer]
        old_keys, old_values, old_bias = (
            contiguous(x[:, :, :count])
            for x in (entries.keys, entries.values, entries.bias)
        )
        query, bias = contiguous(query), old_bias if state.biased else None
        scored = Scored(query, old_keys, None, bias, None, self.scale, False)
        self.scores.append(compute_score_keys(scored, "max"))
        self.queries.append(_taken(query, self.rows))
        if bias is not None:
            shape = *bias.shape[:2], keys.shape[2]
            new = np.zeros(shape, bias.dtype, like=bias)
            bias = np.concatenate((bias, new), axis=-1)
        keys = np.concatenate((old_keys, keys), axis=2)
        values = np.concatenate((old_values, values), axis=2)
        options: Any = {"bias": bias, "causal": True, "scale": self.scale}
        return compute_attend(query, keys, values, **options)[0]


def _taken(query: Any, rows: Any) -> Any:
    """Return rows (..., R, d) of queries (..., T, d)."""
    return query[..., to_device(rows) if is_cuda(query) else rows, :]
