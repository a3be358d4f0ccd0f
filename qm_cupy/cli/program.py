"""The process of the program: its streams and signals, and its last actions."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..atomic_write import delete_temporaries
from .output import discard, print_error


@contextmanager
def process() -> Iterator[None]:
    """Prepare the streams and signals of the process; at the end, leave nothing behind.

    Afterwards, only the exit of the interpreter is left.
    """
    _prepare_streams()
    handled = _handle_signals()
    try:
        yield
    finally:
        delete_temporaries()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # already printed, or not important
                discard(stream)
        # A signal during the exit of the interpreter must not print a traceback.
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _prepare_streams() -> None:
    """Let every text be printable on both streams, and open those that are closed."""
    # A file that is opened gets the lowest free descriptor. If the caller has closed
    # the descriptor 2, all that libraries print there would be written to that file.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; now it is the null device
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            # The encoding may lack characters of a path.
            stream.reconfigure(errors="backslashreplace")


def _handle_signals() -> list[int]:
    """Let signals that end the process raise an exception; return these signals.

    The exception closes every ``with`` block, and so deletes temporary files. During an
    import, the process ends without an exception.
    """
    if threading.current_thread() is not threading.main_thread():
        return []  # Python sets signals only there
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # The caller may want a signal to be ignored: `nohup` does so with SIGHUP.
    handled = [x for x in numbers if signal.getsignal(x) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled_number in handled:
            signal.signal(handled_number, leave)
        interrupted = number == signal.SIGINT
        if _is_importing(frame):
            if interrupted:
                print_error("interrupted")
            leave(number, frame)
        if interrupted:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)  # as shells report the signal

    # The second signal comes during the deletion, or because the first one had no
    # effect: Python ignores an exception in some functions that it calls itself.
    def leave(number: int, frame: FrameType | None) -> NoReturn:
        delete_temporaries()
        os._exit(128 + number)

    for number in handled:
        signal.signal(number, stop)
    return handled


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import is in progress.

    An exception that a signal raises there can be lost, or become another one: some
    modules try an import and ignore all errors, and the locks of imports are not made
    for it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
