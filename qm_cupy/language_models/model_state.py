"""What a language model has read: its key-value cache, which can be merged.

A model has L layers of H heads of keys of width d. It has read n tokens of each of B
sequences, and a layer stores entries for them: n, or fewer after a merge. The longest
layer has N.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.conversion import FloatArray, scope_of
from ..arrays.counts import GroupCounts
from ..caches.cache_features import MAX_QUERIES
from ..caches.merge_kv_cache import merge_kv_cache
from ..cuda.device import to_host
from ..cuda.launch import contiguous
from ..stages.merging.groups import compute_group_positions
from ..stages.merging.merge_tokens import compute_merge_tokens
from .state_entries import Entries, padded

# Arguments of `merge_kv_cache` that a state has itself, and those that it takes.
_OWN = (
    "keys", "values", "query", "causal", "attention", "positions", "inv_freq",
    "interleaved", "rotary_scaling", "bias", "scale", "mask",
)  # fmt: skip
_OPTIONS = (
    "max_error", "calibrate", "rotate_at", "protect", "sinks", "recent", "per_head",
    "per_layer", "window",
)  # fmt: skip


def check_options(options: Mapping[str, Any]) -> None:
    """Raise for options that `ModelState.merge` does not have."""
    for name in options:
        if name in _OWN:
            raise TypeError(
                f"`{name}` is not an option of `merge`: the state has it itself"
            )
        if name not in _OPTIONS:
            raise TypeError(
                f"`{name}` is not an option: the options of a merge are "
                f"{', '.join(_OPTIONS)}"
            )


@dataclass(frozen=True, eq=False, repr=False)
class ModelState:
    """The state of a `LanguageModel` after some tokens; reading goes on from it.

    `LanguageModel.read` and `LanguageModel.step` return it. A state never changes, so
    several texts may continue from one state.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> rng = np.random.default_rng(0)
    >>> model = qm.LanguageModel.init(50, 16, num_heads=2, num_layers=2, seed=0)
    >>> _, state = model.read(rng.integers(0, 50, 40))
    >>> state = state.merge(20)
    >>> state
    ModelState(40 tokens, 20 entries on average in 2 layers, float32)
    >>> _, state = model.read(rng.integers(0, 50, 5), state)
    >>> state.num_seen, state.mean_stored()
    (45, 25)
    """

    num_seen: int
    """Number n of tokens read so far."""
    counts: tuple[int, ...]
    """Number of entries of each layer, which later tokens attend to. Heads of different
    lengths are padded to the longest of their layer."""
    entries: tuple[Entries, ...]
    """Internal: those of each layer, arrays with free slots, in NumPy or CuPy."""
    attended: "Attended"
    """Internal: what the merge needs to know about the attention."""
    next_position: Any
    """Internal: position of the next token, an integer or (B,)."""
    biased: bool
    """Internal: whether a bias is not 0."""
    inv_freq: Any
    """Internal: the rotation, (d / 2,)."""
    convert_back: Callable[[Any], Any]
    """Internal: converts an array to the library of the tokens."""

    def __repr__(self) -> str:
        """Return sizes and dtype in one line."""
        dtype = self.entries[0].keys.dtype
        mean = " on average" if self.biased else ""
        return (
            f"ModelState({self.num_seen} tokens, {self.mean_stored()} entries{mean} in "
            f"{len(self.entries)} layers, {dtype})"
        )

    @property
    def num_stored(self) -> int:
        """Number N of entries of the longest layer."""
        return max(self.counts)

    @property
    def keys(self) -> FloatArray:
        """Rotated keys (L, B, H, N, d), a copy in the library of the tokens.

        Shorter layers are padded with zeros.
        """
        return self.convert_back(self._padded("keys"))

    @property
    def values(self) -> FloatArray:
        """Values (L, B, H, N, d), a copy."""
        return self.convert_back(self._padded("values"))

    @property
    def bias(self) -> FloatArray:
        """What attention adds to the scores of the keys, (L, B, H, N), a copy.

        It is -inf for padding.
        """
        return self.convert_back(self._padded("bias"))

    def mean_stored(self) -> int:
        """Return the mean number of entries of a head, without padding.

        Returns
        -------
        int
            It is at most N, the length of the longest layer.
        """
        if not self.biased:
            return self.num_stored
        bias = self._padded("bias")
        present = np.asarray(to_host((bias > -np.inf).sum()))
        return int(present) // max(1, math.prod(bias.shape[:-1]))

    def _padded(self, name: str) -> Any:
        """Return the entries of all layers (L, B, H, N, ...), a copy."""
        pairs = zip(self.entries, self.counts, strict=True)
        parts = [getattr(x, name)[:, :, :count] for x, count in pairs]
        return padded(parts, -np.inf if name == "bias" else 0)

    def merge(self, budget: Any = None, **options: Any) -> "ModelState":
        """Return a state with fewer entries, to which attention is almost the same.

        The entries of each layer and head are merged by `merge_kv_cache`, with the last
        queries and the attention that the entries have received; after
        `LanguageModel.reread`, with those of the second reading. Positions of later
        tokens go on from `num_seen`.

        Parameters
        ----------
        budget : number or ndarray of int, optional
            Entries that remain of each head, as in `merge_kv_cache`: an integer, a
            fraction of the entries, or integers that broadcast to (L, B, H).
        **options
            `max_error`, `calibrate`, `rotate_at`, `protect`, `sinks`, `recent`,
            `per_head` and `window` of `merge_kv_cache`, and its `per_layer`, which is
            True by default here: the budget is the mean of the layers (False for an
            array of budgets, so that each layer has its own). With
            ``per_head=True``, facts are found best after a second reading, but heads
            are padded to the longest of their layer, which needs more memory.

        Returns
        -------
        ModelState
            Its layers have different numbers of entries (`counts`).

        Raises
        ------
        TypeError
            If an option has a wrong type, is one that the state has itself, or is not
            one of these.
        ValueError
            If an option is out of range, or the budget is not below the entries.
        """
        check_options(options)
        # The caller's stream, as in a function that gets these arrays.
        like = self.convert_back(self.entries[0].bias[:1, :1, :1].copy())
        with scope_of((like,)) or nullcontext():
            return self._merged(budget, {"per_layer": np.ndim(budget) == 0, **options})

    def _merged(self, budget: Any, options: dict[str, Any]) -> "ModelState":
        attended, names = self.attended, ("keys", "values", "bias", "positions")
        keys, values, bias, positions = map(self._padded, names)
        merged = merge_kv_cache(
            keys,
            values,
            budget,
            **attended.arguments(),
            positions=positions,
            inv_freq=self.inv_freq,
            bias=bias if self.biased else None,
            **options,
        )
        first = options.get("rotate_at") == "first"
        groups = _Groups.of(merged)
        # A mean of rotated keys counts as rotated to the position of its last member.
        where = groups.positions(positions, merged.positions, first)
        # A layer has the length of its longest head.
        counts = groups.counts.counts.reshape(len(keys), -1).max(axis=-1).tolist()
        arrays = merged.keys, merged.values, merged.bias, where
        return ModelState(
            self.num_seen,
            tuple(counts),
            tuple(map(Entries.first, counts, *arrays)),
            groups.attended(attended),
            self.next_position,
            True,
            self.inv_freq,
            self.convert_back,
        )


@dataclass(frozen=True)
class Attended:
    """The attention of the tokens so far, for the masses of the next merge."""

    received: Any
    """(L, B, H, N): the sum of the attention that each entry received."""
    counts: Any
    """(L, B, H, N): from how many queries."""
    queries: tuple[Any, ...] = ()
    """(L, B, H_q, T, d): the last queries since the last merge, in parts."""
    largest: Any = None
    """(L, B, H, N): the largest attention in second readings, or None before one."""
    again: Any = None
    """(L, B, H_q, T, d): queries of both readings, until other tokens are read."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `merge_kv_cache` by name."""
        if self.again is not None:
            return {"query": self.again, "causal": False, "attention": self.largest}
        return {"query": self.query(), "attention": self.mean()}

    def mean(self) -> Any:
        """Return the mean attention that each entry received (L, B, H, N)."""
        return self.received / np.maximum(self.counts, self.counts.dtype.type(1))

    def query(self) -> Any:
        """Return the last queries (L, B, H_q, T, d) with T ≤ 256, or None."""
        if not self.queries:
            return None
        last = np.concatenate(self.queries, axis=-2)[..., -MAX_QUERIES:, :]
        return contiguous(last)

    def with_queries(self, query: Any) -> tuple[Any, ...]:
        """Return the parts of the last queries, of which `query` is a new part.

        A step copies no earlier queries. Parts that are too old are left out.
        """
        parts = (*self.queries, query)
        while sum(x.shape[-2] for x in parts[1:]) >= MAX_QUERIES:
            parts = parts[1:]
        return parts


