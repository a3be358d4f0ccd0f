"""What will be done with a file of tokens, before the tokens are read."""

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import check_mask
from ..arrays.protect import protected_tokens
from ..arrays.shapes import num_valid
from ..group_counts import num_groups_of
from ..host_memory import available_bytes
from ..memory import quickmerge_bytes
from ..sources import Sources
from ..stages.budget import token_budget
from .merge_options import MergeOptions
from .token_file import Arrays, TokenFile, naming, stand_in

CHUNK_BYTES = 2**25  # bytes of the arrays that are merged at a time
HINT_BYTES = 2**20  # bytes of masks and protected tokens that are checked at a time
# Memory that is not for arrays: buffers of files, modules that are imported later, and
# what the allocator keeps. Measured: 2 MB beside arrays of 160 MB.
OTHER_BYTES = 2**24


class Plan(NamedTuple):
    """How a file is merged."""

    file: TokenFile
    options: MergeOptions
    on_gpu: bool
    max_groups: int | None  # the largest K; None if the tokens decide
    chunk_size: int  # sequences that are merged at a time
    needed_bytes: int  # memory that a chunk needs
    num_tokens: int  # of all sequences, without padding

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(K, D) or (B, K, D), or None if K is not known."""
        if self.max_groups is None:
            return None
        return self.shape_with(self.max_groups)

    def shape_with(self, max_groups: int) -> tuple[int, ...]:
        """Return the shape (K, D) or (B, K, D) of the result for this K."""
        *batch, _, dim = self.file.tokens.shape
        return (*batch, max_groups, dim)

    def describe(self) -> dict[str, Any]:
        """Return what is merged and how, for summaries."""
        method, weights, weighted = self.options.resolved(
            "attention" in self.file.names
        )
        return {
            "shape": self.file.tokens.shape,
            "tokens": self.num_tokens,
            "padding": self.file.padded_tokens - self.num_tokens,
            "method": method,
            "metric": self.options.metric,
            "weights": weights,
            "weighted_linkage": weighted,
            "device": "cuda" if self.on_gpu else "cpu",
        }


def plan(file: TokenFile, options: MergeOptions, on_gpu: bool) -> Plan:
    """Return how to merge a file; raise if the budget or an array is wrong.

    The options are those that `check_options` accepts. The tokens are not read.
    """
    with naming(file.source.name):
        max_groups, num_tokens = _count(file, options)
    chunk_size, needed = _chunk_size(file, options, on_gpu, max_groups)
    return Plan(file, options, on_gpu, max_groups, chunk_size, needed, num_tokens)


def _chunk_size(
    file: TokenFile, options: MergeOptions, on_gpu: bool, max_groups: int | None
) -> tuple[int, int]:
    """Return how many sequences are merged at a time, and the memory that this needs.

    Raise MemoryError if there is not enough memory for one sequence.
    """
    arrays = max(1, file.bytes_per_sequence())
    size = max(1, min(CHUNK_BYTES // arrays, file.num_sequences))
    available = None if on_gpu else available_bytes()
    while True:
        # The arrays of this chunk; if there are others, also the last results, and a
        # copy of them with padding. Reading Fortran order needs a copy of the arrays.
        copies = 1 if size >= file.num_sequences else 3
        work = 0 if on_gpu else _work(file, options, max_groups, size)
        needed = OTHER_BYTES + copies * size * arrays + max(work, size * arrays)
        if available is None or needed <= available or size == 1:
            break
        size //= 2
    if available is not None and needed > available:
        method, *_ = options.resolved("attention" in file.names)
        way_out = "cut it into windows"
        if options.max_error is not None:
            way_out = f"use --budget with --method contiguous, or {way_out}"
        elif method != "contiguous" and options.max_distance is not None:
            way_out = f"use --method contiguous, or {way_out}"
        elif method not in ("contiguous", "nearest"):
            way_out = f"use --method contiguous or nearest, or {way_out}"
        raise MemoryError(
            f"{file.source.name}: a sequence of {file.tokens.shape[-2]:,} tokens needs "
            f"{needed / 1e9:.1f} GB of memory, but only {available / 1e9:.1f} GB are "
            f"available: {way_out}"
        )
    return size, needed


def _work(
    file: TokenFile, options: MergeOptions, max_groups: int | None, size: int
) -> int:
    """Return the bytes that `quickmerge` needs for this many sequences."""
    tokens = file.tokens
    shape = (size, *tokens.shape[-2:])
    # Of the sources, only shapes and dtypes are used.
    attention = hidden_states = None
    if "attention" in file.names:
        of_file = file.array("attention")
        heads = of_file.shape[len(tokens.shape) - 2 :]  # (N, N) or (H, N, N)
        attention = stand_in(of_file._replace(shape=(size, *heads)))
    if options.saliency == "entropy":
        hidden_states = stand_in(tokens._replace(shape=shape))
    method, weights, weighted = options.resolved(attention is not None)
    return quickmerge_bytes(
        shape,
        tokens.dtype,
        max_groups,
        sources=Sources(hidden_states, attention, None, None, None),
        masked=len(file.names) > 1 or file.positions is not None,
        method=method,
        step=options.step,
        weights=weights,
        weighted_linkage=weighted,
    )


def _count(file: TokenFile, options: MergeOptions) -> tuple[int | None, int]:
    """Return the largest K, or None if limits decide, and the number of tokens.

    All masks and protected tokens are read and checked.
    """
    hints = [name for name in ("mask", "protect") if name in file.names]
    num_tokens = file.tokens.shape[-2]
    if not any(file.is_per_sequence(x) for x in hints):
        # All sequences are alike: one of them, without the axis B, is enough.
        arrays = {x: file.common(x) for x in hints}
        max_groups, total = _count_chunk(file, options, arrays, ())
        total *= file.num_sequences
        return (None if options.budget is None else max_groups), total
    max_groups = total = 0
    for start, stop, arrays in file.chunks(max(1, HINT_BYTES // num_tokens), *hints):
        size = stop - start

        def count(arrays: Arrays, start: int, size: int = size) -> tuple[int, int]:
            alone = all(x.ndim == 1 for x in arrays.values())
            return _count_chunk(file, options, arrays, () if alone else (size,))

        of_chunk = file.for_sequences(count, arrays, start)
        max_groups, total = max(max_groups, of_chunk[0]), total + of_chunk[1]
    return (None if options.budget is None else max_groups), total


def _count_chunk(
    file: TokenFile, options: MergeOptions, arrays: Arrays, batch: tuple[int, ...]
) -> tuple[int, int]:
    """Return the largest K, 0 without a budget, and the number of tokens.

    `batch` is (b,) for the arrays of b sequences, or () for those of one.
    """
    method, _, _ = options.resolved("attention" in file.names)
    shape = (*batch, file.tokens.shape[-2])
    mask, protected = _hints(file, arrays, shape)
    max_groups = 0
    if options.budget is not None:
        budget = chunk_budget(file, options, arrays, batch)
        groups = num_groups_of(shape, budget, protected, method, mask)
        max_groups = groups.max_groups
    total = math.prod(shape) if mask is None else int(np.count_nonzero(mask))
    return max_groups, total


def _hints(file: TokenFile, arrays: Arrays, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return mask and protected tokens of some sequences as booleans, or None."""
    mask = check_mask(arrays.get("mask"), shape)
    flags, positions = None, arrays.get("protect", file.positions)
    if isinstance(positions, np.ndarray) and positions.dtype == np.bool_:
        flags, positions = positions, None
    # Only the shape of the tokens is needed.
    tokens = np.broadcast_to(np.zeros((), np.float32), (*shape, 1))
    return mask, protected_tokens(flags, positions, tokens, mask)


def chunk_budget(
    file: TokenFile, options: MergeOptions, arrays: Arrays, batch: tuple[int, ...]
) -> Any:
    """Return the budget of some sequences; with `clip`, the K of each of them.

    `batch` is (b,) for the arrays of b sequences, or () for those of one.
    """
    budget = options.budget
    if budget is None or not options.clip:
        return budget
    shape = (*batch, file.tokens.shape[-2])
    mask, protected = _hints(file, arrays, shape)
    num_tokens = np.broadcast_to(np.asarray(num_valid(shape, mask)), batch)
    num_protected = np.zeros(batch, np.int64)
    if protected is not None:
        valid = protected if mask is None else protected & mask
        num_protected = valid.sum(axis=-1)
    wanted: Any = budget
    if isinstance(budget, float):
        wanted = token_budget(budget, num_tokens)
    elif budget < 1:
        raise ValueError(f"`budget` must be at least 1, got {budget}")
    # Tokens that are not protected need at least one group.
    least = num_protected + (num_tokens > num_protected)
    clipped = np.minimum(np.maximum(wanted, least), num_tokens)
    return clipped.astype(np.int64) if batch else int(clipped)
