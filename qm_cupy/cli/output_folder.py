"""The folder of a command that writes several files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files.inputs import shown


@contextmanager
def output_folder(folder: Path, source: Path, *files: Path) -> Iterator[None]:
    """Make a folder if it does not exist, and check that `files` can be written there.

    The file `source` is the input, which must not be replaced. If the block raises an
    exception, the folders that were made are deleted.
    """
    made = [x for x in (folder, *folder.parents) if not os.path.lexists(x)]
    try:
        _make(folder)
        for file in files:
            if not file.exists():
                continue
            if not file.is_file():
                raise ValueError(f"{shown(file)} is not a regular file: remove it")
            if file.samefile(source):
                raise ValueError(f"the output {shown(file)} is the input: rename it")
        yield
    except BaseException:  # after a KeyboardInterrupt, too
        for x in made:
            with suppress(OSError):  # the first error is more useful
                x.rmdir()
        raise


def _make(folder: Path) -> None:
    """Make a folder, and check that files can be made in it."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(
            f"--output must be a folder, got a file or broken link: {shown(folder)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not show whether a disk is read-only, so make a file.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # it may name another folder, or the temporary file
        raise OSError(error.errno, error.strerror, str(folder)) from error
