"""An array of a file, which is read a few entries at a time.

Readers never map a file into memory: if a mapped file becomes shorter, the operating
system ends the process.
"""

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import bfloat16

_PIECE = 2**20  # bytes that are read at a time
_MAX_BYTES = 2**63 - 1  # NumPy has no larger arrays
# Bytes that a sequential read delivers in the time of one more call. Measured on Linux
# with the file in its cache: 1 µs, and 4 GB/s.
BYTES_PER_CALL = 2**14


def _no_chunks(count: int) -> Iterator[NDArray[Any]]:
    """Yield no array, for an array that cannot be read."""
    yield from ()


class Stored(NamedTuple):
    """An array of a file: its header, and a function that reads it in chunks.

    A chunk is a few entries along the first axis. An array without entries has one
    empty chunk.
    """

    shape: tuple[int, ...] = ()
    # The default, two raw bytes, is for an array with a fault whose dtype is unknown or
    # does not exist in NumPy.
    dtype: np.dtype[Any] = np.dtype("V2")
    chunks: Callable[[int], Iterator[NDArray[Any]]] = _no_chunks  # of n entries each
    # The reason why the array cannot be read, or "". It becomes an error only if the
    # array is needed: other arrays of the file can still be used.
    fault: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> NDArray[Any]:
        """Return the whole array, which has at least one axis."""
        return next(self.chunks(max(1, self.shape[0])))

    def describe(self) -> str:
        """Return dtype and shape, such as "float32 600 x 256 x 192"."""
        return f"{self.dtype} {axes(self.shape) or 'number'}"


Arrays = dict[str, Stored]


def axes(shape: tuple[int, ...]) -> str:
    """Return a shape for messages, such as "600 x 256 x 192"; "" for one number."""
    return " x ".join(map(str, shape))


class DamagedFileError(ValueError):
    """A file does not have the content that its format or its headers promise."""


@contextmanager
def reading(name: str, *damage: type[Exception]) -> Iterator[None]:
    """Let errors in a block that reads the file `name` say so.

    `damage` are the errors that a damaged file causes.
    """
    try:
        yield
    except OSError as error:
        # A library raised it, or a damaged file led to an impossible position.
        if error.errno in (None, errno.EINVAL):
            raise DamagedFileError(f"{name} is damaged: {_reason(error)}") from error
        raise OSError(error.errno, error.strerror, name) from error
    except Exception as error:
        expected = isinstance(error, (EOFError, OverflowError, ValueError, damage))
        if isinstance(error, DamagedFileError) or not expected:
            raise
        raise DamagedFileError(f"{name} is damaged: {_reason(error)}") from error


@contextmanager
def naming_temporary(folder: Path | None = None) -> Iterator[None]:
    """Let an OSError that names no file name the folder of a temporary file.

    `folder` is that of the temporary file; by default it is that of `tempfile`. The
    file is closed in the block, because closing it can fail too. Errors of a closed
    pipe do not come from it.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        file = f"a temporary file in {folder or tempfile.gettempdir()}"
        raise OSError(error.errno, error.strerror, file) from error


def _reason(error: Exception) -> str:
    """Return the message of an error, cut to 120 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def impossible(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Return whether no array can have this shape, although it may have no entries."""
    entries = math.prod(max(x, 1) for x in shape)
    return min(shape, default=0) < 0 or entries * max(1, dtype.itemsize) > _MAX_BYTES


def bfloat16_or_fault() -> tuple[np.dtype[Any], str]:
    """Return the dtype bfloat16 and "", or a stand-in and what is missing."""
    try:
        return bfloat16("tokens"), ""
    except ImportError as error:
        return np.dtype("V2"), str(error).partition(" ")[2]  # without the name


def fill(chunk: NDArray[Any], file: IO[bytes]) -> None:
    """Fill a contiguous array with the next bytes of a file, in pieces.

    Some files, such as members of a zip, read by making a copy: with pieces, this is
    never a second copy of the whole array.
    """
    rest = chunk.reshape(-1).view(np.uint8).data  # the part that is not filled yet
    while rest:
        piece = file.read(min(_PIECE, len(rest)))  # may return fewer bytes
        if not piece:
            raise EOFError("it is cut short")
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]


def chunks_at(
    file: IO[bytes], name: str, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[int], Iterator[NDArray[Any]]]:
    """Return the function that reads an array in C order from byte `start` on."""
    bytes_per_entry = math.prod(shape[1:]) * dtype.itemsize

    def chunks(count: int) -> Iterator[NDArray[Any]]:
        for first in range(0, max(1, shape[0]), count):
            with reading(name):
                chunk = np.empty((min(count, shape[0] - first), *shape[1:]), dtype)
                # Other arrays of the file may have been read since the last chunk.
                file.seek(start + first * bytes_per_entry)
                fill(chunk, file)
            yield chunk
            del chunk  # before the next one is read

    return chunks


def fortran_chunks_at(
    file: IO[bytes], name: str, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[int], Iterator[NDArray[Any]]]:
    """Return the function that reads an array in Fortran order from byte `start` on.

    In this order the file is a matrix of columns, and an entry is one row of it. Of
    long columns, only the rows of a chunk are read; short columns are read completely.
    """
    num_rows, num_columns = shape[0], math.prod(shape[1:])
    column_bytes = num_rows * dtype.itemsize

    def read(rows: slice, chunk: NDArray[Any]) -> None:
        """Read rows of every column to a chunk (columns, rows)."""
        if column_bytes > BYTES_PER_CALL and rows.stop - rows.start < num_rows:
            for column in range(num_columns):
                position = column * column_bytes + rows.start * dtype.itemsize
                file.seek(start + position)
                fill(chunk[column], file)
            return
        file.seek(start)
        step = max(1, _PIECE // max(1, column_bytes))  # columns that are read at once
        for column in range(0, num_columns, step):
            whole = np.empty((min(step, num_columns - column), num_rows), dtype)
            fill(whole, file)
            chunk[column : column + step] = whole[:, rows]

    def chunks(count: int) -> Iterator[NDArray[Any]]:
        for first in range(0, max(1, num_rows), count):
            rows = slice(first, min(first + count, num_rows))
            with reading(name):
                columns = np.empty((num_columns, rows.stop - first), dtype)
                if columns.size:
                    read(rows, columns)
                axes = (rows.stop - first, *shape[1:])
                # The columns of an entry are in Fortran order too.
                chunk = np.ascontiguousarray(columns.T.reshape(axes, order="F"))
                del columns
            yield chunk
            del chunk  # before the next one is read

    return chunks


def file_size(file: IO[bytes]) -> int:
    """Return the number of bytes of a file, and leave its position as it is."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size
