"""Inputs and outputs that are not regular files: pipes, devices, links, folders.

Each command runs in a process of its own, with a limit of time: a command that waits
for ever fails.
"""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from command_line import FORMATS, assert_same, save

import qm_cupy as qm

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes have names on POSIX")
OUTPUTS = "npz", "safetensors", "npy"


def run(*words, cwd, **options):
    # A command that hangs is stopped after 100 s, and the test fails.
    argv = [sys.executable, "-m", "qm_cupy", *map(str, words)]
    options = {"capture_output": True, "timeout": 100, "check": False, **options}
    return subprocess.run(argv, cwd=cwd, **options)


def error_of(done):
    """Return the only line of a command that failed."""
    # Standard output could be a pipe: it must not get anything.
    error = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b""), error
    assert error.startswith("qm-cupy: error: ")
    assert error.count("\n") == 1
    assert len(error) < 300
    return error


def result(path):
    """Return the `Merged` of a file, or the tokens of a .npy file."""
    return np.load(path) if path.suffix == ".npy" else qm.Merged.load(path)


def assert_merged(path, tokens):
    wanted = qm.quickmerge(tokens, 3)
    if path.suffix == ".npy":
        np.testing.assert_array_equal(np.load(path), wanted.tokens, strict=True)
    else:
        assert_same(qm.Merged.load(path), wanted)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_standard_input(tmp_path, tokens, name, source):
    """A pipe or a file: the first bytes say which format it has."""
    content = save(tmp_path / name, tokens=tokens).read_bytes()
    done = run(
        "compress", source, "--budget", 3, "-o", "out.npz", cwd=tmp_path, input=content
    )
    assert done.stderr == b""
    assert_merged(tmp_path / "out.npz", tokens)
    # `< file` in a shell: the standard input is a regular file.
    with (tmp_path / name).open("rb") as file:
        done = run(
            "compress", source, "--budget=3", "-oz.npy", cwd=tmp_path, stdin=file
        )
    assert done.stderr == b""
    assert_merged(tmp_path / "z.npy", tokens)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("ending", OUTPUTS)
def test_standard_output(tmp_path, tokens, ending):
    """The result goes through a pipe, and the summary to the standard error."""
    save(tmp_path / "a.npy", tokens=tokens)
    words = "compress", "a.npy", "--budget", 3, "-o", "-", "--format", ending
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0
    assert b"a.npy -> the standard output" in done.stderr
    path = tmp_path / f"copy.{ending}"
    path.write_bytes(done.stdout)
    assert_merged(path, tokens)
    # The same bytes as in a file, because all numbers and dates are the same.
    run("compress", "a.npy", "--budget", 3, "-o", f"file.{ending}", cwd=tmp_path)
    assert (tmp_path / f"file.{ending}").read_bytes() == done.stdout


@pytest.mark.parametrize("output", ["-", "/dev/stdout", "/dev/fd/1"])
def test_names_of_the_standard_output(tmp_path, tokens, output):
    """The summary must not be mixed with the result."""
    save(tmp_path / "a.npy", tokens=tokens)
    done = run("compress", "a.npy", "--budget", 3, "-o", output, cwd=tmp_path)
    assert done.returncode == 0
    assert b"bytes" in done.stderr
    (tmp_path / "copy.npz").write_bytes(done.stdout)
    assert_merged(tmp_path / "copy.npz", tokens)
    with (tmp_path / "file").open("wb") as file:
        done = run(
            "compress",
            "a.npy",
            "--budget=3",
            "-o",
            output,
            cwd=tmp_path,
            **{"stdout": file, "stderr": subprocess.PIPE, "capture_output": False},
        )
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == (tmp_path / "copy.npz").read_bytes()


