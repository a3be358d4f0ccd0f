"""The stored entries of a stream: arrays with room for a fixed number of entries.

A stream stores up to `capacity` entries. When they are full, they are merged to fewer.
This happens at counts of entries that do not depend on how many come at a time, so
every split of the input gives the same result.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays.conversion import ConvertBack


class StreamBuffer:
    """Arrays (..., capacity, *) of which the first `count` entries are in use."""

    def __init__(self, capacity: int, convert_back: ConvertBack) -> None:
        self.capacity, self.count = capacity, 0
        self.convert_back = convert_back
        self.arrays: dict[str, Any] = {}
        self.axes: dict[str, int] = {}  # the axis of the entries

    def append(
        self, parts: Mapping[str, tuple[Any, int]], when_full: Callable[[], None]
    ) -> None:
        """Append entries, and call `when_full` each time when the arrays are full.

        A part is an array and the number of its axis of entries; all have equally many
        entries.
        """
        for name, (x, axis) in parts.items():
            if name not in self.arrays:
                shape = *x.shape[:axis], self.capacity, *x.shape[axis + 1 :]
                self.arrays[name] = np.zeros(shape, x.dtype, like=x)
                self.axes[name] = axis
        x, axis = next(iter(parts.values()))
        start, total = 0, x.shape[axis]
        while start < total:
            stop = min(total, start + self.capacity - self.count)
            target = slice(self.count, self.count + stop - start)
            for name, (x, axis) in parts.items():
                before = (slice(None),) * axis
                source = x[(*before, slice(start, stop))]
                self.arrays[name][(*before, target)] = source
            self.count += stop - start
            start = stop
            if self.count == self.capacity:
                when_full()

    def stored(self, name: str) -> Any:
        """Return the entries of an array that are in use, as a view."""
        before = (slice(None),) * self.axes[name]
        return self.arrays[name][(*before, slice(0, self.count))]

    def replace(self, parts: Mapping[str, Any]) -> None:
        """Replace all entries by fewer ones."""
        for name, x in parts.items():
            before = (slice(None),) * self.axes[name]
            self.count = x.shape[self.axes[name]]
            self.arrays[name][(*before, slice(0, self.count))] = x

    def result(self, name: str) -> Any:
        """Return a copy of the stored entries in the caller's library."""
        return self.convert_back(self.stored(name).copy(order="C"))
