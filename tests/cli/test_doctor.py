"""The command `doctor`: its report about an installation."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from qm_cupy.cli import doctor
from qm_cupy.cli.main import main


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run `doctor` with some module as CuPy; None stands for "not installed"."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))

    def run(cupy):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        assert main(["doctor"]) == 0
        return capsys.readouterr().out

    return run


def test_without_cupy(tmp_path, report):
    text = report(None)
    for name in ("Python", "qm-cupy", "numpy", "scipy"):
        assert f"\n{name} " in f"\n{text}"
    assert np.__version__ in text  # the version of an installed package
    assert f"{tmp_path / 'cache'}, not created yet" in text
    assert "on a GPU use the CUDA kernels, all others use NumPy" in text
    assert text.isascii()  # so that every terminal can print it


def test_with_a_gpu(tmp_path, report):
    # A cache with one compiled kernel of 2 MB.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernel.cubin").write_bytes(bytes(2_000_000))
    device = {"name": b"NVIDIA H200", "totalGlobalMem": 139 * 2**30}
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda index: device | {"major": 9, "minor": 0},
        driverGetVersion=lambda: 13010,
        runtimeGetVersion=lambda: 12090,
    )
    text = report(types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    assert "NVIDIA H200, 139.0 GiB, sm 9.0" in text
    # CUDA's number 13010 is version 13.1.
    assert "CUDA 13.1 by the driver, 12.9 by the runtime" in text
    assert "1 files, 2.0 MB" in text


def test_cupy_that_fails(report):
    """CuPy is installed, but the driver is too old: one line has the reason."""

    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver:\n too old")

    runtime = types.SimpleNamespace(getDeviceCount=fail)
    text = report(types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    # The line break of the message is gone: one fact, one line.
    assert "RuntimeError: cudaErrorInsufficientDriver: too old" in text


def test_cupy_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    """CuPy for another version of CUDA: its own import fails."""
    (tmp_path / "cupy.py").write_text("import libcuda_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert main(["doctor"]) == 0
    assert "No module named 'libcuda_that_is_not_there'" in capsys.readouterr().out


def test_without_a_home_folder(report, monkeypatch):
    """A container may run as a user without a name and a home."""

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("CUPY_CACHE_DIR")
    assert "~/.cupy/kernel_cache, not created yet" in report(None)


def test_a_cache_that_cannot_be_read(tmp_path, report, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert f"{tmp_path / 'cache'}, not readable: Permission denied" in report(None)


def test_packages_of_the_command_line(report, monkeypatch):
    """They are for progress bars and shell completion."""
    versions = {"tqdm": "4.66.1"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    text = report(None)
    assert "\ntqdm              4.66.1\n" in text
    assert '\nshtab             not installed: pip install "shtab>=1.7"\n' in text


def test_a_reader_that_stops():
    """`qm-cupy doctor | head -1` prints one line, and no error."""
    command = [sys.executable, "-m", "qm_cupy", "doctor"]
    # Unbuffered, so that each line is a write of its own.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline().startswith(b"Python ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
