"""Write a file completely or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is renamed to `path` at the end of the block.

    If the block raises an exception, the temporary file is deleted instead.
    """
    # The temporary file is in the same folder, because a rename is atomic only within
    # one file system. Its name is random: two processes, threads or machines that write
    # the same file do not write to one temporary file, and a file that a killed process
    # has left is in the way of no later one. The name does not contain that of `path`,
    # which may already have the greatest length that the file system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with _naming(path):
            file = temporary.open("xb")
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the rename
        with _naming(path):
            temporary.replace(path)
    except BaseException:  # after a KeyboardInterrupt, too, delete the partial file
        # The first error is more useful than an error of the deletion.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError name `path`, and not the temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
