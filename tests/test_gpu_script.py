"""`benchmarks/gpu.sh` on the stand-in for CuPy fails while a kernel is broken.

`make rehearse` runs all of it; here a few tests run, of kernels that are broken.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {"QM_CUPY_SIZES": "33", "QM_CUPY_DTYPES": "bfloat16"}


def gpu_sh(*arguments, **environment):
    """Run the script; return its exit status and what it printed."""
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *map(str, arguments)],
        env=os.environ | SMALL | environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def run_pytest(selection, tmp_path, **environment):
    """Run tests of a GPU as the script does; return the status, output and failures."""
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
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = re.findall(r"^ *(?:step|tests) (\S+) (\d+) ", text, re.M)
    seconds = {name: int(limit) for name, limit in limits}
    sanitizers = len(re.findall(r"^ *sanitize ", text, re.M))
    seconds["racecheck"] = (sanitizers - 1) * seconds['"$1"']
    after = list(seconds).index("kernels")
    measured = sum(list(seconds.values())[after:]) - seconds["racecheck"]
    tested = sum(seconds.values()) - measured - seconds["machine"]
    assert {"compile", "parity-basic", "gradients", "machine"} < set(seconds)
    assert max(tested, measured) + seconds["machine"] < 9 * 60


def test_without_a_gpu_it_fails_at_once(tmp_path):
    status, output = gpu_sh(tmp_path, "tests")
    assert status == 3
    assert "cupy" in output.lower()
    assert "machine: status 1" in (tmp_path / "summary.txt").read_text()


def test_a_wrong_result_is_found_and_kept(tmp_path):
    broken = {"QM_CUPY_REHEARSE_WRONG": "unmerge_tokens"}
    status, _ = gpu_sh("--rehearse", tmp_path, "tests", "unmerge_tokens", **broken)
    assert status == 1
    summary = (tmp_path / "summary.txt").read_text()
    steps = dict(re.findall(r"(\S+): status (\d+)", summary))
    # A graph repeats what the kernel does, so that streams find nothing wrong.
    assert [name for name, found in steps.items() if found == "1"] == [
        *("parity-optimized", "parity-basic", "memcheck", "racecheck")
    ]
    failures = (tmp_path / "failures.txt").read_text()
    assert "FAILED tests/test_gpu_parity.py::test_parity[" in failures
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        found = archive.extractfile("results/failures.txt").read().decode()
    assert found == failures
    assert {"summary.txt", *(f"{name}.txt" for name in steps)} <= names


CHOSEN = "test_parity and optimized and full and (merge_tokens or group_sizes)"


@pytest.mark.parametrize("fault", ["ILLEGAL", "HANG"])
def test_a_process_that_is_lost_is_named_and_replaced(fault, tmp_path):
    broken = {f"QM_CUPY_REHEARSE_{fault}": "group_sizes"}
    status, output, failures = run_pytest(CHOSEN, tmp_path, **broken)
    assert status == 1
    lost = "test_parity[optimized-bfloat16-group_sizes-33-full]"
    assert re.search(rf"FAILED tests/test_gpu_parity.py::{re.escape(lost)}", failures)
    assert ("POISONED" in failures) == (fault == "ILLEGAL")
    passed, failed = (int(re.search(rf"(\d+) {x}", output)[1]) for x in FOUND)
    assert (failed, passed) == (1, 4)  # merge, unmerge, and the gradients of both


FOUND = "passed", "failed"


def test_nothing_is_lost_where_no_kernel_is_broken(tmp_path):
    status, output, failures = run_pytest(CHOSEN, tmp_path)
    assert (status, failures) == (0, "")
    assert "5 passed" in output
