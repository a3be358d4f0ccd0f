"""A file is written completely, or not at all."""

import pytest
from command_line import compress, save

from qm_cupy.atomic_write import atomic_write
from qm_cupy.cli import compress as command


def test_folder_without_permission(tmp_path, tokens, fails):
    source = save(tmp_path / "a.npy", tokens=tokens)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    try:
        # The superuser may write in any folder, so the test first tries.
        (closed / "probe").touch()
    except OSError:
        output = closed / "out.npz"
        words = f"{output}: Permission denied"
        fails(["compress", source, "--budget", 3, "-o", output], words)
    else:
        pytest.skip("this user may write anywhere")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_stopped_half_way(tmp_path, tokens, monkeypatch, capsys, error):
    """The file of an earlier run stays as it was, and no other file remains."""
    source = save(tmp_path / "a.npy", tokens=tokens)
    compress(source)
    before = (tmp_path / "out.npz").read_bytes()
    monkeypatch.setattr(command, "CHUNK_BYTES", 1)  # a chunk is one sequence
    merge = command.quickmerge

    def stop(*arguments, sequence_offset=0, **options):
        # The fifth of seven sequences: four are already written to the temporary
        # file.
        if sequence_offset == 4:
            raise error
        return merge(*arguments, sequence_offset=sequence_offset, **options)

    monkeypatch.setattr(command, "quickmerge", stop)
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
    """The rename fails; the error names the folder, and no temporary file stays."""
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match=r"folder'$") as error, atomic_write(path) as file:
        file.write(b"text")
    assert error.value.filename == str(path)
    assert [*tmp_path.iterdir()] == [path]


def test_the_first_error_is_raised(tmp_path, monkeypatch):
    """An error of the deletion does not replace the error of the block."""

    def fail(self, **options):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.unlink", fail)
    with pytest.raises(KeyError), atomic_write(tmp_path / "file"):
        raise KeyError
