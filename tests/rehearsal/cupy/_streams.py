"""Streams, events and graphs, in the order that CUDA gives them.

Work is done at once where nothing is in its way. It waits in its stream's queue behind
a kernel that takes time, and it is recorded, not done, while its stream captures.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cupy import _runtime

_CAPTURING, _INVALIDATED, _IMPLICIT, _CAPTURED_EVENT = 900, 901, 906, 907
_current = threading.local()
_all: list["Stream"] = []


class _Sleep:
    """A kernel that takes a while and does nothing else."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, 0.0

    def ready(self) -> bool:
        self._end = self._end or time.perf_counter() + self._seconds
        return time.perf_counter() >= self._end

    def __call__(self) -> None:
        while not self.ready():
            time.sleep(0.001)


class _Marker:
    """A place in a stream's queue, which an event or another stream waits for."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.passed, self.captured = stream, False, False
        self.seconds = 0.0

    def __call__(self) -> None:
        self.passed, self.seconds = True, time.perf_counter()


class _Wait:
    """Holds a stream up until another one has come to a marker."""

    def __init__(self, marker: _Marker) -> None:
        self._marker = marker

    def ready(self) -> bool:
        self._marker.stream._advance()
        return self._marker.passed

    def __call__(self) -> None:
        self._marker.stream._drain(self._marker)


class Stream:
    """A queue of work; `null` is the legacy default stream."""

    null: "Stream"

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        if ptds:
            raise NotImplementedError("the stand-in has no per-thread default stream")
        _runtime.check()
        self.ptr = 0 if null else 0x1000 + 16 * len(_all)
        self.is_non_blocking = non_blocking
        self.priority = priority or 0
        self._queue: deque[Any] = deque()
        self._recorded: list[Callable[[], None]] | None = None
        self._invalid = False
        self._outer: list[Stream] = []
        _all.append(self)

    @staticmethod
    def from_external(obj: Any) -> "Stream":
        """Return the stream of an object that speaks the CUDA stream protocol."""
        _, pointer = obj.__cuda_stream__()
        return _of_pointer(pointer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> "Stream":
        self._outer.append(get_current_stream())
        return self.use()

    def __exit__(self, *exception: object) -> None:
        self._outer.pop().use()

    def use(self) -> "Stream":
        _current.stream = self
        return self

    @property
    def done(self) -> bool:
        _runtime.check()
        self._advance()
        return not self._queue

    def synchronize(self) -> None:
        _runtime.check()
        if self._recorded is not None:
            self._invalidate(_CAPTURING)
        self._order()
        self._drain()
        _runtime.settle()

    def record(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if event._marker is not None and not event._marker.passed:
            submit(_Wait(event._marker), self)

    def begin_capture(self, mode: int | None = None) -> None:
        _runtime.check()
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._recorded is not None:
            raise _runtime.CUDARuntimeError(_CAPTURING)
        self._recorded, self._invalid = [], False

    def is_capturing(self) -> bool:
        return self._recorded is not None

    def end_capture(self) -> "Graph":
        _runtime.check()
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            raise RuntimeError("cudaStreamBeginCapture must be called first")
        if self._invalid:
            raise _runtime.CUDARuntimeError(_INVALIDATED)
        return Graph(recorded)

    def _invalidate(self, status: int) -> None:
        self._invalid = True
        raise _runtime.CUDARuntimeError(status)

    def _order(self) -> None:
        """Wait for the null stream, or as the null stream for all blocking ones."""
        others = [
            s for s in _all if not s.is_non_blocking and (s.ptr == 0) != (not self.ptr)
        ]
        for other in [] if self.is_non_blocking else others:
            other._advance()
            if other._queue:
                marker = _Marker(other)
                other._queue.append(marker)
                self._queue.append(_Wait(marker))

    def _advance(self) -> None:
        """Do what can be done by now."""
        while self._queue and getattr(self._queue[0], "ready", _at_once)():
            self._queue.popleft()()

    def _drain(self, marker: _Marker | None = None) -> None:
        """Do all work, or that up to a marker, however long it takes."""
        while self._queue and not (marker and marker.passed):
            self._queue.popleft()()


class Event:
    """A moment in a stream."""

    def __init__(
        self,
        block: bool = False,
        disable_timing: bool = False,
        interprocess: bool = False,
    ) -> None:
        _runtime.check()
        self._marker: _Marker | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = get_current_stream() if stream is None else stream
        marker = _Marker(stream)
        marker.captured = stream._recorded is not None
        submit(marker, stream)
        self._marker = marker

    @property
    def done(self) -> bool:
        _runtime.check()
        marker = self._marker
        if marker is not None and marker.captured:
            spoil_capture(marker.stream)  # CUDA's answer is an error; CuPy's is False
        elif marker is not None and not marker.passed:
            marker.stream._advance()
        return marker is None or marker.passed

    def synchronize(self) -> None:
        _runtime.check()
        marker = self._marker
        if marker is not None and marker.captured:
            spoil_capture(marker.stream)
            raise _runtime.CUDARuntimeError(_CAPTURED_EVENT)
        if marker is not None:
            marker.stream._drain(marker)
        _runtime.settle()


class Graph:
    """Work that a capture has recorded; only `Stream.end_capture` makes one."""

    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self._recorded = recorded

    def launch(self, stream: Stream | None = None) -> None:
        for work in self._recorded:
            submit(work, get_current_stream() if stream is None else stream)


def get_current_stream(device_id: int = -1) -> Stream:
    return getattr(_current, "stream", Stream.null)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between two events that have passed."""
    times = [event._marker for event in (start_event, end_event)]
    if not all(marker is not None and marker.passed for marker in times):
        raise _runtime.CUDARuntimeError(1)
    return (times[1].seconds - times[0].seconds) * 1e3


