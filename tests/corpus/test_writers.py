"""Files of merged tokens, as the command line writes them."""

from command_line import compress, save

from qm_cupy.cli import compress as command


def test_same_bytes_twice(tmp_path, tokens):
    """A time stamp in the zip would make equal results differ."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path)
    first = path.with_name("out.npz").read_bytes()
    compress(path)
    assert path.with_name("out.npz").read_bytes() == first


def test_refused_before_any_work(tmp_path, tokens, fails, monkeypatch):
    """A wrong output is an error at once, not after hours of work."""
    source = save(tmp_path / "a.npz", tokens=tokens)
    before = source.read_bytes()
    monkeypatch.setattr(command, "merge_chunk", None)  # work would raise TypeError
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to(source)

    def refuses(output, words):
        fails(["compress", source, "--budget", 3, "-o", tmp_path / output], words)

    refuses("nowhere/out.npz", "does not exist")
    refuses("a.npz/out.npz", "does not exist")
    refuses("out.npy", "must end in .npz")
    refuses("out", "must end in .npz")
    refuses("folder.npz", "is a folder")
    refuses("a.npz", "is the input")
    refuses("link.npz", "is the input")  # a link to the input
    refuses("a" * 300 + ".npz", "name too long")  # file systems allow 255 bytes
    assert source.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3  # a.npz, folder.npz, link.npz