def test_named_pipes(tmp_path, tokens):
    content = save(tmp_path / "deflated.npz", tokens=tokens).read_bytes()
    os.mkfifo(tmp_path / "in.npz")
    os.mkfifo(tmp_path / "out.npz")
    received = []
    threads = [
        threading.Thread(target=(tmp_path / "in.npz").write_bytes, args=(content,)),
        threading.Thread(
            target=lambda: received.append((tmp_path / "out.npz").read_bytes())
        ),
    ]
    # Both threads wait until the command opens the other end of their pipe.
    for thread in threads:
        thread.start()
    done = run("compress", "in.npz", "--budget", 3, "-o", "out.npz", cwd=tmp_path)
    for thread in threads:
        thread.join()
    assert (done.returncode, done.stderr) == (0, b"")
    (tmp_path / "copy.npz").write_bytes(received[0])
    assert_merged(tmp_path / "copy.npz", tokens)
    assert (tmp_path / "out.npz").is_fifo()  # not replaced by a file


def test_a_pipe_without_a_writer(tmp_path, tokens):
    """The command waits for it, and says so."""
    content = save(tmp_path / "a.npy", tokens=tokens).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    argv = [
        sys.executable,
        "-m",
        "qm_cupy",
        "compress",
        "pipe",
        "--budget=3",
        "-ob.npz",
    ]
    with subprocess.Popen(
        argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        line = process.stderr.readline()
        assert line == b"qm-cupy: waiting for a program that writes to pipe\n"
        (tmp_path / "pipe").write_bytes(content)
        _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, b"")
    assert_merged(tmp_path / "b.npz", tokens)


def test_a_pipe_without_a_reader(tmp_path, tokens):
    """The result could not be delivered, so the command fails."""
    save(tmp_path / "a.npy", tokens=np.tile(tokens, (100, 1, 10)))
    # A pipe whose reader has ended before the result comes.
    read, write = os.pipe()
    os.close(read)
    words = "compress", "a.npy", "--budget", "3", "-o", "-"
    argv = [sys.executable, "-m", "qm_cupy", *words]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=100,
        check=False,
    )
    os.close(write)
    assert done.returncode == 2
    assert b"standard output: Broken pipe (the result is lost)\n" in done.stderr


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/full"])
def test_devices(tmp_path, tokens, path):
    save(tmp_path / "a.npy", tokens=tokens)
    done = run("compress", path, "--budget", 3, "-o", "out.npz", cwd=tmp_path)
    assert f"{path} is a device or a terminal" in error_of(done)
    done = run("compress", "a.npy", "--budget", 3, "-o", path, cwd=tmp_path)
    assert f"the output {path} is a device" in error_of(done)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_the_terminal(tmp_path):
    """A file of arrays is neither typed nor shown."""
    # The two ends of a terminal: what a user sees, and what the command gets.
    master, slave = os.openpty()
    words = "compress", "-", "--budget", 3, "-o", "out.npz"
    done = run(*words, cwd=tmp_path, stdin=slave)
    assert "the standard input is a device or a terminal" in error_of(done)
    argv = [sys.executable, "-m", "qm_cupy", "compress", "a.npy", "--budget=3", "-o-"]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        stdout=slave,
        stderr=subprocess.PIPE,
        timeout=100,
        check=False,
    )
    os.close(slave)
    os.close(master)
    assert done.returncode == 2
    assert b"the standard output is closed, a device or a terminal" in done.stderr


def test_closed_streams(tmp_path, tokens):
    save(tmp_path / "a.npy", tokens=tokens)
    command = f"{sys.executable} -m qm_cupy compress"

    def shell(text):
        return subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, capture_output=True, check=False
        )

    done = shell(f"{command} - --budget 3 -o out.npz <&-")
    assert "the standard input is closed" in error_of(done)
    done = shell(f"{command} a.npy --budget 3 -o - >&-")
    assert done.returncode == 2
    assert b"the standard output is closed, a device" in done.stderr


