"""One layer of a merged cache: its entries, and the queries since its last merge.

B sequences have H key heads, with N entries that are stored for n tokens that were
seen. T is the number of tokens of a forward pass, and d is the width of a head.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from ..caches.budgets import head_budgets
from ..caches.cache_checks import Rotary
from ..caches.cache_entries import num_mergeable
from ..caches.cache_features import MAX_QUERIES
from ..caches.kv_cache import KVCache
from ..caches.merge_kv_cache import merge_kv_cache
from ..caches.score_keys import score_keys
from ..caches.second_reading import NUM_LAST, random_order
from .support import check_attention


class MergeSettings(NamedTuple):
    """What all layers of a cache have in common."""

    budget: Any
    every: int | None
    options: dict[str, Any]
    """Arguments of `merge_kv_cache` by name."""
    rotary: Rotary | None
    from_queries: bool
    """Whether hooks bring the queries of a forward pass, and then merge."""
    mass: str
    """Which attention counts: "received", "last" or "reread"."""
    merges: bool = True
    """Whether entries merge at all; False after `remove`."""

    @property
    def causal(self) -> bool:
        """Whether the queries of a merge are the last ones, and not of a rereading."""
        return self.mass != "reread"


# What a forward pass changes in a layer.
_STATE = (
    "keys", "values", "bias", "positions", "received", "counts", "seen", "since_merge",
)  # fmt: skip


class MergedLayer(DynamicLayer):
    """A layer whose entries are merged after each forward pass of several tokens."""

    is_croppable = False
    keys: Any  # (B, H, N, d), None before the first tokens
    values: Any  # (B, H, N, d_v)

    def __init__(self, settings: MergeSettings, config: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings, self.config = settings, config
        self.rotary = settings.rotary  # a hook corrects which elements are pairs
        self.of_cache: list[MergedLayer] = [self]  # all layers of its cache
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # n, tokens so far
        self.since_merge = 0  # tokens since the last merge
        self.bias: torch.Tensor | None = None  # (B, H, N), None before the first merge
        self.positions: Any = None  # (B, H, N)
        # The sum of the attention that each entry received, and from how many queries;
        # or the largest attention in second readings, without the numbers.
        self.received: Any = None
        self.counts: Any = None
        self.queries: list[torch.Tensor] = []  # (B, H_q, T, d) since the last merge
        self.last_queries: torch.Tensor | None = None  # of the merge that follows
        self.waits = False  # whether the hook has not run since the last `update`
        self.checked = False  # whether the hook computes the queries rightly
        # In the first layer: what the model has read since the last second reading.
        self.tokens: list[tuple[str, torch.Tensor]] = []
        self.queries_again: list[torch.Tensor] = []  # of the second reading
        self._before: dict[str, Any] | None = None  # the state, in a second reading
        self._rows: Any = None  # of the queries to keep of a second reading

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append entries, and return all of them for this forward pass.

        Attention gets the bias of the entries through `kwargs`, the dictionary of its
        arguments.
        """
        check_attention(self.config)
        if key_states.requires_grad:
            raise RuntimeError(
                "a merged cache has no gradients: run the model in "
                "`with torch.no_grad():`, or call `model.generate`"
            )
        arguments = kwargs.get("kwargs")
        if arguments is None:
            raise ValueError(
                f"{type(self.config).__name__}'s attention does not pass its arguments "
                "to `cache.update`, so merged entries cannot have a bias"
            )
        if self.waits and self.settings.from_queries:
            raise RuntimeError(
                "no hook of this cache has run: pass the cache to the model of which "
                "it was made, `MergedCache(model)`, before `remove` is called"
            )
        self.waits = True
        num_new = key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        self.seen += num_new
        self.since_merge += num_new
        self._append_state(keys, num_new)
        if self.bias is not None:
            arguments["position_bias"] = self._position_bias(keys, num_new, arguments)
        if not self.settings.from_queries and self.is_due(num_new):
            self.merge()  # `keys` and `values` still have all entries
        return keys, values

    def _append_state(self, keys: torch.Tensor, num_new: int) -> None:
        """Append zeros for new entries to bias and attention received."""
        shape = *keys.shape[:2], num_new
        positions = torch.arange(self.seen - num_new, self.seen, device=keys.device)
        positions = positions.expand(shape)
        zeros = torch.zeros(shape, dtype=torch.float32, device=keys.device)
        first = self.positions is None
        self.positions = (
            positions if first else torch.cat([self.positions, positions], -1)
        )
        self.received = zeros if first else torch.cat([self.received, zeros], -1)
        self.counts = zeros if first else torch.cat([self.counts, zeros], -1)
        if self.bias is not None:
            self.bias = torch.cat([self.bias, zeros.to(self.bias.dtype)], -1)

    def _position_bias(
        self, keys: torch.Tensor, num_new: int, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """Return the bias of every head of queries (B, H_q, T, N)."""
        if arguments.get("position_bias") is not None:
            raise ValueError(
                f"{type(self.config).__name__} has a position bias of its own, which "
                "`MergedCache` does not support"
            )
        assert self.bias is not None
        heads = self.config.num_attention_heads // keys.shape[1]
        bias = self.bias.to(keys.dtype).repeat_interleave(heads, dim=1)
        return bias[:, :, None].expand(-1, -1, num_new, -1)

    def is_due(self, num_new: int) -> bool:
        """Return whether the entries are to be merged after this forward pass."""
        every = self.settings.every
        if not self.settings.merges:
            return False
        return num_new > 1 or (every is not None and self.since_merge >= every)

    def after_attention(self, query: torch.Tensor | None, num_new: int) -> None:
        """Take the rotated queries (B, H_q, T, d) of a forward pass, and merge."""
        self.waits = False
        if self.is_read_again:
            self._score(query)
            return
        if query is not None:
            self.queries.append(query)
        if self.settings.mass == "reread":  # after all layers, the cache merges
            self.queries = last_queries(self.queries, NUM_LAST)
        elif self.is_due(num_new):
            self.merge()

    def wants_queries(self, num_new: int) -> bool:
        """Return whether the queries of a forward pass will be used."""
        several = num_new > 1 or self.is_read_again
        return several or self.settings.every is not None

    @property
    def is_read_again(self) -> bool:
        """Whether the forward pass is a part of a second reading."""
        return self._before is not None

    def start_second_reading(self, rows: torch.Tensor) -> None:
        """Begin a pass that leaves no entries, but the queries of these rows (R,)."""
        self._before = {name: getattr(self, name) for name in _STATE}
        self._rows = rows

    def end_second_reading(self) -> None:
        """Remove the entries of the pass, if its attention has not done so."""
        for name, x in (self._before or {}).items():
            setattr(self, name, x)
        self._before, self.waits = None, False

    def _score(self, query: torch.Tensor | None) -> None:
        """Score the entries by the queries (B, H_q, T, d) of a second reading."""
        assert query is not None
        self.end_second_reading()  # before the scores, whose entries are those before
        options: dict[str, Any] = {"bias": self.bias, "scale": self.scale}
        largest = score_keys(query, self.keys, how="max", causal=False, **options)
        self.received = torch.maximum(self.received, largest.float())
        self.queries_again.append(query[:, :, self._rows.to(query.device)])

    def merge(self) -> None:
        """Merge the stored entries to the budget, if there are more.

        If all layers have one budget, the last layer merges the entries of all.
        """
        query = None
        if self.queries or self.queries_again:
            query = torch.cat(self.queries + self.queries_again, dim=-2)
        if query is not None and self.queries_again:
            order = torch.from_numpy(random_order(query.shape[-2]))
            query = query[..., order.to(query.device), :]
        self.queries, self.queries_again, self.since_merge = [], [], 0
        if query is not None and self.settings.mass == "received":
            self._add_received(query)
        if query is not None:  # a copy, so that the memory of the others is free
            query = query[..., -min(MAX_QUERIES, query.shape[-2]) :, :].clone()
        self.last_queries = query
        if not self.settings.options["per_layer"]:
            merge_layers([self])
        elif self is self.of_cache[-1]:
            merge_layers(self.of_cache)

    def attention(self) -> torch.Tensor | None:
        """Return the attention received (B, H, N), if it counts and is known."""
        mass = self.settings.mass
        if mass == "last" or not self.settings.from_queries:
            return None
        if mass == "reread":
            return self.received
        return self.received / self.counts.clamp(min=1)

    def take(self, merged: KVCache[Any], count: int) -> None:
        """Store the first `count` merged entries of each head."""
        keys, values, bias, labels, _, last = merged
        # Copies, so that the arrays of all layers, padded to the longest, are freed.
        self.keys, self.values, self.bias = (
            x[:, :, :count].clone() for x in (keys, values, bias)
        )
        self._merge_state(labels.long(), last[:, :, :count].long())

    def mean_present(self) -> int:
        """Return the mean number of entries of the heads, without padded ones."""
        if self.bias is None:
            return self.num_stored
        # The heads of every sequence have the same sum.
        return int((self.bias[0] > -torch.inf).sum()) // self.bias.shape[1]

    def num_kept(self) -> int:
        """Return K: the budget, or its fraction of the tokens seen."""
        total = np.array(self.seen, np.int64)
        budget = self.settings.budget
        if isinstance(budget, int):
            return budget
        return int(head_budgets(budget, (), total))

    def _add_received(self, query: torch.Tensor) -> None:
        """Add the attention of queries (B, H_q, T, d), those of the last T entries."""
        num_queries, num_entries = query.shape[-2], self.keys.shape[-2]
        mean = score_keys(query, self.keys, bias=self.bias, scale=self.scale)
        # Entry j receives attention from the queries that may attend to it.
        counts = torch.arange(num_entries, 0, -1, device=mean.device)
        counts = counts.clamp(max=num_queries).to(torch.float32)
        self.received = self.received + mean.float() * counts
        self.counts = self.counts + counts

    scale: float | None = None
    """The factor of the scores; None for 1/√d."""

    def _merge_state(self, labels: torch.Tensor, last: torch.Tensor) -> None:
        """Bring positions and attention received to the merged entries."""
        shape = last.shape
        absent = last < 0  # padded entries of heads with fewer
        # The position to which a merged key was rotated; a mean of rotated keys has
        # that of its last member.
        positions = self.positions
        if self.settings.options["rotate_at"] == "first":
            none = torch.full_like(last, self.seen)
            of_group = labels.clamp(min=0)
            padding = positions.masked_fill(labels < 0, self.seen)
            self.positions = none.scatter_reduce(-1, of_group, padding, "amin")
        else:
            self.positions = positions.gather(-1, last.clamp(min=0))
        inside = labels.clamp(min=0)
        zeros = torch.zeros(shape, dtype=torch.float32, device=labels.device)
        present = (labels >= 0).float()
        how = "amax" if self.settings.mass == "reread" else "sum"
        received = self.received * present
        self.received = zeros.scatter_reduce(-1, inside, received, how)
        self.counts = zeros.scatter_reduce(-1, inside, self.counts * present, "amax")
        self.positions = self.positions.masked_fill(absent, 0)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, from which new positions continue."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of the next mask, and its offset."""
        stored = 0 if not self.is_initialized else self.keys.shape[-2]
        return stored + query_length, self.seen - stored

    @property
    def num_stored(self) -> int:
        """Number of entries of each head, N."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def pad(self, count: int) -> None:
        """Append entries without attention, so that there are `count`."""
        missing = count - self.num_stored
        if missing <= 0 or not self.is_initialized:
            return
        assert self.bias is not None
        pad = torch.nn.functional.pad
        self.keys = pad(self.keys, (0, 0, 0, missing))
        self.values = pad(self.values, (0, 0, 0, missing))
        self.bias = pad(self.bias, (0, missing), value=float("-inf"))
        self.positions = pad(self.positions, (0, missing))
        self.received = pad(self.received, (0, missing))
        self.counts = pad(self.counts, (0, missing))

    def reset(self) -> None:
        """Forget all entries."""
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Raise: merged entries cannot be taken apart."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a merged cache cannot remove its last tokens, as assisted decoding "
                "and speculative decoding need: use transformers' DynamicCache"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select sequences, for beam search."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the sequences."""
        self._select(lambda x: x[indices])

    def _select(self, select: Any) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values", "bias", "positions", "received", "counts"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else select(x))
        self.queries = [select(x) for x in self.queries]
        self.tokens = [(name, select(x)) for name, x in self.tokens]


def last_queries(parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Return the last `count` queries of parts (B, H_q, T, d), a copy if some go."""
    if sum(x.shape[-2] for x in parts) <= count:
        return parts
    query = torch.cat([x[..., -count:, :] for x in parts], dim=-2)
    return [query[..., -count:, :].clone()]


def exceeds_budget(layers: list[MergedLayer]) -> bool:
    """Return whether layers that have one budget have more entries, so that they merge.

    They do not if the budget has no room for entries that may merge.
    """
    first = layers[0]
    count, options = first.num_kept(), first.settings.options
    present = sum(layer.mean_present() for layer in layers)
    causal = first.settings.causal
    room = num_mergeable(count, options["sinks"], options["recent"], causal=causal)
    return count * len(layers) < present and room > 0


def merge_layers(layers: list[MergedLayer]) -> None:
    """Merge the entries of layers that have one budget, if there are more."""
    first = layers[0]
    count, options = first.num_kept(), first.settings.options
    queries = [layer.last_queries for layer in layers]
    for layer in layers:
        layer.last_queries = None
    if not exceeds_budget(layers):
        return
    if len({layer.keys.device for layer in layers}) > 1:
        raise ValueError(
            "`per_layer=True` needs all layers on one device: pass `per_layer=False` "
            "for a model that is spread over several"
        )
    longest = max(layer.num_stored for layer in layers)
    for layer in layers:
        layer.pad(longest)
    if first.rotary is not None:
        options = {
            **options,
            "inv_freq": first.rotary.inv_freq,
            "interleaved": first.rotary.interleaved,
            "rotary_scaling": first.rotary.scaling,
        }
    merged = merge_kv_cache(
        stacked([layer.keys for layer in layers]),
        stacked([layer.values for layer in layers]),
        count,
        query=stacked(queries),
        causal=first.settings.causal,
        attention=stacked([layer.attention() for layer in layers]),
        positions=stacked([layer.positions for layer in layers]),
        bias=stacked([layer.bias for layer in layers]),
        scale=first.scale,
        **options,
    )
    # Each layer has the length of its longest head.
    counts = merged.valid.sum(-1).flatten(1).amax(-1).tolist()
    for index, (layer, kept) in enumerate(zip(layers, counts, strict=True)):
        layer.take(KVCache(*(x[index] for x in merged)), kept)


def stacked(arrays: list[Any]) -> Any:
    """Return the arrays of layers as one (L, ...), or None if there are none."""
    if arrays[0] is None:
        return None
    return torch.stack(arrays) if len(arrays) > 1 else arrays[0][None]
