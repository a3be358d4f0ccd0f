"""Files of merged tokens, as the command line writes them."""

import json
import os

import numpy as np
import pytest
from command_line import assert_same, compress, save

import qm_cupy as qm
from qm_cupy.cli.main import main
from qm_cupy.corpus import merge_file, plan

SUFFIXES = ".npz", ".safetensors", ".npy"


def run(source, output, *options):
    argv = ["compress", str(source), "-o", str(output), *options]
    return main(argv if "--max-error" in options else [*argv, "--budget", "3"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_bytes_twice(tmp_path, tokens, suffix):
    """A time stamp in the zip would make equal results differ."""
    path, output = save(tmp_path / "a.npy", tokens=tokens), tmp_path / f"b{suffix}"
    run(path, output)
    first = output.read_bytes()
    run(path, output)
    assert output.read_bytes() == first


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 12 * 5 * 4, 2**26])
@pytest.mark.parametrize("options", [(), ("--max-error", "0.4")])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats(tmp_path, tokens, monkeypatch, suffix, dtype, options, chunk_bytes):
    """With a limit of the error, K is known only at the end."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("qm_cupy.files.write._IN_MEMORY", 10)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = tokens.astype(dtype)
    path, output = tmp_path / "a.npy", tmp_path / f"b{suffix}"
    for part in (x, x[0]):
        save(path, tokens=part)
        assert run(path, output, *options) == 0
        how = {"max_error": 0.4} if options else {"budget": 3}
        wanted = qm.quickmerge(part, **how)
        if suffix == ".npy":
            # NumPy's format has no bfloat16, but the two bytes of each number.
            got = np.load(output).view(dtype)
            np.testing.assert_array_equal(got, wanted.tokens, strict=True)
        else:
            assert_same(qm.Merged.load(output), wanted)


def test_other_programs_read_safetensors(tmp_path, tokens):
    """torch needs arrays at multiples of the size of their numbers."""
    module = pytest.importorskip("safetensors.torch")
    # The package itself aligns arrays by writing the widest numbers first.
    # 7 sequences of 3 groups of width 5: an odd number of float16.
    path = save(tmp_path / "a.npy", tokens=tokens.astype(np.float16))
    run(path, tmp_path / "b.safetensors")
    got = module.load_file(tmp_path / "b.safetensors")
    assert_same(
        qm.Merged(**{name: x.numpy() for name, x in got.items()}),
        qm.quickmerge(tokens.astype(np.float16), 3),
    )


def test_refused_before_any_work(tmp_path, tokens, fails, monkeypatch):
    """A wrong output is an error at once, not after hours of work."""
    source = save(tmp_path / "a.npz", tokens=tokens)
    before = source.read_bytes()
    monkeypatch.setattr(merge_file, "merge_chunk", None)  # work would raise TypeError
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to(source)
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    (tmp_path / "nowhere.npz").symlink_to(tmp_path / "nowhere" / "b.npz")
    os.link(source, tmp_path / "hard.npz")

    def refuses(output, words, *options):
        argv = ["compress", source, "--budget", 3, "-o", tmp_path / output]
        fails([*argv, *options], words)

    refuses("nowhere/out.npz", "does not exist")
    refuses("a.npz/out.npz", "does not exist")
    refuses("nowhere.npz", "nowhere does not exist")  # where the link leads
    refuses("loop.npz", "loop.npz: Too many levels of symbolic links")
    refuses("out.txt", "must end in .npz, .npy or .safetensors")
    refuses("out", "must end in .npz, .npy or .safetensors")
    refuses("out.npy", "its name must not end in .npy", "--format", "npz")
    refuses("folder.npz", "is a folder")
    refuses("a.npz", "is the input")
    refuses("link.npz", "is the input")  # a link to the input
    refuses("hard.npz", "is the input")
    refuses("a" * 300 + ".npz", "name too long")  # file systems allow 255 bytes
    assert source.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 6


def test_empty_names(tmp_path, tokens, fails):
    """Such as those of shell variables that are not set."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    fails(["compress", "", "-o", "b.npz", "--budget", 3], "name of the input is empty")
    fails(["compress", path, "-o", "", "--budget", 3], "name of the output is empty")


