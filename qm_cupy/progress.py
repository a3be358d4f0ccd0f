"""The progress of a call, for a listener.

Code that works on NumPy arrays reports its progress. A part of a call, such as the
clustering, reports fractions of its own work; `span` says which part of the call it is:

    with span(0.2, 0.9):
        report(0.5)  # the listener gets 0.55

The listener is a context variable, so each thread and asyncio task has its own. Without
a listener, `report` and `span` only read this variable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import NamedTuple


class _Part(NamedTuple):
    """The part of a call that runs now, and its listener."""

    callback: Callable[[float], object]
    start: float
    stop: float


_current: ContextVar[_Part | None] = ContextVar("progress", default=None)


@contextmanager
def listen(callback: Callable[[float], object]) -> Iterator[None]:
    """Call a function with the progress of each call of `quickmerge` in the block.

    The argument is a float from 0, at the start of a call, to 1, at its end; it never
    decreases within a call. An exception of the function ends the call.
    """
    token = _current.set(_Part(callback, 0.0, 1.0))
    try:
        yield
    finally:
        _current.reset(token)


def listening() -> bool:
    """Return whether there is a listener."""
    return _current.get() is not None


def report(fraction: float) -> None:
    """Tell the listener, if there is one, which fraction of the part is done."""
    part = _current.get()
    if part is not None:
        # `min`, because a rounded sum may exceed the start of the next part.
        width = part.stop - part.start
        part.callback(min(part.start + fraction * width, part.stop))


class span:  # noqa: N801
    """Run a block as the part from `start` to `stop` of the part around it.

    The listener gets `start` before the block, and `stop` after it.
    """

    # A class, because a generator with `contextmanager` takes four times as long.
    def __init__(self, start: float, stop: float) -> None:
        self._limits = start, stop
        self._token: Token[_Part | None] | None = None

    def __enter__(self) -> None:
        """Start the part."""
        outer = _current.get()
        if outer is None:
            return
        width = outer.stop - outer.start
        start, stop = (min(outer.start + x * width, outer.stop) for x in self._limits)
        self._token = _current.set(_Part(outer.callback, start, stop))
        try:
            report(0)
        except BaseException:  # Python does not call `__exit__` then
            _current.reset(self._token)
            raise

    def __exit__(self, error: object, *others: object) -> None:
        """End the part; after an exception, without a report."""
        if self._token is None:
            return
        try:
            if error is None:
                report(1)
        finally:
            _current.reset(self._token)
