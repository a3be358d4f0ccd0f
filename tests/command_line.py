"""Helpers for tests of the command line: files, commands, and one-line errors."""

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.cli.main import main

# One file for each way to read: memory-mapped, stored, deflated, and safetensors.
FORMATS = ["raw.npy", "stored.npz", "deflated.npz", "flat.safetensors"]


def save(path, **arrays):
    """Write arrays in the format that the file's name stands for."""
    if path.suffix == ".npy":
        np.save(path, arrays["tokens"])
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    else:
        (np.savez_compressed if path.stem == "deflated" else np.savez)(path, **arrays)
    return path


def compress(path, *options, budget="3"):
    """Run the command; return its exit code and the result it wrote."""
    output = path.with_name("out.npz")
    code = main(
        ["compress", str(path), "--budget", budget, "-o", str(output), *options]
    )
    # A command that fails writes no file.
    if code:
        return code, None
    with np.load(output, allow_pickle=False) as file:
        return code, qm.Merged(**file)


def assert_same(got, wanted):
    for name in qm.Merged._fields:
        # A float32 result of a float16 input would have equal values, but another
        # dtype.
        x, y = getattr(got, name), getattr(wanted, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name, strict=True)


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((7, 12, 5)).astype(np.float32)  # (B, N, D)


@pytest.fixture
def fails(capsys):
    """Check that a command fails with one line that contains some words."""

    def check(argv, *words):
        capsys.readouterr()
        # The exit code of a wrong argument.
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("qm-cupy: error: ")
        # One short line: a traceback does not help a user of the command line.
        assert err.count("\n") == 1
        assert len(err) < 300, err
        assert out == ""
        for word in words:
            assert str(word) in err, err

    return check


@pytest.fixture
def compress_fails(tmp_path, fails):
    """Check that `compress` fails with one line, and leaves no file in the folder."""

    def check(path, *words, budget="3", options=()):
        argv = ["compress", path, "--budget", budget, *options]
        fails([*argv, "-o", tmp_path / "out.npz"], *words)

    yield check
    # Neither an output nor a temporary file.
    names = [p.name for p in tmp_path.iterdir()]
    assert not [x for x in names if "out" in x or x.startswith(".")]
