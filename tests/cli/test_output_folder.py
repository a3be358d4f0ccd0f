"""The folder of results: checked before the work, deleted after an error."""

import errno
import os

import pytest

from qm_cupy.cli import output_folder as module
from qm_cupy.cli.output_folder import output_folder


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source.png").touch()
    return tmp_path / "source.png"


def test_the_folder_exists_in_the_block_and_remains(tmp_path, source):
    folder = tmp_path / "a" / "b"
    with output_folder(folder, source, folder / "result"):
        assert list(folder.iterdir()) == []  # no file is left by the check
    assert folder.is_dir()
    with output_folder(folder, source, folder / "result"):  # it may exist
        (folder / "result").touch()
    with output_folder(folder, source, folder / "result"):  # the result, too
        pass
    # A link to a folder is a folder.
    link = tmp_path / "link"
    link.symlink_to(folder)
    with output_folder(link, source, link / "result"):
        pass
    assert (folder / "result").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_only_new_folders_are_deleted(tmp_path, source, error):
    (tmp_path / "old").mkdir()
    folder = tmp_path / "old" / "new" / "newer"
    with pytest.raises(error), output_folder(folder, source):
        raise error
    assert list((tmp_path / "old").iterdir()) == []
    # A folder that existed before stays, although it is empty.
    with pytest.raises(error), output_folder(tmp_path / "old", source):
        raise error
    assert (tmp_path / "old").is_dir()


def test_a_file_of_another_program_is_not_deleted(tmp_path, source):
    def write_and_fail():
        (tmp_path / "new" / "file").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError), output_folder(tmp_path / "new", source):
        write_and_fail()
    assert (tmp_path / "new" / "file").exists()


def test_what_is_not_a_folder(tmp_path, source):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none")
    # `mkdir` would say "File exists" for both.
    for path in (source, link):
        with (
            pytest.raises(ValueError, match=f"file or broken link: {path}"),
            output_folder(path, source),
        ):
            pytest.fail("the work has begun")
    with (
        pytest.raises(NotADirectoryError, match=r"Not a directory: '.*source.png/a'"),
        output_folder(source / "a", source),
    ):
        pytest.fail("the work has begun")
    assert not (tmp_path / "none").exists()


def test_a_file_that_cannot_be_replaced(tmp_path, source):
    (tmp_path / "result").mkdir()
    with (
        pytest.raises(ValueError, match="result is not a regular file: remove it"),
        output_folder(tmp_path, source, tmp_path / "result"),
    ):
        pytest.fail("the work has begun")
    # The input itself, and a link to it.
    (tmp_path / "link").symlink_to(source)
    for name in ("source.png", "link"):
        with (
            pytest.raises(ValueError, match=f"{name} is the input: rename it"),
            output_folder(tmp_path, source, tmp_path / name),
        ):
            pytest.fail("the work has begun")


def test_a_folder_that_is_not_writable(tmp_path, source, monkeypatch):
    """A read-only disk: permissions would allow it, but no file can be made."""

    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), options["dir"])

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with (
        pytest.raises(OSError, match=r"Read-only file system: '.*/new/a'"),
        output_folder(tmp_path / "new" / "a", source),
    ):
        pytest.fail("the work has begun")
    assert not (tmp_path / "new").exists()  # it was made before the check


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_permission(tmp_path, source):
    (tmp_path / "closed").mkdir(mode=0o500)
    for folder in (tmp_path / "closed", tmp_path / "closed" / "new"):
        with (
            pytest.raises(PermissionError, match=f"Permission denied: '{folder}'"),
            output_folder(folder, source),
        ):
            pytest.fail("the work has begun")