def test_a_name_of_255_bytes(tmp_path, tokens):
    path = save(tmp_path / "a.npy", tokens=tokens)
    output = tmp_path / f"{'é' * 125}a.npz"
    assert len(os.fsencode(output.name)) == 255
    assert run(path, output) == 0
    assert_same(qm.Merged.load(output), qm.quickmerge(tokens, 3))


def test_format_option(tmp_path, tokens):
    path = save(tmp_path / "a.npy", tokens=tokens)
    run(path, tmp_path / "a.npz")
    run(path, tmp_path / "noending", "--format", "npz")
    same = (tmp_path / "noending").read_bytes()
    assert same == (tmp_path / "a.npz").read_bytes()


def test_a_link_is_followed_and_a_mode_is_kept(tmp_path, tokens):
    path = save(tmp_path / "a.npy", tokens=tokens)
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "real.npz", tmp_path / "link.npz"
    # An old file that only its owner may read.
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    assert run(path, link) == 0
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert_same(qm.Merged.load(target), qm.quickmerge(tokens, 3))
    assert [*target.parent.iterdir()] == [target]


def test_what_an_error_leaves(tmp_path, tokens, monkeypatch, capsys):
    """The old file, and nothing else."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    output = tmp_path / "b.npz"
    for suffix in SUFFIXES:
        output = tmp_path / f"b{suffix}"
        output.write_bytes(b"old")
        # The error comes with the last sequence, when six results are written.
        tokens[6, 3, 1] = np.nan
        save(path, tokens=tokens)
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        for options in ((), ("--max-error", "0.5")):
            assert run(path, output, *options) == 2
            assert (
                "sequence 6: `tokens` must be finite, got nan at index (3, 1)"
                in capsys.readouterr().err
            )
            assert output.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1 + len(SUFFIXES)


def test_a_merged_file_is_merged_without_its_padding(tmp_path, tokens, capsys):
    """Where K differs between sequences, the groups of size 0 are padding."""
    source = tmp_path / "a.npz"
    merged = qm.quickmerge(tokens, np.array([5, 7, 4, 4, 6, 7, 3]))
    merged.save(source)
    capsys.readouterr()
    _, got = compress(source)
    assert "mask sizes: 36 tokens, 13 padding" in capsys.readouterr().out
    assert_same(got, qm.quickmerge(merged.tokens, 3, mask=merged.valid))


def test_json(tmp_path, tokens, capsys):
    mask = np.arange(12) < np.array([[12], [3], [5], [12], [4], [9], [12]])
    path = save(tmp_path / "a.npz", tokens=tokens, attention_mask=mask)
    output = tmp_path / "b.npy"
    assert run(path, output, "--json", "--weights", "saliency") == 0
    summary = json.loads(capsys.readouterr().out)
    seconds = summary.pop("seconds")
    # Seconds differ from run to run, so only their names are compared.
    assert set(seconds) == {"starting", "reading", "merging", "writing"}
    assert min(seconds.values()) >= 0
    assert summary == {
        "input": str(path),
        "output": str(output),
        "arrays": {"tokens": "tokens", "mask": "attention_mask"},
        "mask_by_default": True,
        "shape": [7, 12, 5],
        "merged_shape": [7, 3, 5],
        "dtype": "float32",
        "tokens": 57,
        "padding": 27,
        "merged_tokens": 21,
        "method": "average",
        "metric": "cosine",
        "weights": "saliency",
        "weighted_linkage": False,
        "device": "cpu",
        "input_bytes": path.stat().st_size,
        "output_bytes": output.stat().st_size,
    }
