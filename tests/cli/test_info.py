"""The command `info`: what is in a file, and what `compress` would do with it."""

import json

import numpy as np
import pytest
from command_line import FORMATS, compress, save

from qm_cupy.cli.main import main
from qm_cupy.corpus import plan


@pytest.fixture
def info(capsys):
    """Run the command, which must succeed, and return what it prints."""

    def run(path, *options):
        capsys.readouterr()
        assert main(["info", str(path), *map(str, options)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out) if "--json" in options else out

    return run


@pytest.fixture
def mask():
    return np.arange(12) < np.array([[12], [3], [5], [12], [4], [9], [12]])


@pytest.mark.parametrize("name", FORMATS)
def test_arrays(tmp_path, tokens, mask, info, name):
    path = save(tmp_path / name, tokens=tokens, mask=mask, ids=np.arange(7))
    shown = info(path)
    ending = path.suffix.removeprefix(".")
    size = path.stat().st_size
    assert shown.startswith(f"{path}: {ending} file, {size:,} bytes\n")
    assert "7 x 12 x 5  (used as tokens)" in shown
    if name != FORMATS[0]:  # the others hold several arrays
        assert "7 x 12  (used as mask)" in shown
        assert "int64    7\n" in shown
        assert "57 tokens, 27 padding" in shown
    assert "-> ? (give --budget, --max-error or --max-distance)" in shown


def test_what_compress_would_do(tmp_path, tokens, mask, info, monkeypatch):
    """With the same options, `info` says what the summary of `compress` says later."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 700)  # two sequences
    path = save(tmp_path / "a.npz", tokens=tokens, mask=mask)
    options = "--budget", 0.4, "--weights", "mass", "--metric", "euclidean"
    shown = info(path, *options)
    assert "compress would merge 7 x 12 x 5 -> 7 x 4 x 5\n" in shown
    assert "method average, metric euclidean, weights mass\n" in shown
    assert "sequences at a time: 2, on the CPU" in shown
    reported = info(path, *options, "--json")["merge"]
    assert reported["merged_shape"] == [7, 4, 5]
    assert (reported["tokens"], reported["padding"]) == (57, 27)
    assert "as many groups as the limit allows" in info(path, "--max-error", 0.2)
    assert info(path, "--max-error", 0.2, "--json")["merge"]["method"] == "ward"


def test_files_that_cannot_be_merged(tmp_path, tokens, mask, info):
    """The arrays are shown nevertheless, and the reason is one line."""
    path = save(tmp_path / "a.npz", a=tokens, b=tokens[0], c=np.array([None]))
    shown = info(path)
    assert "float32  12 x 5\n" in shown
    assert "pickled Python objects" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("compress cannot merge it: give the name of the token array")
    assert "(used as tokens)" in info(path, "--key", "b")
    path = save(tmp_path / "b.npz", tokens=tokens, mask=mask)
    error = info(path, "--budget", 9, "--json")["merge"]["error"]
    assert error.startswith("sequence 1: `budget` must lie in 1..3 (its tokens)")


def test_many_arrays_and_long_names(tmp_path, tokens, info):
    names = [f"{'x' * 200}{i}" for i in range(300)]
    path = save(tmp_path / "a.npz", **dict.fromkeys(names, tokens[0]))
    shown = info(path)
    assert all(name in shown for name in names)
    assert max(map(len, shown.splitlines())) < 400


def test_control_characters(tmp_path, tokens, info):
    """The name of an array must not move the cursor of a terminal, or end a line."""
    path = save(tmp_path / "a.npz", **{"x\x1b[2J\ny": tokens})
    assert r"  x\x1b[2J\ny" in info(path).splitlines()[1]
    assert list(info(path, "--json")["arrays"]) == ["x\x1b[2J\ny"]


@pytest.mark.parametrize("hint_bytes", [1, 30, 2**20])
def test_tokens_are_counted_once_per_sequence(
    tmp_path, tokens, mask, info, monkeypatch, hint_bytes
):
    monkeypatch.setattr(plan, "HINT_BYTES", hint_bytes)
    path = save(tmp_path / "a.npz", tokens=tokens, m=mask, n=mask[1], p=mask[0], q=mask)
    for options, counts in [
        (("--mask", "m"), (57, 27)),
        (("--mask", "n"), (21, 63)),
        (("--mask", "n", "--protect", "0"), (21, 63)),
        (("--protect", "p"), (84, 0)),
        (("--protect", "q"), (84, 0)),
        ((), (84, 0)),
    ]:
        reported = info(path, *options, "--json")["merge"]
        assert (reported["tokens"], reported["padding"]) == counts, options


def test_wrong_options_and_files(tmp_path, tokens, fails):
    path = save(tmp_path / "a.npy", tokens=tokens)
    fails(["info", path, "--temperature", 1], "--temperature would have no effect")
    fails(["info", path, "--budget", 3, "--max-error", 1], "not allowed with")
    fails(["info", tmp_path / "b.npy"], "b.npy: No such file")
    fails(["info", tmp_path], "is a folder")
    path.write_bytes(b"text")
    fails(["info", path], "a.npy is damaged")


def test_a_result_of_compress(tmp_path, tokens, info):
    compress(save(tmp_path / "a.npy", tokens=tokens))
    reported = info(tmp_path / "out.npz", "--json")
    shapes = {name: x["shape"] for name, x in reported["arrays"].items()}
    assert shapes == {
        "tokens": [7, 3, 5],
        "labels": [7, 12],
        "sizes": [7, 3],
        "positions": [7, 3],
        "mass": [7, 12],
    }
    # Groups of size 0 are padding.
    assert reported["arrays"]["sizes"]["used_as"] == "mask"
