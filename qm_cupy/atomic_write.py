"""Write a file completely or not at all."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# The temporary files that exist now, each with the process that made it: a process that
# is forked from this one gets a copy of the set, but must not delete files of this one.
_temporaries: set[tuple[int, Path]] = set()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is renamed to `path` at the end of the block.

    If the block raises an exception, the temporary file is deleted instead. An OSError
    names `path`, unless it names another file.

    The new file keeps the permission bits of the file that it replaces, and its owner
    if the system allows it. Access control lists and other attributes are not kept. If
    `path` is a symbolic link, it stays one, and the file that it names is replaced. If
    the old file has several hard links, the other links keep the old content.
    """
    target = _follow(path)
    # The temporary file is in the same folder, because a rename is atomic only within
    # one file system. Its name is random: two processes, threads or machines that write
    # the same file do not write to one temporary file, and a file that a killed process
    # has left is in the way of no later one. The name does not contain that of `path`,
    # which may already have the greatest length that the file system allows.
    temporary = target.parent / f".{os.urandom(8).hex()}.tmp"
    entry = os.getpid(), temporary
    with _naming(path, target, temporary):
        replaced = _status(target)
        _temporaries.add(entry)  # before the file exists: a signal may end the process
        try:
            with _create(temporary, 0o666 if replaced is None else 0o600) as file:
                if replaced is not None:
                    _copy_permissions(replaced, temporary)  # before the first byte
                yield file
                file.flush()
                os.fsync(file.fileno())  # the bytes must be on disk before the rename
            temporary.replace(target)
        except BaseException:  # after a KeyboardInterrupt, too, delete the partial file
            _delete(temporary)
            raise
        finally:
            _temporaries.discard(entry)


def delete_temporaries() -> None:
    """Delete the temporary files of this process, which is about to end."""
    for process, temporary in list(_temporaries):
        if process == os.getpid():
            _delete(temporary)


def _follow(path: Path) -> Path:
    """Return the file that a symbolic link names; it need not exist."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # of a loop of links, `realpath` returns one link
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _status(target: Path) -> os.stat_result | None:
    """Return the status of the file that will be replaced, or None."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    # A rename cannot replace a folder, and must not replace a device or a pipe.
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(target))
    return status


def _create(temporary: Path, mode: int) -> BinaryIO:
    """Create and open the file, with the permission bits that the umask leaves."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(temporary, flags, mode), "wb")


def _copy_permissions(source: os.stat_result, temporary: Path) -> None:
    """Copy the owner and the permission bits of a file, as far as the system allows."""
    if hasattr(os, "chown"):  # not on Windows
        for user in (source.st_uid, -1):  # -1: at least the group, if possible
            with suppress(OSError):  # often only the superuser may change the owner
                os.chown(temporary, user, source.st_gid)
                break
    with suppress(OSError):  # a file system without permissions
        temporary.chmod(stat.S_IMODE(source.st_mode))


def _delete(temporary: Path) -> None:
    with suppress(OSError):  # the error of the block is more useful
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, *others: Path) -> Iterator[None]:
    """Let an OSError name `path` instead of one of the `others`, or of no file.

    The errors of reads and writes name no file. Those of a connection, such as a closed
    pipe, do not come from a file. An OSError without a number has its own message.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        unnamed = error.filename is None or str(error.filename) in map(str, others)
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
