"""Streams, events and graphs, with CUDA's rules of order.

If a stream is idle, it does its work at once. Behind a kernel that takes time, work
waits in the queue of its stream. While a stream captures, it records its work and does
not do it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cupy import _runtime

# Numbers of CUDA's errors; _runtime.py has their names.
_CAPTURING, _INVALIDATED, _IMPLICIT, _CAPTURED_EVENT = 900, 901, 906, 907
_current = threading.local()  # each thread has its own current stream
_all: list["Stream"] = []


# Items of a queue. An item may have `ready`: whether it can run now without waiting.
# Calling an item does its work, and waits if it must.


class _Sleep:
    """A kernel that takes time and does nothing else."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, 0.0

    def ready(self) -> bool:
        # The time starts when the stream reaches the kernel.
        self._end = self._end or time.perf_counter() + self._seconds
        return time.perf_counter() >= self._end

    def __call__(self) -> None:
        while not self.ready():
            time.sleep(0.001)


class _Marker:
    """A position in a stream's queue, for which an event or another stream waits."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.passed, self.captured = stream, False, False
        self.seconds = 0.0  # the time when the stream passed it

    def __call__(self) -> None:
        self.passed, self.seconds = True, time.perf_counter()


class _Wait:
    """Work that delays a stream until another stream has passed a marker."""

    def __init__(self, marker: _Marker) -> None:
        self._marker = marker

    def ready(self) -> bool:
        # The other stream only advances when a call asks it to.
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
        # Invented addresses, all different. CUDA's default stream is 0.
        self.ptr = 0 if null else 0x1000 + 16 * len(_all)
        self.is_non_blocking = non_blocking
        self.priority = priority or 0
        self._queue: deque[Any] = deque()
        self._recorded: list[Callable[[], None]] | None = (
            None  # a list while it captures
        )
        self._invalid = False  # the capture will fail
        self._outer: list[Stream] = []  # the streams before each `with`
        _all.append(self)

    @staticmethod
    def from_external(obj: Any) -> "Stream":
        """Return the stream of an object that supports the CUDA stream protocol."""
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
        if self._recorded is not None:  # recorded work cannot be waited for
            self._invalidate(_CAPTURING)
        self._order()
        self._drain()
        _runtime.settle()

    def record(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        # The stream waits, the CPU does not.
        if event._marker is not None and not event._marker.passed:
            submit(_Wait(event._marker), self)

    def begin_capture(self, mode: int | None = None) -> None:
        _runtime.check()
        # CUDA does not capture the null stream, nor a stream that captures already.
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._recorded is not None:
            raise _runtime.CUDARuntimeError(_CAPTURING)
        self._recorded, self._invalid = [], False

    def is_capturing(self) -> bool:
        return self._recorded is not None

    def end_capture(self) -> "Graph":
        _runtime.check()
        # The capture ends even if it fails.
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
        """Put waits for other streams into the queue, by the rule of the null stream.

        A blocking stream waits for the null stream, and the null stream waits for all
        blocking streams.
        """
        others = [
            s for s in _all if not s.is_non_blocking and (s.ptr == 0) != (not self.ptr)
        ]
        for other in [] if self.is_non_blocking else others:
            other._advance()
            if other._queue:  # wait for all work that the other stream has now
                marker = _Marker(other)
                other._queue.append(marker)
                self._queue.append(_Wait(marker))

    def _advance(self) -> None:
        """Do the work that is ready, up to the first item that must wait."""
        while self._queue and getattr(self._queue[0], "ready", _at_once)():
            self._queue.popleft()()

    def _drain(self, marker: _Marker | None = None) -> None:
        """Do all work, or all work up to a marker, and wait as long as it takes."""
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
        # Recording again moves the event to a new marker.
        marker = _Marker(stream)
        marker.captured = stream._recorded is not None
        submit(marker, stream)
        self._marker = marker

    @property
    def done(self) -> bool:
        _runtime.check()
        marker = self._marker
        if marker is not None and marker.captured:
            spoil_capture(marker.stream)  # CUDA returns an error, CuPy returns False
        elif marker is not None and not marker.passed:
            marker.stream._advance()
        return marker is None or marker.passed

    def synchronize(self) -> None:
        _runtime.check()
        marker = self._marker
        if marker is not None and marker.captured:
            spoil_capture(marker.stream)
            raise _runtime.CUDARuntimeError(_CAPTURED_EVENT)
        if marker is not None:  # an event that was not recorded needs no wait
            marker.stream._drain(marker)
        _runtime.settle()


class Graph:
    """Work that a capture has recorded; only `Stream.end_capture` creates one."""

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
    # 1 is cudaErrorInvalidValue.
    if not all(marker is not None and marker.passed for marker in times):
        raise _runtime.CUDARuntimeError(1)
    return (times[1].seconds - times[0].seconds) * 1e3


def submit(work: Callable[[], None], stream: Stream | None = None) -> None:
    """Put work into a stream, which does, queues or records it."""
    stream = get_current_stream() if stream is None else stream
    if idle(stream):
        stream._queue.append(work)
        stream._advance()
    elif stream._recorded is not None:
        stream._recorded.append(work)
    else:
        stream._queue.append(work)


def idle(stream: Stream | None = None) -> bool:
    """Return whether a stream would do new work at once."""
    _runtime.check()
    stream = get_current_stream() if stream is None else stream
    if stream._recorded is not None:
        if stream._invalid:
            raise _runtime.CUDARuntimeError(_INVALIDATED)
        return False
    # Work in the null stream would wait for every blocking stream. If one of them
    # captures, this is an error, and the capture fails.
    if stream.ptr == 0:
        for other in _all:
            if other._recorded is not None and not other.is_non_blocking:
                other._invalidate(_IMPLICIT)
    stream._order()
    stream._advance()
    return not stream._queue


def sleep(seconds: float) -> None:
    """Keep the current stream busy, while the CPU continues."""
    submit(_Sleep(seconds))


def refuse_in_capture() -> None:
    """Raise an error and invalidate the capture, if the current stream captures."""
    stream = get_current_stream()
    if stream._recorded is not None:
        stream._invalidate(_CAPTURING)


def spoil_capture(stream: Stream | None = None) -> None:
    """Let a capture fail at its end, if the stream captures.

    In CUDA a query of an event in a capture does this.
    """
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


def wait_between(producer: Stream, pointer: int) -> None:
    """Let the stream of a pointer wait for another stream; 1 is DLPack's default."""
    consumer = _of_pointer(0 if pointer == 1 else pointer)
    if consumer != producer:
        consumer.wait_event(producer.record())


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
