"""The command line as its tests run it: files, commands, and errors of one line."""

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.cli.main import main

FORMATS = ["raw.npy", "stored.npz", "deflated.npz", "flat.safetensors"]


def save(path, **arrays):
    """Write arrays in the way that the name of the file says."""
    if path.suffix == ".npy":
        np.save(path, arrays["tokens"])
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    else:
        (np.savez_compressed if path.stem == "deflated" else np.savez)(path, **arrays)
    return path


def compress(path, *options, budget="3"):
    """Run the command; return its exit code and what it wrote."""
    output = path.with_name("out.npz")
    code = main(
        ["compress", str(path), "--budget", budget, "-o", str(output), *options]
    )
    if code:
        return code, None
    with np.load(output, allow_pickle=False) as file:
        return code, qm.Merged(**file)


def assert_same(got, wanted):
    for name in qm.Merged._fields:
        x, y = getattr(got, name), getattr(wanted, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name, strict=True)


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((7, 12, 5)).astype(np.float32)


@pytest.fixture
def fails(capsys):
    """Check that a command fails in one line, which holds some words."""

    def check(argv, *words):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("qm-cupy: error: ")
        assert err.count("\n") == 1
        assert out == ""
        for word in words:
            assert str(word) in err, err

    return check


@pytest.fixture
def compress_fails(tmp_path, fails):
    """Check that `compress` fails in one line, and leaves nothing in the folder."""

    def check(path, *words, budget="3", options=()):
        argv = ["compress", path, "--budget", budget, *options]
        fails([*argv, "-o", tmp_path / "out.npz"], *words)

    yield check
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
