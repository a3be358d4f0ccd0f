"""A file is written in one piece, or not at all."""

import pytest
from command_line import compress, save

from qm_cupy.cli import compress as command


def test_folder_without_permission(tmp_path, tokens, fails):
    source = save(tmp_path / "a.npy", tokens=tokens)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    try:
        (closed / "probe").touch()
    except OSError:
        output = closed / "out.npz"
        words = f"{output}: Permission denied"
        fails(["compress", source, "--budget", 3, "-o", output], words)
    else:
        pytest.skip("this user may write anywhere")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_stopped_half_way(tmp_path, tokens, monkeypatch, capsys, error):
    """The file of an earlier run stays as it was, and nothing else stays."""
    source = save(tmp_path / "a.npy", tokens=tokens)
    compress(source)
    before = (tmp_path / "out.npz").read_bytes()
    monkeypatch.setattr(command, "CHUNK_BYTES", 1)
    merge = command.quickmerge

    def stop(*arguments, sequence_offset=0, **options):
        if sequence_offset == 4:
            raise error
        return merge(*arguments, sequence_offset=sequence_offset, **options)

    monkeypatch.setattr(command, "quickmerge", stop)
    capsys.readouterr()
    code, _ = compress(source, "--seed", "9")
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
