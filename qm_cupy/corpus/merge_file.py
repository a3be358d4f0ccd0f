"""Merge the tokens of a file, a few sequences at a time.

A file of several sequences may be larger than memory: only a few of its sequences and
of their results are in memory at the same time. One sequence is always in memory.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_tokens
from ..cuda.device import to_device, to_host
from ..progress import listen
from ..results import Merged
from .merge_options import merge_arrays
from .plan import Plan, chunk_budget
from .token_file import Arrays


class Seconds:
    """Where the time goes, in seconds."""

    def __init__(self) -> None:
        # Until the first tokens are read: imports and checks.
        self.spent = {"starting": 0.0, "reading": 0.0, "merging": 0.0, "writing": 0.0}
        self._last = time.perf_counter()

    def spend(self, name: str) -> None:
        """Add the time since the last call."""
        now = time.perf_counter()
        self.spent[name] += now - self._last
        self._last = now


def merge_parts(
    plan: Plan, seconds: Seconds, progress: Callable[[float], None]
) -> Iterator[Merged[Any]]:
    """Yield the result of each chunk of b sequences; its arrays have the axis b.

    Results are bit for bit those of one call for the whole file. `progress` is called
    with the number of finished tokens, padding included.
    """
    file = plan.file
    arguments = [*file.names]
    num_tokens = file.tokens.shape[-2]
    for start, stop, arrays in file.chunks(plan.chunk_size, *arguments):
        seconds.spend("reading")
        size = stop - start

        def step(fraction: float, start: int = start, size: int = size) -> None:
            progress((start + fraction * size) * num_tokens)

        with listen(step):
            merged = merge_chunk(plan, arrays, start)
        seconds.spend("merging")
        progress(stop * num_tokens)
        del arrays  # before the next chunk is read
        yield merged
        seconds.spend("writing")


def merge_chunk(plan: Plan, arrays: dict[str, NDArray[Any]], start: int) -> Merged[Any]:
    """Merge one chunk whose first sequence has the index `start` in the file."""
    if plan.file.positions is not None:
        arrays = {**arrays, "protect": np.array(plan.file.positions)}
    return plan.file.for_sequences(functools.partial(_merge, plan), arrays, start)


def _merge(plan: Plan, arrays: Arrays, start: int) -> Merged[Any]:
    """Merge the tokens (b, N, D) or (N, D) of some sequences, or of one."""
    batch = arrays["tokens"].shape[:-2]
    budget = chunk_budget(plan.file, plan.options, arrays, batch)
    if not plan.on_gpu:
        return merge_arrays(arrays, budget, plan.options, start)
    # Check here, because the values of GPU arrays are not checked.
    check_tokens(arrays["tokens"], mask=arrays.get("mask"))
    on_device = {
        name: x if name == "protect" and x.dtype != np.bool_ else to_device(x)
        for name, x in arrays.items()
    }
    return Merged(*map(to_host, merge_arrays(on_device, budget, plan.options, start)))
