"""Merging of a stream of tokens, such as video frames or a recording.

At most `budget` + `buffer` entries of width D are stored, for each of B sequences. An
entry is a token, or the merged token of several.
"""

from typing import Any

import numpy as np

from ..arrays.checks import (
    check_choice,
    check_finite_values,
    check_floating,
    check_integer,
    check_layout,
    check_not_negative,
    check_shape,
)
from ..arrays.conversion import Array, FloatArray, IntArray, convert_inputs, scope_of
from ..arrays.counts import GroupCounts
from ..arrays.dtypes import accumulation_dtype
from ..stages.clustering.cluster_tokens import compute_cluster_tokens
from ..stages.clustering.metrics import METRICS, Metric
from ..stages.merging.groups import compute_group_positions, compute_group_sizes
from ..stages.merging.merge_tokens import compute_merge_tokens
from .cache_checks import check_count
from .stream_buffer import StreamBuffer


class MergeStream:
    """Merge tokens as they come, with constant memory.

    When `budget` + `buffer` entries are stored, they are merged to `budget` by ward
    linkage. An entry counts as often as the tokens that it stands for. The result does
    not depend on how the tokens are split over the calls of `append`, and a call costs
    the same however many tokens came before.

    Parameters
    ----------
    budget : int
        Number of entries after each merge.
    buffer : int, optional
        Number of tokens that are stored between two merges; `budget` by default. Fewer
        merges give better groups.
    sinks, recent : int, default 0
        Numbers of the first tokens of the stream, and of the last entries at a merge,
        that do not merge.
    metric : {"cosine", "euclidean"}, default "cosine"
        As in `cluster_tokens`.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If a number is out of range, or the budget is not above `sinks` + `recent`.

    Examples
    --------
    >>> import numpy as np
    >>> stream = MergeStream(4, buffer=4)
    >>> frames = np.random.default_rng(0).standard_normal((100, 16))
    >>> for frame in frames:
    ...     stream.append(frame[None])
    >>> stream
    MergeStream(100 tokens → 4 entries)
    >>> int(stream.sizes.sum())
    100
    """

    def __init__(
        self,
        budget: int,
        *,
        buffer: int | None = None,
        sinks: int = 0,
        recent: int = 0,
        metric: Metric = "cosine",
    ) -> None:
        self._budget, self._buffer, self._sinks, self._recent = stream_sizes(
            budget, buffer, sinks, recent
        )
        check_choice("metric", metric, METRICS)
        self._metric = metric
        self._stored: StreamBuffer | None = None
        self._num_seen = 0

    def __repr__(self) -> str:
        """Return the numbers of tokens and entries."""
        count = 0 if self._stored is None else self._stored.count
        return f"MergeStream({self._num_seen} tokens → {count} entries)"

    def append(self, tokens: Array, mass: FloatArray | None = None) -> None:
        """Append tokens to the stream, and merge when the buffer is full.

        Parameters
        ----------
        tokens : ndarray of shape (T, D) or (B, T, D)
            The next T tokens; float16, bfloat16, float32 or float64. All calls need the
            same B, D, dtype and library.
        mass : ndarray of shape (T,) or (B, T), optional
            Weights ≥ 0 of the tokens; 1 by default.

        Raises
        ------
        TypeError
            If a dtype is wrong or differs from that of earlier calls.
        ValueError
            If a shape or an entry does not fit. Then nothing is appended.
        """
        scope = scope_of((tokens,))
        if scope is None:
            return self._append(tokens, mass)
        with scope:
            return self._append(tokens, mass)

    def _append(self, tokens: Any, mass: Any) -> None:
        convert_back, tokens, mass = convert_inputs({"tokens": tokens, "mass": mass})
        if getattr(tokens, "ndim", 0) in (2, 3) and tokens.shape[-2] == 0:
            return
        check_layout("tokens", tokens, "TD", "BTD")
        check_finite_values("tokens", tokens)
        dtype = accumulation_dtype(tokens.dtype)
        if mass is None:
            mass = np.zeros(tokens.shape[:-1], dtype, like=tokens)
            mass.fill(1)
        check_floating("mass", mass)
        check_shape("mass", mass, "BT", tuple(tokens.shape[:-1]))
        check_finite_values("mass", mass)
        check_not_negative("mass", mass)
        if self._stored is None:
            self._stored = StreamBuffer(self._budget + self._buffer, convert_back)
        else:
            check_same("tokens", tokens, self._stored.arrays["tokens"])
        axis = tokens.ndim - 2
        ones = np.zeros(tokens.shape[:-1], np.int64, like=tokens) + 1
        positions = np.cumsum(ones, axis=-1) - 1 + self._num_seen
        self._num_seen += tokens.shape[-2]
        parts = {
            "tokens": (tokens, axis),
            "mass": (mass.astype(dtype), axis),
            "sizes": (ones, axis),
            "positions": (positions, axis),
        }
        self._stored.append(parts, self._merge)

    def _merge(self) -> None:
        """Merge the stored entries to `budget`."""
        assert self._stored is not None
        names = "tokens", "mass", "sizes", "positions"
        tokens, mass, sizes, positions = map(self._stored.stored, names)
        batch = tokens.shape[:-2]
        groups = GroupCounts(np.full(batch, self._budget, np.int64), self._budget)
        protect = np.zeros(tokens.shape[:-1], np.bool_, like=tokens)
        protect[..., : self._sinks] = True
        protect[..., tokens.shape[-2] - self._recent :] = True
        labels = compute_cluster_tokens(
            tokens,
            groups,
            method="ward",
            metric=self._metric,
            mass=mass,
            protect=protect if self._sinks or self._recent else None,
        )
        last = compute_group_positions(labels, groups).astype(np.int64)
        self._stored.replace(
            {
                "tokens": compute_merge_tokens(tokens, labels, groups, mass=mass),
                "mass": group_sums(mass, labels, groups),
                "sizes": np.rint(
                    group_sums(sizes.astype(np.float64), labels, groups)
                ).astype(np.int64),
                "positions": np.take_along_axis(positions, last, -1),
            }
        )

    @property
    def num_seen(self) -> int:
        """Number of tokens of each sequence so far."""
        return self._num_seen

    @property
    def tokens(self) -> Any:
        """(K, D) or (B, K, D): the entries, at most `budget` + `buffer` - 1."""
        return self._result("tokens")

    @property
    def mass(self) -> FloatArray:
        """(K,) or (B, K): the sum of the weights of the tokens of each entry."""
        return self._result("mass")

    @property
    def sizes(self) -> IntArray:
        """(K,) or (B, K) int64: the number of tokens of each entry."""
        return self._result("sizes")

    @property
    def positions(self) -> IntArray:
        """(K,) or (B, K) int64: the position of the last token of each entry.

        Positions count from the start of the stream, and ascend.
        """
        return self._result("positions")

    def _result(self, name: str) -> Any:
        if self._stored is None:
            raise ValueError("the stream has no tokens yet: call `append` first")
        return self._stored.result(name)


