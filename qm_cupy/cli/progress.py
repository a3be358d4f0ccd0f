"""A progress bar for terminals."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

_WIDTH = 30  # characters of the bar
PATIENCE = 1.0  # seconds until the bar appears; shorter work needs no bar
_CLEAR = "\r\x1b[K"  # go to the start of the line and erase the line


class Step(Protocol):
    """The function that `progress` yields. `done` is how many units are finished."""

    def __call__(self, done: int) -> None: ...


@contextmanager
def progress(total: int, stream: TextIO, unit: str = "sequences") -> Iterator[Step]:
    """Yield a function that draws a bar of the finished fraction of `total` units.

    It draws only if `stream` is a terminal and the work takes longer than `PATIENCE`.
    """
    shown = stream.isatty()  # a file or pipe must not contain control characters
    start = time.monotonic()

    def step(done: int) -> None:
        elapsed = time.monotonic() - start  # seconds
        if not shown or elapsed < PATIENCE:
            return
        fraction = done / max(total, 1)
        # If the fraction f took t seconds, the rest takes t · (1 - f) / f.
        left = elapsed * (1 / fraction - 1) if fraction else 0
        bar = ("#" * int(fraction * _WIDTH)).ljust(_WIDTH, ".")
        rest = f", {left:.0f} s left" if fraction else ""
        stream.write(f"{_CLEAR}[{bar}] {done} of {total} {unit}{rest}")
        stream.flush()

    try:
        step(0)
        yield step
    finally:
        if shown:  # the bar disappears, also after an error
            stream.write(_CLEAR)
            stream.flush()
