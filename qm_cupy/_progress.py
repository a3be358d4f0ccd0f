"""A progress bar for terminals."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

_WIDTH = 30
_CLEAR = "\r\x1b[K"  # to the line's start, and erase it


class Step(Protocol):
    def __call__(self, done: int) -> None: ...


@contextmanager
def progress(total: int, stream: TextIO) -> Iterator[Step]:
    """Give a function that shows how many of `total` sequences are done."""
    shown = stream.isatty()
    begun = time.monotonic()

    def step(done: int) -> None:
        if not shown:
            return
        share = done / max(total, 1)
        left = (time.monotonic() - begun) * (1 / share - 1) if share else 0
        bar = ("#" * int(share * _WIDTH)).ljust(_WIDTH, ".")
        rest = f", {left:.0f} s left" if share else ""
        stream.write(f"{_CLEAR}[{bar}] {done} of {total} sequences{rest}")
        stream.flush()

    try:
        step(0)
        yield step
    finally:
        if shown:
            stream.write(_CLEAR)
            stream.flush()
