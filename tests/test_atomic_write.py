"""A file is written completely, or not at all."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from command_line import compress, save

import qm_cupy as qm
from qm_cupy.atomic_write import atomic_write, delete_temporaries
from qm_cupy.corpus import merge_options, plan

resource = pytest.importorskip("resource") if os.name == "posix" else None
NOBODY = 65534  # the number of a user without rights, on most systems
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")


@pytest.fixture
def ordinary_user(tmp_path, monkeypatch):
    """Take the rights of the superuser away from the test, which may run as root.

    Other users cannot reach the folder of the test by its absolute path.
    """
    monkeypatch.chdir(tmp_path)
    superuser = hasattr(os, "geteuid") and os.geteuid() == 0
    if superuser:
        os.chown(tmp_path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield
    if superuser:
        os.seteuid(0)


def write(path, content=b"new"):
    with atomic_write(Path(path)) as file:
        file.write(content)


def test_folder_without_permission(ordinary_user, tmp_path):
    Path("closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as error:
        write("closed/out.npz")
    assert error.value.filename == "closed/out.npz"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_stopped_half_way(tmp_path, tokens, monkeypatch, capsys, error):
    """The file of an earlier run stays as it was, and no other file remains."""
    source = save(tmp_path / "a.npy", tokens=tokens)
    compress(source)
    before = (tmp_path / "out.npz").read_bytes()
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)  # a chunk is one sequence
    merge = merge_options.quickmerge

    def stop(*arguments, sequence_offset=0, **options):
        # The fifth of seven sequences: four are already written to the temporary
        # file.
        if sequence_offset == 4:
            raise error
        return merge(*arguments, sequence_offset=sequence_offset, **options)

    monkeypatch.setattr(merge_options, "quickmerge", stop)
    capsys.readouterr()
    code, _ = compress(source, "--order", "first")  # would give another file
    # 130: stopped by SIGINT, as shells report it.
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # the source and the earlier output


def test_two_writers_of_one_file(tmp_path):
    """Also of one process, as two threads are: the last one to finish wins."""
    path = tmp_path / "file"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [path]


def test_a_name_of_the_greatest_length(tmp_path):
    path = tmp_path / ("x" * 255)  # bytes, the limit of most file systems
    with atomic_write(path) as file:
        file.write(b"text")
    assert path.read_bytes() == b"text"


def test_a_folder_of_the_same_name(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_nothing(path)
    assert error.value.filename == str(path)
    assert [*tmp_path.iterdir()] == [path]


def write_nothing(path):
    """The error must come before the block, which may take hours."""
    with atomic_write(path):
        pytest.fail("the block must not start")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="Not a regular file") as error:
        write_nothing(path)
    assert error.value.filename == str(path)
    assert path.is_fifo()


@POSIX
class TestPermissions:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o666, 0o4755])
    def test_they_are_kept(self, tmp_path, mode):
        path = tmp_path / "file"
        path.touch()
        path.chmod(mode)
        with atomic_write(path) as file:
            # Before the first byte: another user could read it otherwise.
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_a_new_file_follows_the_umask(self, tmp_path, umask, mode):
        before = os.umask(umask)
        try:
            write(tmp_path / "file")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode

    def test_a_strict_umask_does_not_hinder(self, tmp_path):
        (tmp_path / "file").touch(0o644)
        before = os.umask(0o777)
        try:
            write(tmp_path / "file")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644

    def test_the_owner_is_kept(self, tmp_path, monkeypatch):
        """Whoever runs the test: the call to the system is recorded."""
        (tmp_path / "file").touch()
        status = (tmp_path / "file").stat()
        calls = []

        def chown(path, user, group):
            # Until it has its own permissions, only its owner may read the file.
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            calls.append((user, group))
            if user != -1:
                raise PermissionError  # as for a user who is not the superuser

        monkeypatch.setattr("os.chown", chown)
        write(tmp_path / "file")
        group = status.st_gid
        assert calls == [(status.st_uid, group), (-1, group)]
        assert (tmp_path / "file").read_bytes() == b"new"

    def test_a_file_of_another_user(self, ordinary_user, tmp_path):
        """Without the right to give a file away, it gets the owner of the process."""
        Path("file").touch(0o640)
        write("file")
        assert stat.S_IMODE(Path("file").stat().st_mode) == 0o640
        assert Path("file").stat().st_uid == os.geteuid()


@POSIX
class TestLinks:
    def test_a_link_stays_one(self, tmp_path):
        """The temporary file is beside the file, which may be on another disk."""
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "file").write_bytes(b"old")
        (folder / "file").chmod(0o600)
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("folder/file")
        with atomic_write(tmp_path / "a") as file:
            file.write(b"new")
            assert len([*folder.iterdir()]) == 2
        assert (tmp_path / "a").readlink() == Path("b")
        assert (tmp_path / "b").readlink() == Path("folder/file")
        assert [x.name for x in folder.iterdir()] == ["file"]
        assert (folder / "file").read_bytes() == b"new"
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600

    def test_a_link_to_a_file_that_does_not_exist(self, tmp_path):
        (tmp_path / "a").symlink_to("file")
        write(tmp_path / "a")
        assert (tmp_path / "a").is_symlink()
        assert (tmp_path / "file").read_bytes() == b"new"

    @pytest.mark.parametrize(
        ("target", "number"),
        [
            ("a", errno.ELOOP),
            ("missing/file", errno.ENOENT),
            (".", errno.EISDIR),
            ("file/x", errno.ENOTDIR),
        ],
    )
    def test_links_without_a_file(self, tmp_path, target, number):
        (tmp_path / "file").touch()
        (tmp_path / "a").symlink_to(target)
        with pytest.raises(OSError, match=r"/a'$") as error:
            write_nothing(tmp_path / "a")
        assert error.value.errno == number
        assert error.value.filename == str(tmp_path / "a")
        assert {x.name for x in tmp_path.iterdir()} == {"a", "file"}

    def test_hard_links_keep_the_old_content(self, tmp_path):
        (tmp_path / "a").write_bytes(b"old")
        (tmp_path / "b").hardlink_to(tmp_path / "a")
        write(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"new"
        assert (tmp_path / "b").read_bytes() == b"old"


@POSIX
@pytest.mark.parametrize("name", ["out.npz", "out.safetensors", "prior.safetensors"])
def test_files_of_the_library(tmp_path, tokens, name):
    """Each `save` keeps links and permissions, and names the file in an error."""
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    item = qm.MLPPrior.init(5) if "prior" in name else qm.quickmerge(tokens, 3)
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o600)
    path = tmp_path / name
    path.symlink_to("file")
    item.save(path)
    assert path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size > 0
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        item.save(path)
    assert error.value.filename == str(path)


class TestErrors:
    """An OSError names the file, nothing is left, and the old file stays."""

    @pytest.mark.skipif(resource is None, reason="Windows has no limit of this type")
    @pytest.mark.parametrize("size", [4000, 4_000_000])  # while closing, while writing
    def test_a_limit_of_the_system(self, tmp_path, size):
        """A limit on the size of files fails as a full disk does."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                write(path, bytes(size))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert [*tmp_path.iterdir()] == [path]

    @pytest.mark.parametrize(
        ("error", "name"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "file"),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "file"),
            (OSError(errno.EIO, "Input/output error", "other"), "other"),
            (OSError("damaged"), None),  # not an error of the system
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
        ],
    )
    def test_errors_of_the_block(self, tmp_path, monkeypatch, error, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(type(error)) as raised, atomic_write(Path("file")):
            raise error
        assert raised.value.filename == name
        assert str(error.args[-1]) in str(raised.value)
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize("name", ["x" * 256, "missing/file"])
    def test_names_that_do_not_work(self, tmp_path, name):
        with pytest.raises(OSError, match=rf"{name}'$"):
            write_nothing(tmp_path / name)
        assert [*tmp_path.iterdir()] == []

    def test_the_rename_fails(self, tmp_path):
        """Here, because the folder is removed during the block."""
        path = tmp_path / "folder" / "file"
        path.parent.mkdir()
        with pytest.raises(FileNotFoundError) as error, atomic_write(path):
            shutil.rmtree(path.parent)
        assert error.value.filename == str(path)
        assert error.value.filename2 is None


def test_delete_temporaries(tmp_path, monkeypatch):
    """For a program that must end at once, and not for a process forked from it."""

    def delete_in_the_block():
        with atomic_write(tmp_path / "file"):
            with monkeypatch.context() as forked:
                forked.setattr("os.getpid", lambda: 0)
                delete_temporaries()
            assert len([*tmp_path.iterdir()]) == 1
            delete_temporaries()
            assert [*tmp_path.iterdir()] == []

    with pytest.raises(FileNotFoundError):
        delete_in_the_block()


def test_the_first_error_is_raised(tmp_path, monkeypatch):
    """An error of the deletion does not replace the error of the block."""

    def fail(self, **options):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.unlink", fail)
    with pytest.raises(KeyError), atomic_write(tmp_path / "file"):
        raise KeyError
