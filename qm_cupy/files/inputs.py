"""Open a file of arrays: a regular file, a pipe, or the standard input.

The name of a file decides its format, or its first bytes, if the name has another
ending. What comes through a pipe is first copied to a temporary file without a name,
because .npz files must be read from their end.
"""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from . import npy, npz
from .npy import open_npy
from .npz import open_npz
from .safetensors import open_safetensors
from .stored import Arrays, DamagedFileError, file_size, naming_temporary, reading

STDIN = "-"  # the name of the standard input, and of the standard output
_READERS: dict[str, Callable[[IO[bytes], str], Arrays]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
}
FORMATS = tuple(_READERS)


class Input(NamedTuple):
    """An open file of arrays."""

    name: str  # for messages
    format: str  # one of `FORMATS`
    num_bytes: int
    arrays: Arrays
    status: os.stat_result | None  # of a file; None for a pipe


@contextmanager
def open_arrays(path: str | Path, folder: Path | None = None) -> Iterator[Input]:
    """Open a file of arrays, and describe them. No entries are read yet.

    Parameters
    ----------
    path : str or path
        The file, or "-" for the standard input.
    folder : path, optional
        Folder of the temporary file for a pipe; by default that of `tempfile`.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is a device or a folder, or not one of the three formats.
    """
    name = shown(path)
    with _open(path, name, folder) as (file, status):
        with reading(name):
            file_format = _format(Path(path), name, file)
            num_bytes = file_size(file)
        yield Input(
            name, file_format, num_bytes, _READERS[file_format](file, name), status
        )


def shown(path: str | Path) -> str:
    """Return a file's name for messages; of a long one, the end."""
    if str(path) == STDIN:
        return "the standard input"
    text = str(path)
    return text if len(text) <= 160 else f"...{text[-157:]}"


@contextmanager
def _open(
    path: str | Path, name: str, folder: Path | None
) -> Iterator[tuple[IO[bytes], os.stat_result | None]]:
    """Open a file that can be read at any position, and its status."""
    if str(path) == STDIN:
        if sys.stdin is None:
            raise ValueError("the standard input is closed: give the name of a file")
        # Not closed at the end: it belongs to the caller.
        source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
    else:
        # Look before opening it: opening a device can have effects, such as winding a
        # tape.
        if not str(path):
            raise ValueError("the name of the input is empty: give that of a file")
        _check_kind(Path(path).stat().st_mode, name)
        # This waits until a pipe has a writer, as other programs do.
        source = Path(path).open("rb")  # noqa: SIM115
    with source:
        status = os.fstat(source.fileno())
        _check_kind(status.st_mode, name)
        # Of a regular file as the standard input, the first bytes may have been read.
        if stat.S_ISREG(status.st_mode) and source.tell() == 0:
            yield source, status
            return
        with naming_temporary(folder), tempfile.TemporaryFile(dir=folder) as copy:
            shutil.copyfileobj(source, copy, 2**20)
            copy.seek(0)
            yield copy, None


def _check_kind(mode: int, name: str) -> None:
    """Raise unless the mode is that of a regular file or of a pipe."""
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ValueError(f"{name} is a device or a terminal: give a file or a pipe")
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name} is a folder: give the name of a file")
    if stat.S_ISSOCK(mode):
        raise ValueError(f"{name} is a socket: give a file or a pipe")


def _format(path: Path, name: str, file: IO[bytes]) -> str:
    """Return the format of a file, by the ending of its name or by its first bytes."""
    first = file.read(10)
    file.seek(0)
    content = None
    if first.startswith(npy.MAGIC):
        content = ".npy"
    elif first[8:9] == b"{":  # the header, after the 8 bytes of its length
        # Before .npz, because the length may begin with the bytes of "PK".
        content = ".safetensors"
    elif first.startswith(npz.MAGIC):
        content = ".npz"
    if not first:
        raise DamagedFileError(f"{name} is empty")
    suffix = path.suffix if path.suffix in _READERS else None
    if suffix == ".npy" and not content:
        raise DamagedFileError(f"{name} is damaged: it does not start like a .npy file")
    if suffix and content and suffix != content:
        raise DamagedFileError(f"{name} has the content of a {content} file: rename it")
    if file_format := suffix or content:
        # If the content is none of these, the reader says what is wrong.
        return file_format
    raise DamagedFileError(f"{name} is not a .npy, .npz or .safetensors file")


def is_same_file(status: os.stat_result | None, path: Path) -> bool:
    """Return whether the path, which may be a link, leads to the file of the status."""
    if status is None:
        return False
    try:
        return os.path.samestat(status, path.stat())
    except OSError:
        return False
