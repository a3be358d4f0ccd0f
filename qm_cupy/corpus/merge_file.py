"""Merge the tokens of a file, a few sequences at a time.

A file of several sequences may be larger than memory: only a few of its sequences and
of their results are in memory at the same time. One sequence is always in memory.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_mask, check_tokens
from ..cuda.device import to_device, to_host
from ..progress import listen
from ..results import Merged
from .merge_options import merge_arrays
from .plan import Plan


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
    """Merge one chunk whose first sequence has the index `start` in the file.

    Errors name the sequence of the file, not of the chunk.
    """
    if plan.file.positions is not None:
        arrays = {**arrays, "protect": np.array(plan.file.positions)}
    tokens = arrays["tokens"]
    try:
        if not plan.on_gpu:
            return merge_arrays(arrays, plan.options, start)
        # Check here, because the values of GPU arrays are not checked.
        mask = check_mask(arrays.get("mask"), tokens.shape[:-1])
        check_tokens(tokens, mask=mask)
        on_device = {
            name: x if name == "protect" and x.ndim == 1 else to_device(x)
            for name, x in arrays.items()
        }
        merged = merge_arrays(on_device, plan.options, start)
        return Merged(*map(to_host, merged))
    except ValueError as error:
        # For a NaN or Inf, the message of the library has the index in the chunk:
        # replace it by the index in the file. For other errors, add the sequences.
        mask = arrays.get("mask")
        wrong = ~np.isfinite(tokens)
        if mask is not None:
            wrong &= (mask != 0)[..., None]
        if not wrong.any():
            last = start + len(tokens) - 1
            raise ValueError(f"sequences {start}..{last}: {error}") from error
        sequence, token, component = map(int, np.argwhere(wrong)[0])  # in the chunk
        value = tokens[sequence, token, component]
        raise ValueError(
            f"tokens must be finite, got {value} in sequence {start + sequence}, "
            f"token {token}"
        ) from error
