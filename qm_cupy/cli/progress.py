"""A progress bar for terminals."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

_WIDTH = 30
PATIENCE = 1.0  # seconds: what is done by then needs no bar
_CLEAR = "\r\x1b[K"  # to the line's start, and erase it


class Step(Protocol):
    def __call__(self, done: int) -> None: ...


@contextmanager
def progress(total: int, stream: TextIO, unit: str = "sequences") -> Iterator[Step]:
    """Give a function that shows how many of `total` are done, from a second on."""
    shown = stream.isatty()
    begun = time.monotonic()

    def step(done: int) -> None:
        taken = time.monotonic() - begun
        if not shown or taken < PATIENCE:
            return
        share = done / max(total, 1)
        left = taken * (1 / share - 1) if share else 0
        bar = ("#" * int(share * _WIDTH)).ljust(_WIDTH, ".")
        rest = f", {left:.0f} s left" if share else ""
        stream.write(f"{_CLEAR}[{bar}] {done} of {total} {unit}{rest}")
        stream.flush()

    try:
        step(0)
        yield step
    finally:
        if shown:
            stream.write(_CLEAR)
            stream.flush()