def test_a_socket(tmp_path, tokens, fails, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
        server.bind("a.npy")
        fails(["compress", "a.npy", "--budget", 3, "-o", "b.npz"], "is a socket")
        save(tmp_path / "b.npy", tokens=tokens)
        fails(["compress", "b.npy", "--budget", 3, "-o", "a.npy"], "a device or a soc")


def limited(*words, cwd, **options):
    """Run a command whose files have at most 400 bytes, as on a full disk."""
    setting = "import resource, runpy, sys; limit = resource.RLIMIT_FSIZE, (400, 400); "
    setting += "resource.setrlimit(*limit); sys.argv[0] = 'qm-cupy'; "
    setting += "runpy.run_module('qm_cupy', run_name='__main__')"
    argv = [sys.executable, "-B", "-c", setting, *map(str, words)]
    options = {"capture_output": True, "timeout": 100, "check": False, **options}
    return subprocess.run(argv, cwd=cwd, **options)


def test_errors_name_a_full_disk(tmp_path, tokens):
    """That of the output, or that of the temporary file for a pipe."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    folder = tmp_path / "temporary"
    folder.mkdir()
    options = {"cwd": tmp_path, "env": {**os.environ, "TMPDIR": str(folder)}}
    argv = "--budget", 3, "-o"
    done = limited("compress", path, *argv, "b.npz", **options)
    assert "error: b.npz: File too large" in error_of(done)
    done = limited("compress", path, *argv, "-", **options)
    assert f"error: a temporary file in {folder}: File too large" in error_of(done)
    content = path.read_bytes()
    done = limited("compress", "-", *argv, "b.npz", input=content, **options)
    assert f"error: a temporary file in {tmp_path}: File too large" in error_of(done)
    done = limited("info", "-", input=content, **options)
    assert f"error: a temporary file in {folder}: File too large" in error_of(done)
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize("content", [b"", b"text", b"PK", b"\x93NUMPY", bytes(100)])
def test_other_content(tmp_path, content):
    done = run(
        "compress", "-", "--budget", 3, "-o", "out.npz", cwd=tmp_path, input=content
    )
    assert "the standard input" in error_of(done)
    assert not [*tmp_path.iterdir()]


def test_a_name_with_another_ending(tmp_path, tokens, fails):
    # The content decides if the ending is not one of the three.
    for name in FORMATS:
        path = save(tmp_path / name, tokens=tokens)
        other = path.rename(tmp_path / "states.bin")
        done = run("compress", other, "--budget", 3, "-o", "out.npz", cwd=tmp_path)
        assert done.stderr == b""
        assert_merged(tmp_path / "out.npz", tokens)
        for wrong in (".npy", ".npz", ".safetensors"):
            if wrong != path.suffix:
                renamed = other.with_suffix(wrong)
                renamed.write_bytes(other.read_bytes())
                fails(
                    ["compress", renamed, "--budget", 3, "-o", tmp_path / "o.npz"],
                    f"has the content of a {path.suffix} file: rename it",
                )


# The files of each format are read while they become shorter.
@pytest.mark.parametrize("name", FORMATS)
def test_an_input_that_becomes_shorter(tmp_path, name):
    """A file that is mapped into memory would end the process by SIGBUS."""
    rng = np.random.default_rng(0)
    path = save(tmp_path / name, tokens=rng.standard_normal((40, 30, 100)))
    # The file loses its second half while the first chunk is merged.
    code = f"""
import os, sys
from qm_cupy.cli.main import main
from qm_cupy.corpus import merge_file, plan
plan.CHUNK_BYTES = 100_000
merge = merge_file.merge_chunk
def merge_chunk(plan, arrays, start):
    os.truncate({str(path)!r}, {path.stat().st_size // 2})
    return merge(plan, arrays, start)
merge_file.merge_chunk = merge_chunk
sys.exit(main(["compress", {str(path)!r}, "--budget", "3", "-o", "out.npz"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False
    )
    assert f"{path} is damaged" in error_of(done)
    assert [*tmp_path.iterdir()] == [path]
