"""`benchmarks/gpu.sh`, on the stand-in for CuPy, fails if a kernel is broken.

`make rehearse` runs the whole script. Here only a few of its tests run, with kernels
that are broken on purpose.
"""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.rehearsal

ROOT = Path(__file__).parents[1]
# One size and one dtype: the CPU interprets the kernels.
SMALL = {"QM_CUPY_SIZES": "33", "QM_CUPY_DTYPES": "bfloat16"}


def gpu_sh(*arguments, **environment):
    """Run the script, and return its exit status and its output."""
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *map(str, arguments)],
        env=os.environ | SMALL | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def run_pytest(selection, tmp_path, **environment):
    """Run GPU tests as the script does; return the status, output and failures."""
    # The first folder has the stand-in for CuPy.
    folders = ROOT / "tests" / "rehearsal", ROOT / "tests", ROOT
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    failures = tmp_path / "failures.txt"
    failures.touch()
    environment["QM_CUPY_FAILURES"] = str(failures)
    options = [
        *("-p", "gpu_run", "-p", "no:cacheprovider", "-q", "-W", "default"),
        *("-n", "2", "--max-worker-restart", "64", "-k", selection),
        *("--tb=short", "--timeout", "10", "--timeout-method", "thread"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_gpu_parity.py"],
        env=os.environ | SMALL | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, failures.read_text()


@pytest.mark.parametrize("arguments", [(), ("--rehearse",), ("out", "all"), "abcd"])
def test_wrong_arguments_start_nothing(arguments):
    status, output = gpu_sh(*arguments)
    assert status == 2
    assert output.startswith("usage: benchmarks/gpu.sh [--rehearse] OUTDIR")


def test_each_part_takes_less_than_nine_minutes():
    """Each step can take its limit, and five seconds more until it is killed."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    name = r"^ *(?:step|tests|sanitize) ([a-z-]+) (\d+) "
    limits = {step: int(limit) + 5 for step, limit in re.findall(name, text, re.M)}
    compilation = int(re.search(r'step "\$1" (\d+)', text)[1]) + 5
    parts = {
        "tests": "long parity-first parity-optimized streams basic memcheck racecheck",
        "benchmarks": "kernels kernels-resumed pipeline overhead gradients",
    }
    # A new step must be added to `parts`, or its time would not be counted.
    steps = [step for part in parts.values() for step in part.split()]
    assert set(limits) == {"machine", *steps}
    for part in parts.values():
        seconds = sum(limits[step] for step in part.split())
        assert limits["machine"] + compilation + seconds < 9 * 60


@pytest.fixture
def fake(tmp_path):
    """Return a function that writes an interpreter which runs a shell command instead.

    Only the step `machine`, which runs ``python -c``, always succeeds.
    """
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()

    def write(step):
        card = "[[ $1 == -c ]] && echo a card && exit"
        python.write_text(f"#!/bin/bash\n{card}\n{step}\n")
        python.chmod(0o755)
        return python

    return write


def test_it_runs_from_anywhere_and_a_silent_step_stops_nothing(fake, tmp_path):
    # A relative path to the script, to the interpreter, and to a folder with a space.
    fake("exit 7")
    script = os.path.relpath(ROOT / "benchmarks" / "gpu.sh", tmp_path)
    done = subprocess.run(
        [script, "--rehearse", "out put"],
        env=os.environ | {"PYTHON": "bin/python"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert lines[0].startswith("machine: status 0")
    assert lines[0].endswith("a card")
    assert len(lines) == 1 + 8 + 5  # machine, steps of tests, steps of benchmarks
    assert all("status 7" in x and x.endswith("no output") for x in lines[1:])
    names = {path.name for path in (tmp_path / "out put").iterdir()}
    assert names == {"summary.txt", "failures.txt", "results.tar.gz"}


def test_steps_take_all_cores(fake, tmp_path):
    """OMP_NUM_THREADS, which `nproc` obeys, must not limit the processes."""
    python = fake(f'echo "$@" >>{tmp_path}/commands')
    status, output = gpu_sh(
        "--rehearse", tmp_path / "out", "tests", PYTHON=str(python), OMP_NUM_THREADS="1"
    )
    assert status == 0, output
    commands = (tmp_path / "commands").read_text()
    cores = min(len(os.sched_getaffinity(0)), 16)
    assert re.findall(r"compile_kernels.py --processes (\d+)", commands) == [str(cores)]
    assert set(re.findall(r" -n (\d+) ", commands)) == {str(cores)}


def processes_of(session):
    """Return the commands of a session that are still running."""
    columns = ["ps", "-eo", "sess=,state=,args="]
    lines = subprocess.run(columns, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    # A zombie (Z) has ended already.
    return [x[2] for x in rows if x[0] == str(session) and x[1] != "Z"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_from_outside_leaves_no_process_and_an_archive(number, fake, tmp_path):
    python = fake(f"echo $$ >>{tmp_path}/started; echo begun; exec sleep 60")
    process = subprocess.Popen(
        [ROOT / "benchmarks" / "gpu.sh", "--rehearse", tmp_path / "out"],
        env=os.environ | {"PYTHON": str(python)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # A background job of a shell ignores SIGINT, and bash cannot trap a signal that
        # is ignored when it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # The first step has started when the fake interpreter has written its number.
    started = tmp_path / "started"
    while not started.exists() or not started.read_text():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    end = time.monotonic() + 5  # a process needs a moment to end
    while processes_of(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of(process.pid) == []
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        output = archive.extractfile("results/compile-tests.txt").read().decode()
    assert output == "begun\n"


def test_without_a_gpu_it_fails_at_once(tmp_path):
    # No --rehearse, so the interpreter has no stand-in for CuPy.
    status, output = gpu_sh(tmp_path, "tests")
    assert status == 3
    assert "cupy" in output.lower()
    assert "machine: status 1" in (tmp_path / "summary.txt").read_text()


@pytest.mark.slow("runs the script, kernels interpreted")
def test_a_wrong_result_is_found_and_kept(tmp_path):
    broken = {"QM_CUPY_REHEARSE_WRONG": "unmerge_tokens"}
    status, _ = gpu_sh("--rehearse", tmp_path, "tests", "unmerge_tokens", **broken)
    assert status == 1
    summary = (tmp_path / "summary.txt").read_text()
    steps = dict(re.findall(r"(\S+): status (\d+)", summary))
    # The step `streams` passes: a graph repeats the broken kernel, so both results that
    # it compares are wrong in the same way.
    assert [name for name, code in steps.items() if code == "1"] == [
        *("parity-first", "parity-optimized", "basic", "memcheck", "racecheck")
    ]
    failures = (tmp_path / "failures.txt").read_text()
    assert "FAILED tests/test_gpu_parity.py::test_parity[" in failures
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        archived = archive.extractfile("results/failures.txt").read().decode()
    assert archived == failures
    assert {"summary.txt", *(f"{name}.txt" for name in steps)} <= names


# Five tests: of merge, unmerge and group_sizes, and of the gradients of the first two.
SELECTION = "test_parity and optimized and full and (merge_tokens or group_sizes)"


@pytest.mark.slow("waits for a kernel that hangs")
@pytest.mark.parametrize("fault", ["ILLEGAL", "HANG"])
def test_a_process_that_is_lost_is_named_and_replaced(fault, tmp_path):
    broken = {f"QM_CUPY_REHEARSE_{fault}": "group_sizes"}
    status, output, failures = run_pytest(SELECTION, tmp_path, **broken)
    assert status == 1
    # The lost process takes one test with it; a new process runs the others.
    lost = "test_parity[optimized-bfloat16-group_sizes-33-full]"
    assert re.search(rf"FAILED tests/test_gpu_parity.py::{re.escape(lost)}", failures)
    assert ("POISONED" in failures) == (fault == "ILLEGAL")
    passed, failed = (int(re.search(rf"(\d+) {x}", output)[1]) for x in OUTCOMES)
    assert (failed, passed) == (1, 4)  # merge, unmerge, and the gradients of both


OUTCOMES = "passed", "failed"


@pytest.mark.slow("runs the script, kernels interpreted")
def test_nothing_is_lost_where_no_kernel_is_broken(tmp_path):
    status, output, failures = run_pytest(SELECTION, tmp_path)
    assert (status, failures) == (0, "")
    assert "5 passed" in output
