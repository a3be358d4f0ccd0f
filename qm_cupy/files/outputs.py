"""Open a file for a result: a regular file, a pipe, or the standard output.

A regular file is replaced when the result is complete. A pipe gets the result when it
is complete.
"""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ..atomic_write import atomic_write
from .inputs import FORMATS, STDIN, is_same_file, shown
from .stored import naming_temporary

_STDOUT = "the standard output"


class Output(NamedTuple):
    """Where a result is written, and in which format."""

    path: str | Path  # "-" is the standard output
    format: str  # one of `FORMATS`

    @property
    def name(self) -> str:
        """The name for messages."""
        return _STDOUT if self.is_stdout else shown(self.path)

    @property
    def is_stdout(self) -> bool:
        """Whether the result goes to the standard output."""
        return str(self.path) == STDIN

    def folder(self) -> Path | None:
        """Return the folder of a regular file; None for a pipe."""
        return None if self.is_pipe() else _target(Path(self.path)).parent

    def is_pipe(self) -> bool:
        """Return whether the result goes to a pipe or to the standard output."""
        if self.is_stdout:
            return True
        try:
            return stat.S_ISFIFO(Path(self.path).stat().st_mode)
        except OSError:
            return False  # it does not exist yet

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open a file in which every position can be written, and deliver it."""
        if not self.is_pipe():
            with atomic_write(Path(self.path)) as file:
                yield file
            return
        with naming_temporary(), tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            try:
                with self._open_pipe() as pipe:
                    shutil.copyfileobj(file, pipe, 2**20)
            except OSError as error:
                # Not an OSError: a reader that has gone ends other commands quietly,
                # but this one has not delivered its result.
                reason = f"{self.name}: {error.strerror}"
                raise ValueError(f"{reason} (the result is lost)") from error

    def _open_pipe(self) -> IO[bytes]:
        if self.is_stdout:
            # Not closed at the end, because it belongs to the caller.
            return open(sys.stdout.fileno(), "wb", closefd=False)
        return Path(self.path).open("wb")


def check_output(
    path: str | Path, format_option: str | None, source: os.stat_result | None
) -> Output:
    """Return the output; raise if it cannot be written, or would replace the input.

    `format_option` is a format without the dot, such as "npz", or None if the name of
    the file decides. `source` is the status of the input.
    """
    wanted = None if format_option is None else f".{format_option}"
    if _is_stdout(path):
        # If it is closed, it has become the null device (or None, in other programs).
        if sys.stdout is None or _is_device(os.fstat(sys.stdout.fileno()).st_mode):
            raise ValueError(
                f"{_STDOUT} is closed, a device or a terminal: give a file or a pipe"
            )
        return Output(STDIN, wanted or ".npz")
    if not str(path):
        raise ValueError("the name of the output is empty: give that of a file")
    path = Path(path)
    name = shown(path)
    suffix = path.suffix if path.suffix in FORMATS else None
    if wanted and suffix and wanted != suffix:
        raise ValueError(
            f"the output {name} would be a {wanted} file: its name must not end in "
            f"{suffix}"
        )
    _check_target(path, name, source)
    file_format = wanted or suffix or (".npz" if Output(path, "").is_pipe() else None)
    if file_format is None:
        raise ValueError(
            f"the output must end in .npz, .npy or .safetensors, got {name} (or give "
            "--format)"
        )
    return Output(path, file_format)


def _is_stdout(path: str | Path) -> bool:
    """Return whether this is the standard output: "-", or a name such as /dev/stdout.

    The output of a command may go to a regular file. This file must not be replaced,
    because the command still prints to it.
    """
    if str(path) == STDIN:
        return True
    try:
        return is_same_file(os.fstat(sys.stdout.fileno()), Path(path))
    except (AttributeError, OSError, ValueError):  # no standard output
        return False


def _check_target(path: Path, name: str, source: os.stat_result | None) -> None:
    """Raise unless the path can be a new file, an existing one or a pipe."""
    parent = _target(path).parent
    if not parent.is_dir():
        raise ValueError(
            f"the output's folder {shown(parent)} does not exist: create it first"
        )
    if is_same_file(source, path):
        raise ValueError(f"the output {name} is the input: give another name")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    # Other errors, such as a name that is too long or a loop of links, name the path.
    if stat.S_ISDIR(mode):
        raise ValueError(f"the output {name} is a folder: give the name of a file")
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise ValueError(f"the output {name} is a device or a socket: give a file")


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _target(path: Path) -> Path:
    """Return the file to which a link leads."""
    return Path(os.path.realpath(path))