@dataclass(frozen=True)
class _Groups:
    """Which of S = L B H sequences of N entries were merged to K."""

    labels: Any  # (S, N)
    sizes: Any  # (S, K)
    counts: GroupCounts
    shape: tuple[int, ...]  # (L, B, H, K)

    @classmethod
    def of(cls, merged: Any) -> "_Groups":
        shape = merged.sizes.shape
        sizes = merged.sizes.reshape(-1, shape[-1])
        counts = np.asarray(to_host((sizes > 0).sum(axis=-1)), np.int64)
        groups = GroupCounts(counts, shape[-1])
        return cls(merged.labels.reshape(len(sizes), -1), sizes, groups, shape)

    def positions(self, positions: Any, last: Any, first: bool) -> Any:
        """Return the positions of merged entries; `last` are their last members."""
        if first:
            return -self.largest(-positions)
        inside = np.clip(last, 0, positions.shape[-1] - 1).astype(np.int64)
        return np.take_along_axis(positions, inside, -1)

    def attended(self, before: Attended) -> Attended:
        """Return the attention that merged entries received: the sum of members."""
        zero = before.received.dtype.type(0)
        flat = before.received.reshape(self.labels.shape)[..., None]
        mean = compute_merge_tokens(flat, self.labels, self.counts, mass=None)
        received = mean.reshape(self.sizes.shape) * self.sizes.astype(mean.dtype)
        # Padding has no attention: later entries take its slots.
        counts, largest = (
            None if x is None else np.where(self.valid(), self.largest(x), zero)
            for x in (before.counts, before.largest)
        )
        return Attended(received.reshape(self.shape), counts, largest=largest)

    def valid(self) -> Any:
        """Return which merged entries (L, B, H, K) are not padding."""
        return self.sizes.reshape(self.shape) > 0

    def largest(self, x: Any) -> Any:
        """Return the largest x (L, B, H, N) of each group (L, B, H, K)."""
        flat = x.reshape(self.labels.shape)
        order = np.argsort(flat, axis=-1)
        ordered = np.take_along_axis(self.labels, order, -1)
        at = compute_group_positions(contiguous(ordered), self.counts)
        at = np.clip(at, 0, flat.shape[-1] - 1).astype(np.int64)  # padding has none
        ranked = np.take_along_axis(flat, order, -1)
        return np.take_along_axis(ranked, at, -1).reshape(self.shape)
