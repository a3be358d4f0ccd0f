"""Write a file completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is renamed to `path` at the end of the block.

    If the block raises an exception, the temporary file is deleted instead.
    """
    # The temporary file is in the same folder, because a rename is atomic only within
    # one file system. Its name contains the process id, so that two processes that
    # write the same file do not write to one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:  # the message must name `path`, not the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the rename
        temporary.replace(path)
    except BaseException:  # after a KeyboardInterrupt, too, delete the partial file
        temporary.unlink()
        raise
