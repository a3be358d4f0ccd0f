"""One failure in a benchmark costs one figure and not the run; needs no GPU."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from benchmark_scripts import FOLDER, ILLEGAL, Array, failing, loaded, run_main

pytestmark = pytest.mark.rehearsal


@pytest.fixture(scope="module")
def scripts():
    with loaded() as modules:
        yield modules


# --------------------------------------------------------------------- guard.py


def test_memory_of_a_failed_call_can_be_given_back(scripts, monkeypatch):
    # The traceback of the error holds the frame of `fails`, and the frame holds `big`.
    # If `guarded` kept it, the next contender would not get its memory.
    held = []

    def fails():
        big = np.ones(3).view(Array)
        held.append(weakref.ref(big))
        raise MemoryError

    alive = []  # whether `big` still exists when the pools are freed
    monkeypatch.setattr(
        scripts.guard, "free_memory", lambda: alive.append(held[0]() is not None)
    )
    errors = {}
    with scripts.guard.guarded(errors, "a contender"):
        fails()
    assert errors == {"a contender": "MemoryError:"}
    assert alive == [False]


def test_sticky_errors(scripts):
    sticky = scripts.guard.sticky
    # Texts of the runtime, the driver and torch, all of which break the CUDA context.
    for text in (
        ILLEGAL,
        "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "cudaErrorMisalignedAddress: misaligned address",
    ):
        assert sticky(RuntimeError(text))
    # A library can raise an error of its own from the CUDA error.
    between = ValueError("of a library between")
    between.__cause__ = RuntimeError(ILLEGAL)
    assert sticky(between)
    # After these errors the GPU still works, so the run must go on.
    for text in (
        "cudaErrorLaunchOutOfResources: too many resources requested for launch",
        "cudaErrorInvalidValue: invalid argument",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ):
        assert not sticky(RuntimeError(text))


def test_time_limit(scripts):
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()

    # A loop in Python is interrupted long before its own end of 5 s.
    def busy():
        with scripts.guard.time_limit(0.05):
            while time.monotonic() < start + 5:
                pass

    with pytest.raises(TimeoutError):
        busy()
    assert time.monotonic() < start + 5
    # The old handler is back, and no timer is left that could fire later.
    assert signal.getsignal(signal.SIGALRM) == before
    with scripts.guard.time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


# A benchmark that measures one row and then waits for 60 s.
WAITING = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from guard import complete, leave
rows = []
def measure():
    rows.append("measured")
    print("ready", flush=True)
    time.sleep(60)
leave(complete(
    measure,
    lambda: Path("rows.json").write_text(json.dumps(rows)),
    lambda: print("shown"),
    lambda: False,
))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_a_process_that_was_started_to_ignore_them(tmp_path, number):
    # A shell starts a background job this way, and Python inherits the ignored signals.
    command = ["sh", "-c", 'trap "" INT TERM; exec "$@"', "sh", sys.executable]
    process = subprocess.Popen(
        [*command, "-c", WAITING, FOLDER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "ready\n"  # it measures now
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "shown\n"
    assert process.returncode == 130
    assert (tmp_path / "rows.json").read_text() == '["measured"]'


# ---------------------------------------------------- pipeline.py and the others


@pytest.fixture
def calls(scripts, monkeypatch, tmp_path):
    """Return a function that rehearses pipeline.py on the CPU with some contenders."""
    machine = scripts.machine
    monkeypatch.setattr(machine, "torch_or_none", lambda: None)
    monkeypatch.setattr(machine, "cupy_or_reason", lambda: (None, "no CuPy"))
    path = tmp_path / "pipeline.json"

    def run(contenders):
        monkeypatch.setattr(scripts.pipeline, "contenders", lambda machine: contenders)
        arguments = "--rehearse", "--json", path
        status = run_main(monkeypatch, scripts.pipeline, *arguments)
        (row,) = json.loads(path.read_text())["rows"]
        return status, row

    return run


def first_tokens(x, num_groups):
    """Return a result with the shape and range of merged tokens."""
    return x[:, :num_groups]


def test_pipeline_goes_on_without_a_rival(calls):
    status, row = calls(
        {"quickmerge": first_tokens, "a rival": failing(ImportError("no such module"))}
    )
    assert status == 0
    assert row["errors"] == {"a rival": "ImportError: no such module"}
    assert row["contenders"].keys() == {"quickmerge"}
    assert len(row["stages"]) == 4  # measured after the failure


@pytest.mark.parametrize(
    "ours",
    [failing(RuntimeError("a launch")), lambda x, k: x, lambda x, k: x[:, :k] + np.nan],
    ids=["raises", "wrong shape", "not finite"],
)
def test_pipeline_says_that_ours_failed(calls, ours):
    status, row = calls({"quickmerge": ours, "a rival": first_tokens})
    assert status == 1
    assert row["errors"].keys() == {"quickmerge"}
    assert row["contenders"].keys() == {"a rival"}


def test_pipeline_has_tokens_without_the_photograph(scripts, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # `import PIL` now fails
    whole_calls = scripts.whole_calls
    monkeypatch.setattr(whole_calls, "photograph", whole_calls.photograph.__wrapped__)
    tokens = whole_calls.patches(2, 32, 64)
    assert tokens.shape == (2, 32, 64)
    assert tokens.std() > 0.01  # tokens that are all equal would measure nothing


def test_wrong_gradients_are_the_exit_status(scripts, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    import gradient_cases
    import gradients

    # The plain form is sum(x²), whose gradient at x = 1 is 2; that of sum(x³) is 3.
    def case(ours):
        def make(inputs):
            x = torch.ones(3, requires_grad=True)
            return gradient_cases.Case((x,), ours, lambda x: (x * x).sum())

        return make

    cases = {
        "wrong": case(lambda x: (x**3).sum()),
        "fails": case(failing(RuntimeError("a launch"))),
        "inputs": failing(MemoryError("too much")),
        "right": case(lambda x: (x**2).sum()),
    }
    monkeypatch.setattr(gradients, "CASES", cases)
    path = tmp_path / "gradients.json"
    arguments = "--rehearse", "--no-compile", "--json", path
    assert run_main(monkeypatch, gradients, *arguments) == 1
    rows = {x["operation"]: x for x in json.loads(path.read_text())["rows"]}
    assert rows["wrong"]["wrong"].keys() == {"qm_cupy"}
    assert rows["fails"]["errors"] == {"qm_cupy": "RuntimeError: a launch"}
    assert rows["inputs"]["errors"] == {"inputs": "MemoryError: too much"}
    # Ours has no time if it is wrong or fails; torch is timed all the same.
    for title in ("wrong", "fails"):
        assert rows[title]["seconds"].keys() == {"torch", "torch, forward"}
    assert "qm_cupy" in rows["right"]["seconds"]
    # Without the three cases that fail, the status is 0.
    monkeypatch.setattr(gradients, "CASES", {"right": cases["right"]})
    assert run_main(monkeypatch, gradients, *arguments) == 0


def test_overhead_goes_on_without_a_library(scripts, monkeypatch, tmp_path):
    overhead = scripts.overhead
    numpy = overhead.Library(np.asarray, np.asarray, np.asarray)
    broken = numpy._replace(from_numpy=failing(RuntimeError("no device")))
    libraries = {"NumPy": numpy, "broken": broken}
    monkeypatch.setattr(overhead, "libraries", lambda errors: libraries)
    path = tmp_path / "overhead.json"
    arguments = "--rehearse", "--json", path
    assert run_main(monkeypatch, overhead, *arguments) == 0
    report = json.loads(path.read_text())
    assert report["errors"]["libraries"] == {"broken": "RuntimeError: no device"}
    assert report["microseconds"]["quickmerge"].keys() == {"NumPy"}
    assert len(report["microseconds"]["launchers"]) == 4  # one for each method


def test_resources_go_on_without_a_file(scripts):
    report = {"kernels": [], "errors": {}}
    saved = []
    job = "basic/no such file", "float32", 90
    scripts.resources.compile_all([job], report, lambda: saved.append(dict(report)))
    assert report["errors"].keys() == {"sm_90 float32 basic/no such file"}
    assert len(saved) == 1


@pytest.mark.slow("runs a benchmark")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pipeline.py", ("--seconds", "0.5", "--minutes", "1", "--plot", "x.png")),
        ("gradients.py", ("--minutes", "1", "--no-compile")),
        ("overhead.py", ()),
    ],
)
def test_rehearsals_without_an_install(script, arguments, tmp_path):
    if script == "gradients.py":
        pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, FOLDER / script, "--rehearse", "--json", "x.json", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # The scripts must find qm_cupy and tests/ by themselves.
        env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["machine"]
    assert not any(row["errors"] for row in report.get("rows", []))
    assert (tmp_path / "x.png").exists() == ("--plot" in arguments)


def test_no_script_imports_cupy_or_torch_unguarded():
    """A top-level import would end the run on a machine without that library."""
    optional = {"cupy", "torch", "jax", "sklearn", "matplotlib", "PIL", "ml_dtypes"}
    for name in ("kernels", "pipeline", "gradients", "overhead", "timing", "workload"):
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        imports = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
        imported = {x.module for x in imports if isinstance(x, ast.ImportFrom)}
        imported |= {
            a.name for x in imports if isinstance(x, ast.Import) for a in x.names
        }
        assert not optional & {str(x).split(".")[0] for x in imported}, name
