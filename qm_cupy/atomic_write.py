"""Write a file completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` if the block raises no exception."""
    # In the same folder, because a rename is atomic only within one file system. The
    # process id keeps two processes that write the same file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:  # the message names the file that the user asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the rename
        temporary.replace(path)
    except BaseException:  # KeyboardInterrupt too: leave no partial file in the folder
        temporary.unlink()
        raise