def submit(work: Callable[[], None], stream: Stream | None = None) -> None:
    """Put work into a stream: it is done, queued, or recorded."""
    stream = get_current_stream() if stream is None else stream
    if idle(stream):
        stream._queue.append(work)
        stream._advance()
    elif stream._recorded is not None:
        stream._recorded.append(work)
    else:
        stream._queue.append(work)


def idle(stream: Stream | None = None) -> bool:
    """Whether what is put into a stream now is done at once."""
    _runtime.check()
    stream = get_current_stream() if stream is None else stream
    if stream._recorded is not None:
        if stream._invalid:
            raise _runtime.CUDARuntimeError(_INVALIDATED)
        return False
    if stream.ptr == 0:
        for other in _all:
            if other._recorded is not None and not other.is_non_blocking:
                other._invalidate(_IMPLICIT)
    stream._order()
    stream._advance()
    return not stream._queue


def sleep(seconds: float) -> None:
    """Keep the current stream busy; the CPU goes on."""
    submit(_Sleep(seconds))


def refuse_in_capture() -> None:
    """Fail, and spoil the capture, if the current stream captures."""
    stream = get_current_stream()
    if stream._recorded is not None:
        stream._invalidate(_CAPTURING)


def spoil_capture(stream: Stream | None = None) -> None:
    """Let a capture fail later, if there is one: so does a query of its events."""
    stream = get_current_stream() if stream is None else stream
    stream._invalid = stream._recorded is not None


def synchronize_device() -> None:
    """Wait for all streams."""
    _runtime.check()
    for stream in _all:
        if stream._recorded is not None:
            stream._invalidate(_CAPTURING)
    for stream in _all:
        stream._drain()
    _runtime.settle()


def wait_between(ahead: Stream, pointer: int) -> None:
    """Let the stream of a pointer, as DLPack spells it, wait for another."""
    behind = _of_pointer(0 if pointer == 1 else pointer)
    if behind != ahead:
        behind.wait_event(ahead.record())


def _of_pointer(pointer: int) -> Stream:
    for stream in _all:
        if stream.ptr == pointer:
            return stream
    raise NotImplementedError(f"the stand-in knows no stream at {pointer:#x}")


def _at_once() -> bool:
    return True


Stream.null = Stream(null=True)
for _name in (Stream, Event, Graph):
    _name.__module__ = "cupy.cuda"
