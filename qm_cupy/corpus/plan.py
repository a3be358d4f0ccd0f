"""What will be done with a file of tokens, before the tokens are read."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_mask
from ..arrays.protect import protected_tokens
from ..group_counts import num_groups_of
from .merge_options import MergeOptions
from .token_file import TokenFile, naming

CHUNK_BYTES = 2**25  # bytes of the arrays that are merged at a time
HINT_BYTES = 2**20  # bytes of masks and protected tokens that are checked at a time


class Plan(NamedTuple):
    """How a file is merged."""

    file: TokenFile
    options: MergeOptions
    on_gpu: bool
    max_groups: int | None  # the largest K; None if the tokens decide
    chunk_size: int  # sequences that are merged at a time
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


def plan(file: TokenFile, options: MergeOptions, on_gpu: bool) -> Plan:
    """Return how to merge a file; raise if the budget or an array is wrong.

    The options are those that `check_options` accepts. The tokens are not read.
    """
    with naming(file.source.name):
        max_groups, num_tokens = _count(file, options)
    count = max(1, CHUNK_BYTES // max(1, file.bytes_per_sequence()))
    return Plan(file, options, on_gpu, max_groups, count, num_tokens)


def _count(file: TokenFile, options: MergeOptions) -> tuple[int | None, int]:
    """Return the largest K, or None if limits decide, and the number of tokens.

    All masks and protected tokens are read and checked.
    """
    method, _, _ = options.resolved("attention" in file.names)
    hints = [name for name in ("mask", "protect") if name in file.names]
    num_tokens = file.tokens.shape[-2]
    max_groups, total = 0, 0
    count = max(1, HINT_BYTES // num_tokens)
    for start, stop, arrays in file.chunks(count, *hints):
        shape = (stop - start if hints else min(1, file.num_sequences), num_tokens)
        with _naming_sequences(start, stop):
            mask = check_mask(arrays.get("mask"), shape)
            protect = _protected(file, arrays, mask, shape)
            if options.budget is not None:
                groups = num_groups_of(shape, options.budget, protect, method, mask)
                max_groups = max(max_groups, groups.max_groups)
        total += math.prod(shape) if mask is None else int(np.count_nonzero(mask))
        if not hints:
            total = file.num_sequences * num_tokens
    return (None if options.budget is None else max_groups), total


def _protected(
    file: TokenFile,
    arrays: Mapping[str, NDArray[Any]],
    mask: NDArray[np.bool_] | None,
    shape: tuple[int, ...],
) -> Any:
    """Return the protected tokens (b, N) of a chunk as booleans, or None."""
    protect = arrays.get("protect", file.positions)
    is_positions = protect is not None and not (
        isinstance(protect, np.ndarray) and protect.dtype == np.bool_
    )
    # Only the shape of the tokens is needed.
    tokens = np.broadcast_to(np.zeros((), np.float32), (*shape, 1))
    flags, positions = (None, protect) if is_positions else (protect, None)
    return protected_tokens(flags, positions, tokens, mask)


def _naming_sequences(start: int, stop: int) -> AbstractContextManager[None]:
    return naming(f"sequences {start}..{stop - 1}" if start else "")
