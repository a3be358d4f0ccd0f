"""What commands print: summaries, and errors on one line."""

import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

PATIENCE = 1.0  # seconds after which the command says that it waits
# Characters of an error, without the name of the program before it: a line stays under
# 300 characters.
_LIMIT = 280


def print_summary(text: str, stream: TextIO | None = None) -> None:
    """Print a summary of a result that is already in its file.

    The command has done its work, so it does not matter whether the stream is closed,
    full, or a pipe that is no longer read. By default, it is standard output.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        discard(stream)


def method_text(summary: Mapping[str, Any]) -> str:
    """Return how tokens are merged; `summary` is that of `Plan.describe`."""
    linkage = ", weighted linkage" if summary["weighted_linkage"] else ""
    return (
        f"method {summary['method']}, metric {summary['metric']}, weights "
        f"{summary['weights']}{linkage}"
    )


def device_text(summary: Mapping[str, Any]) -> str:
    """Return where tokens are merged; `summary` is that of `Plan.describe`."""
    return "a GPU" if summary["device"] == "cuda" else "the CPU"


@contextmanager
def waiting_for(path: str) -> Iterator[Callable[[], None]]:
    """Say so if a named pipe has no writer yet; yield a function to call at its data.

    The command waits, as other programs do, but the user may have forgotten the writer.
    """
    try:
        is_pipe = stat.S_ISFIFO(Path(path).stat().st_mode)
    except (OSError, ValueError):
        is_pipe = False
    if not is_pipe:
        yield lambda: None
        return
    text = f"waiting for a program that writes to {one_line(ValueError(path), 'ascii')}"
    timer = threading.Timer(PATIENCE, print_error, [text])
    timer.daemon = True  # Ctrl-C must end the process
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def flush_output() -> None:
    """Write what has been printed; an error names standard output."""
    try:
        print(end="", flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def print_error(text: str) -> None:
    """Print a line on standard error, if it can be written."""
    with suppress(OSError):
        print(f"qm-cupy: {text}", file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """Send the text in the stream's buffer, and all later text, to the null device.

    The buffer cannot be emptied otherwise, and the interpreter would try to write it at
    the exit, fail, and change the exit status.
    """
    with suppress(OSError, ValueError):  # a stream of a test has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def reader_has_gone() -> bool:
    """Return whether standard output is a pipe that is no longer read.

    A BrokenPipeError alone does not say so: it can also come from another pipe, such as
    one to a process that computes.
    """
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no `poll`
        return False


def one_line(error: Exception, encoding: str | None) -> str:
    """Return the message of an error as one short line that the encoding can show.

    For errors of the operating system this is the file and the reason.
    """
    encoding = encoding or "utf-8"
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without "[Errno 2]"
        files = [
            visible(os.fsdecode(x) if isinstance(x, bytes) else str(x), encoding)
            for x in (error.filename, error.filename2)
            if x is not None
        ]
        if files:
            room = (_LIMIT - len(text)) // len(files) - len(" -> ")
            names = " -> ".join(_cut(file, room) for file in files)
            return f"{names}: {visible(text, encoding)}"
    text = visible(text, encoding)
    # A MemoryError of Python has an empty message.
    empty = isinstance(error, MemoryError) and "not enough memory"
    return _shorten(text) or empty or type(error).__name__


def visible(text: str, encoding: str = "utf-8") -> str:
    """Escape the characters that the encoding lacks, and those that change the line.

    The latter are line breaks, other control characters, marks that reverse the
    direction of the text, and the bytes of a file name that is not valid UTF-8. The
    name of a file can contain all of these.
    """
    printable = (
        x if x.isprintable() else x.encode("unicode_escape").decode("ascii")
        for x in text
    )
    return "".join(printable).encode(encoding, "backslashreplace").decode(encoding)


def _shorten(text: str) -> str:
    """Shorten long words, such as paths, and then the whole text."""
    for word in sorted(text.split(" "), key=len, reverse=True):
        extra = len(text) - _LIMIT
        if extra > 0:
            # Part of a path is enough to recognise it; a short word is kept.
            text = text.replace(word, _cut(word, max(len(word) - extra, 60)))
    return _cut(text, _LIMIT)


def _cut(text: str, length: int) -> str:
    """Replace the middle of a long text by "...": the end is often the most useful."""
    if len(text) <= length:
        return text
    tail = (length - 3) // 2
    return f"{text[: length - 3 - tail]}...{text[-tail:]}"