def stream_sizes(
    budget: Any, buffer: Any, sinks: Any, recent: Any
) -> tuple[int, int, int, int]:
    """Return the four numbers as integers, or raise."""
    budget = check_integer("budget", budget)
    if budget < 1:
        raise ValueError(f"`budget` must be at least 1, got {budget}")
    buffer = budget if buffer is None else check_integer("buffer", buffer)
    if buffer < 1:
        raise ValueError(f"`buffer` must be at least 1, got {buffer}")
    sinks, recent = check_count("sinks", sinks), check_count("recent", recent)
    if sinks + recent >= budget:
        raise ValueError(
            f"`budget` must be above `sinks` + `recent` = {sinks + recent}, got "
            f"{budget}"
        )
    return budget, buffer, sinks, recent


def check_same(name: str, x: Any, stored: Any) -> None:
    """Raise unless an array continues the stored one (..., capacity, D)."""
    if type(x) is not type(stored):
        raise TypeError(
            f"`{name}` must be on the device of the earlier calls: start a new stream"
        )
    if x.dtype != stored.dtype:
        raise TypeError(
            f"`{name}` must be {stored.dtype} as in earlier calls, got {x.dtype}"
        )
    wanted = *stored.shape[:-2], x.shape[-2], stored.shape[-1]
    if x.shape != wanted:
        raise ValueError(
            f"`{name}` must have shape {wanted} like earlier calls, got {x.shape}"
        )


def group_sums(x: Any, labels: Any, groups: GroupCounts) -> Any:
    """Return the sums (..., K) of x (..., N) over the members of each group."""
    mean = compute_merge_tokens(x[..., None], labels, groups)[..., 0]
    return mean * compute_group_sizes(labels, groups).astype(x.dtype)
