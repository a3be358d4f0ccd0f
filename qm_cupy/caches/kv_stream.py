"""Merging of a key-value cache that grows, with constant memory.

At most `budget` + `buffer` entries are stored, for each of H heads, B sequences and L
layers. Keys have the width d, and values the width d_v.
"""

from typing import Any

import numpy as np

from ..arrays.checks import (
    check_finite_values,
    check_integer,
    check_number,
    check_shape,
)
from ..arrays.conversion import Array, FloatArray, IntArray, convert_inputs, scope_of
from ..arrays.counts import GroupCounts
from ..arrays.dtypes import accumulation_dtype
from .cache_checks import (
    check_cache,
    check_flag,
    check_queries,
    check_rotary,
    check_window,
)
from .cache_entries import default_recent
from .cache_mass import NUM_QUERIES
from .merge_kv_cache import WINDOW, RotateAt, check_rotate_at, merge_kv_cache
from .merge_stream import check_same, group_sums, stream_sizes
from .stream_buffer import StreamBuffer


class KVStream:
    """Store a growing key-value cache in constant memory, by merging its entries.

    When `budget` + `buffer` entries are stored, `merge_kv_cache` merges them to
    `budget`. The result does not depend on how entries are split over the calls of
    `append`, and a call costs the same however many entries came before.

    Parameters
    ----------
    budget : int
        Number of entries of each head after a merge.
    buffer : int, optional
        Number of entries that are added between two merges; `budget` by default.
    sinks : int, default 4
        Number of first entries of the stream that never merge.
    recent : int, optional
        Number of last entries at a merge that do not merge; by default a third of the
        budget, or 32 if this is more (half of the budget, if it is below 64).
    inv_freq : sequence of float of shape (r / 2,), optional
        Angles of the rotation for one position, as in `merge_kv_cache`.
    interleaved : bool, default False
        As in `merge_kv_cache`.
    rotary_scaling : float, default 1
        As in `merge_kv_cache`.
    rotate_at : {"mean", "first", "last"}, default "mean"
        As in `merge_kv_cache`. A merged key counts as rotated at its last position.
    calibrate : bool, default True
        Whether biases are fitted to the last queries, if there are any.
    scale : float, optional
        The factor of the scores, 1/√d by default.
    window : int, default 128
        As in `merge_kv_cache`.

    Raises
    ------
    TypeError
        If an option has a wrong type.
    ValueError
        If a number is out of range, or the budget is not above `sinks` + `recent`.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> stream = KVStream(64, buffer=32)
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 500, 8))
    >>> for part in np.split(keys, 10, axis=2):
    ...     stream.append(part, part)
    >>> stream
    KVStream(500 entries → 84)
    >>> query = keys[:, :, -1:]
    >>> output, _ = qm.attend(query, stream.keys, stream.values, bias=stream.bias)
    """

    def __init__(
        self,
        budget: int,
        *,
        buffer: int | None = None,
        sinks: int = 4,
        recent: int | None = None,
        inv_freq: Any = None,
        interleaved: bool = False,
        rotary_scaling: float = 1.0,
        rotate_at: RotateAt = "mean",
        calibrate: bool = True,
        scale: float | None = None,
        window: int = WINDOW,
    ) -> None:
        if recent is None:
            number = check_integer("budget", budget)
            recent = int(default_recent(np.array(number), ()))
        self._sizes = stream_sizes(budget, buffer, sinks, recent)
        if scale is not None:
            check_number("scale", scale, 0, np.inf, "()")
        # The width of the keys is not known yet; the first call checks against it.
        unlimited = 2**30
        rotary = check_rotary(inv_freq, interleaved, rotary_scaling, unlimited)
        self._options: dict[str, Any] = {
            "inv_freq": None if rotary is None else rotary.inv_freq,
            "interleaved": interleaved,
            "rotary_scaling": rotary_scaling,
            "rotate_at": check_rotate_at(rotate_at, rotary),
            "calibrate": check_flag("calibrate", calibrate),
            "window": check_window(window),
            "scale": scale,
        }
        self._stored: StreamBuffer | None = None
        self._has_query = False
        self._num_seen = 0

    def __repr__(self) -> str:
        """Return the numbers of entries that came and that are stored."""
        count = 0 if self._stored is None else self._stored.count
        return f"KVStream({self._num_seen} entries → {count})"

    def append(self, keys: Array, values: Array, query: Array | None = None) -> None:
        """Append entries to the cache, and merge when the buffer is full.

        Parameters
        ----------
        keys : ndarray of shape (T, d), (B, T, d), (B, H, T, d) or (L, B, H, T, d)
            The next T keys, rotated if the model rotates them; float16, bfloat16,
            float32 or float64. All calls need the same other axes, dtype and library.
        values : ndarray of shape (..., T, d_v)
            Their values.
        query : ndarray of shape (..., T, d), optional
            The queries of these entries, of H or a multiple of H heads. A merge uses
            the last 32. Either all calls pass them, or none.

        Raises
        ------
        TypeError
            If a dtype is wrong or differs from that of earlier calls.
        ValueError
            If a shape or an entry does not fit. Then nothing is appended.
        """
        scope = scope_of((keys,))
        if scope is None:
            return self._append(keys, values, query)
        with scope:
            return self._append(keys, values, query)

    def _append(self, keys: Any, values: Any, query: Any) -> None:
        convert_back, keys, values, query = convert_inputs(
            {"keys": keys, "values": values, "query": query}
        )
        if getattr(keys, "ndim", 0) > 1 and keys.shape[-2] == 0:
            return
        check_cache(keys, values, None)
        check_finite_values("keys", keys)
        check_finite_values("values", values)
        check_queries(query, keys, None, self._options["scale"])
        if query is not None:
            check_shape("query", query, "LBHTd", (*query.shape[:-2], *keys.shape[-2:]))
        self._check_continues(keys, values, query)
        if self._stored is None:
            rotary = self._options["inv_freq"]
            check_rotary(rotary, False, 1.0, keys.shape[-1])
            self._stored = StreamBuffer(self._sizes[0] + self._sizes[1], convert_back)
            self._has_query = query is not None
        axis = keys.ndim - 2
        ones = np.zeros(keys.shape[:-1], np.int64, like=keys) + 1
        bias = np.zeros(keys.shape[:-1], accumulation_dtype(keys.dtype), like=keys)
        parts = {
            "keys": (keys, axis),
            "values": (values, axis),
            "bias": (bias, axis),
            "sizes": (ones, axis),
            "positions": (np.cumsum(ones, axis=-1) - 1 + self._num_seen, axis),
        }
        if query is not None:
            parts["query"] = (query, axis)
        self._num_seen += keys.shape[-2]
        self._stored.append(parts, self._merge)

    def _check_continues(self, keys: Any, values: Any, query: Any) -> None:
        """Raise unless the arrays continue those of earlier calls."""
        if self._stored is None:
            return
        if (query is not None) != self._has_query:
            state = "before" if self._has_query else "not before"
            raise ValueError(
                "`query` must be passed in all calls or in none, but it was passed "
                f"{state}: start a new stream"
            )
        for name, x in (("keys", keys), ("values", values), ("query", query)):
            if x is not None:
                check_same(name, x, self._stored.arrays[name])

    def _merge(self) -> None:
        """Merge the stored entries to the budget."""
        stored = self._stored
        assert stored is not None
        budget, buffer, sinks, recent = self._sizes
        query = None
        if self._has_query:  # those of the last entries, which have not merged
            count = min(NUM_QUERIES, recent + buffer)
            query = stored.stored("query")[..., -count:, :]
        cache = merge_kv_cache(
            stored.stored("keys"),
            stored.stored("values"),
            budget,
            query=query,
            positions=stored.stored("positions"),
            bias=stored.stored("bias"),
            sinks=sinks,
            recent=recent,
            **self._options,
        )
        shape = cache.labels.shape
        labels = cache.labels.reshape(-1, shape[-1])
        groups = GroupCounts(np.full(len(labels), budget, np.int64), budget)
        sizes = stored.stored("sizes").reshape(labels.shape).astype(np.float64)
        last = cache.positions.astype(np.int64)
        parts = {
            "keys": cache.keys,
            "values": cache.values,
            "bias": cache.bias,
            "sizes": np.rint(group_sums(sizes, labels, groups))
            .astype(np.int64)
            .reshape(*shape[:-1], budget),
            "positions": np.take_along_axis(stored.stored("positions"), last, -1),
        }
        if self._has_query:
            # The queries of merged entries are not used again.
            parts["query"] = stored.stored("query")[..., -budget:, :].copy()
        stored.replace(parts)

    @property
    def num_seen(self) -> int:
        """Number of entries of each head so far."""
        return self._num_seen

    @property
    def keys(self) -> Any:
        """(..., K, d): the keys, at most `budget` + `buffer` - 1."""
        return self._result("keys")

    @property
    def values(self) -> Any:
        """(..., K, d_v): the values."""
        return self._result("values")

    @property
    def bias(self) -> FloatArray:
        """(..., K) float32 or float64: what attention adds to the scores of a key."""
        return self._result("bias")

    @property
    def sizes(self) -> IntArray:
        """(..., K) int64: the number of original entries in each entry."""
        return self._result("sizes")

    @property
    def positions(self) -> IntArray:
        """(..., K) int64: the position of the last original entry in each entry.

        Positions count from the start of the stream, and ascend.
        """
        return self._result("positions")

    def _result(self, name: str) -> Any:
        if self._stored is None:
            raise ValueError("the stream has no entries yet: call `append` first")
        return self._stored.result(name)
