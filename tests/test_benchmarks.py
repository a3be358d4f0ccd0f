"""The benchmarks lose one cell to a failure, not the run; no GPU is needed."""

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest

from qm_cupy import _cuda

FOLDER = Path(__file__).parents[1] / "benchmarks"
ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks' modules, which are scripts beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = "guard", "kernels", "machine", "overhead", "pipeline", "report"
        names += "resources", "timing", "whole_calls", "workload"
        yield types.SimpleNamespace(**{name: __import__(name) for name in names})


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return module.main()


# ------------------------------------------------------------------- kernels.py


class Array(np.ndarray):
    """NumPy's array with what kernels.py asks of CuPy's."""

    def get(self):
        return np.asarray(self)


class Event:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


def some_cupy():
    device = types.SimpleNamespace(mem_info=(1 << 30, 1 << 31))
    cuda = types.SimpleNamespace(
        Event=Event,
        Device=lambda: device,
        get_elapsed_time=lambda start, stop: 1e3 * (stop.time - start.time),
    )
    return types.SimpleNamespace(cuda=cuda, copy=lambda x: x.copy())


def doubled(x):
    return 2 * x


class Kernels:
    """kernels.py over NumPy, with operations to choose."""

    def __init__(self, scripts, monkeypatch, path):
        self.scripts, self.monkeypatch, self.path = scripts, monkeypatch, path
        self.operations = []
        kernels, cupy = scripts.kernels, some_cupy()

        def ceilings(report, tiny):
            report["ceilings"] = kernels.ASSUMED

        for module, name, value in (
            (kernels, "cupy", cupy),
            (kernels, "torch", None),
            (kernels, "describe", dict),
            (kernels, "clocks", dict),
            (kernels, "dtype", lambda: "float32"),
            (kernels, "properties", dict),
            (kernels, "ceilings", ceilings),
            (kernels, "operations", lambda *_: iter(self.operations)),
            (scripts.timing, "cupy", cupy),
            (scripts.timing, "spinner", lambda: None),
        ):
            monkeypatch.setattr(module, name, value)

    def add(self, title, ours=doubled, in_cupy=doubled, make=None, flops=1.0):
        workload = self.scripts.workload

        def case():
            x = np.ones((2, 3), np.float32).view(Array)
            return workload.Case((x,), ours, doubled, in_cupy, (0,))

        made = workload.Operation(
            "B=1 N=3", title, make or case, lambda: workload.Work(8, flops), ()
        )
        self.operations.append(made)

    def run(self, *arguments):
        arguments = "--quick", "--json", self.path, *arguments
        return run_main(self.monkeypatch, self.scripts.kernels, *arguments)

    @property
    def report(self):
        return json.loads(self.path.read_text())

    @property
    def rows(self):
        return {row["title"]: row for row in self.report["rows"]}


@pytest.fixture
def kernels(scripts, monkeypatch, tmp_path):
    return Kernels(scripts, monkeypatch, tmp_path / "kernels.json")


def failing(error):
    def run(*_):
        raise error

    return run


def only(name, otherwise):
    """Return ours, but another function where these kernels are in use."""
    return lambda x: (
        otherwise(x)
        if isinstance(x, Array) and _cuda.implementation() == name
        else doubled(x)
    )


def test_rivals_failure_leaves_the_others_and_the_json(kernels, capsys):
    kernels.add("first", in_cupy=failing(MemoryError("none left\nat all")))
    kernels.add("second")
    assert kernels.run() == 0
    first, second = kernels.rows.values()
    assert first["ms"].keys() == {"basic", "optimized"}
    assert first["errors"] == {"CuPy": "MemoryError: none left at all"}
    assert second["ms"].keys() == {"basic", "optimized", "CuPy"}
    assert "CuPy: MemoryError: none left at all" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["basic", "optimized"])
def test_failure_of_ours_is_the_exit_status(kernels, name):
    kernels.add("first", ours=only(name, failing(RuntimeError("a launch"))))
    kernels.add("second")
    assert kernels.run() == 1
    first, second = kernels.rows.values()
    assert first["errors"] == {name: "RuntimeError: a launch"}
    assert first["ms"].keys() == {"basic", "optimized", "CuPy"} - {name}
    assert not second["errors"]


def test_wrong_result_of_ours_is_the_exit_status_and_has_no_time(kernels):
    kernels.add("first", ours=only("optimized", lambda x: 3 * x))
    assert kernels.run() == 1
    row = kernels.rows["first"]
    assert row["wrong"].keys() == {"optimized"}
    assert row["ms"].keys() == {"basic", "CuPy"}
    assert row["error"] == {"basic": 0}


def test_inputs_that_cannot_be_made_cost_their_row(kernels):
    kernels.add("first", make=failing(MemoryError("too much")))
    kernels.add("second")
    assert kernels.run() == 1
    first, second = kernels.rows.values()
    assert first["errors"] == {"inputs": "MemoryError: too much"}
    assert second["ms"]


def test_interrupt_leaves_what_was_measured(kernels, capsys):
    kernels.add("first")
    kernels.add("second", in_cupy=failing(KeyboardInterrupt()))
    kernels.add("third")
    assert kernels.run() == 130
    assert kernels.rows.keys() == {"first", "second"}
    assert kernels.rows["first"]["ms"]
    out, err = capsys.readouterr()
    assert "interrupted" in err
    assert "first" in out


def test_interrupted_row_keeps_the_times_it_has(kernels):
    count = itertools.count(1)

    def interrupts(x):
        if next(count) > 2:  # in the first round; two calls come before
            raise KeyboardInterrupt

    kernels.add("first", in_cupy=interrupts)
    assert kernels.run() == 130
    assert kernels.rows["first"]["ms"].keys() == {"basic", "optimized"}


def test_rows_are_on_disk_before_the_next(kernels):
    seen = []

    def make():
        seen.append((kernels.rows["first"]["ms"].keys(), kernels.report["under way"]))
        raise ValueError

    kernels.add("first")
    kernels.add("second", make=make)
    kernels.run()
    assert seen == [({"basic", "optimized", "CuPy"}, "second")]


def test_lost_gpu_stops_the_run_and_names_the_operation(kernels, capsys):
    kernels.add("first")
    kernels.add("second", in_cupy=failing(RuntimeError(ILLEGAL)))
    kernels.add("third")
    assert kernels.run() == 4
    assert kernels.rows.keys() == {"first", "second"}
    assert kernels.rows["first"]["ms"]
    assert ILLEGAL in kernels.rows["second"]["errors"]["CuPy"]
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "lost the GPU" in x]
    assert "second, CuPy" in line


def test_new_process_measures_the_rest(kernels):
    done = []
    kernels.add("first", in_cupy=lambda x: done.append("first"))
    kernels.add("second", in_cupy=failing(RuntimeError(ILLEGAL)))
    kernels.add("third", in_cupy=lambda x: done.append("third"))
    assert kernels.run() == 4
    done.clear()
    assert kernels.run("--resume") == 0
    assert kernels.rows.keys() == {"first", "second", "third"}
    assert set(done) == {"third"}
    assert ILLEGAL in kernels.rows["second"]["errors"]["CuPy"]


def test_gpu_that_cannot_be_waited_for_is_lost(kernels, scripts, monkeypatch):
    monkeypatch.setattr(scripts.guard, "synchronize", failing(RuntimeError("unknown")))
    kernels.add("first", in_cupy=failing(RuntimeError("as if nothing were wrong")))
    kernels.add("second")
    assert kernels.run() == 4
    assert kernels.rows.keys() == {"first"}


def test_slow_contender_is_left_out_of_larger_sizes(kernels):
    kernels.add("small", in_cupy=lambda x: time.sleep(0.02), flops=1e12)
    kernels.add("large", in_cupy=lambda x: time.sleep(0.02), flops=1e15)
    assert kernels.run("--seconds", 10) == 0
    small, large = kernels.rows.values()
    assert "CuPy" in small["ms"]
    assert large["skipped"].keys() == {"CuPy"}
    assert large["ms"].keys() == {"basic", "optimized"}


def test_out_of_time_ends_in_order(kernels):
    kernels.add("first")
    assert kernels.run("--minutes", 0) == 0
    assert kernels.rows == {}


class SomeTorch:
    """torch, of which compiling fails from the second call on."""

    def __init__(self, done):
        self.compiler = types.SimpleNamespace(reset=lambda: None)
        self.done = done

    def compile(self, function):
        self.done.append("compile")
        if self.done.count("compile") > 1:
            raise RuntimeError("no C compiler")
        return function


@pytest.mark.parametrize("arguments", [(), ("--no-compile",)])
def test_compilation_comes_last_and_may_fail(kernels, scripts, monkeypatch, arguments):
    done = []
    monkeypatch.setattr(scripts.kernels, "torch", SomeTorch(done))
    monkeypatch.setattr(scripts.kernels, "as_torch", lambda x: x)
    for title in ("first", "second"):
        kernels.add(title, in_cupy=lambda x, title=title: done.append(title))
    assert kernels.run(*arguments) == 0
    first, second = kernels.rows.values()
    assert {"optimized", "torch"} <= first["ms"].keys() & second["ms"].keys()
    if arguments:
        assert "compile" not in done
        return
    assert done.index("compile") > max(i for i, x in enumerate(done) if x == "second")
    assert first["ms"]["torch.compile"] > 0
    assert second["errors"] == {"torch.compile": "RuntimeError: no C compiler"}


def test_ceiling_that_cannot_be_measured_is_assumed(scripts, monkeypatch):
    kernels = scripts.kernels

    def measure(runs, rounds, found):
        found |= {"ms": {"copy": 2.0}, "errors": {"product": "no cuBLAS"}}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "cupy", some_cupy())
    report = {}
    kernels.ceilings(report, tiny=True)
    assert report["ceilings"]["bytes"] == 2 * (1 << 12) / 2e-3
    assert report["ceilings"]["flops"] == kernels.ASSUMED["flops"]
    assert report["assumed"].keys() == {"flops", "exps", "launch_s", "product"}


# ------------------------------------------------------------- sizes and inputs


def test_small_sizes_come_first(scripts):
    for which in ("all", "quick"):
        sizes = [b * n**2 for b, _, n, _, _ in scripts.workload.SIZES[which]]
        assert sizes == sorted(sizes)
        assert len(sizes) > 1
    for quick in (False, True):
        options = types.SimpleNamespace(rehearse=False, quick=quick)
        sizes = [b * n**2 for b, n in scripts.pipeline.sizes_of(options)]
        assert sizes == sorted(sizes)
        assert len(sizes) > 2


def test_inputs_stay_within_their_memory(scripts):
    kept = {
        work.bytes
        for x in scripts.workload.operations("all", 12e9)
        if x.title.endswith("given A") and (work := x.count(*x.sizes))
    }
    assert max(kept) <= 12e9
    for x in scripts.workload.operations("all", 12e9):
        assert x.count(*x.sizes).bytes <= 12e9


@pytest.fixture
def on_cpu(scripts, monkeypatch, rng):
    """workload.py over NumPy and torch on the CPU, in float32."""
    workload, torch = scripts.workload, pytest.importorskip("torch")
    for name, value in (
        ("cupy", np),
        ("torch", torch),
        ("dtype", lambda: "float32"),
        ("normal", lambda count: rng.standard_normal(count, np.float32)),
    ):
        monkeypatch.setattr(workload, name, value)
    return workload


def test_rivals_compute_what_ours_does(scripts, on_cpu):
    """A slice at a time, as they are timed."""
    import torch

    checked = 0
    for operation in on_cpu.operations("rehearse"):
        case = operation.make(*operation.sizes)
        wanted = np.asarray(case.ours(*case.inputs))
        tensors = tuple(map(torch.from_numpy, case.inputs))
        for function, arrays in ((case.in_torch, tensors), (case.in_cupy, case.inputs)):
            if function is None:
                continue
            parts = []
            run = scripts.kernels.over(
                lambda *x, f=function, parts=parts: parts.append(np.asarray(f(*x))),
                [arrays],
                case.sliced,
            )
            run()
            got = np.reshape(parts, wanted.shape)
            if "Gumbel" not in operation.title:  # whose noise is torch's own
                np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-4)
            checked += 1
    assert checked == 18


# --------------------------------------------------------------------- guard.py


def test_memory_of_a_failed_call_can_be_given_back(scripts, monkeypatch):
    held = []

    def fails():
        big = np.ones(3).view(Array)
        held.append(weakref.ref(big))
        raise MemoryError

    alive = []
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
    for text in (
        ILLEGAL,
        "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "cudaErrorMisalignedAddress: misaligned address",
    ):
        assert sticky(RuntimeError(text))
    between = ValueError("of a library between")
    between.__cause__ = RuntimeError(ILLEGAL)
    assert sticky(between)
    for text in (
        "cudaErrorLaunchOutOfResources: too many resources requested for launch",
        "cudaErrorInvalidValue: invalid argument",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ):
        assert not sticky(RuntimeError(text))


def test_time_limit(scripts):
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()

    def busy():
        with scripts.guard.time_limit(0.05):
            while time.monotonic() < start + 5:
                pass

    with pytest.raises(TimeoutError):
        busy()
    assert time.monotonic() < start + 5
    assert signal.getsignal(signal.SIGALRM) == before
    with scripts.guard.time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


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
    command = ["sh", "-c", 'trap "" INT TERM; exec "$@"', "sh", sys.executable]
    process = subprocess.Popen(
        [*command, "-c", WAITING, FOLDER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "shown\n"
    assert process.returncode == 130
    assert (tmp_path / "rows.json").read_text() == '["measured"]'


# ---------------------------------------------------- pipeline.py and the others


@pytest.fixture
def calls(scripts, monkeypatch, tmp_path):
    """Runs a rehearsal of pipeline.py on the CPU with these contenders."""
    machine = scripts.machine
    monkeypatch.setattr(machine, "torch_or_none", lambda: None)
    monkeypatch.setattr(machine, "cupy_or_reason", lambda: (None, "no CuPy"))
    path = tmp_path / "pipeline.json"

    def run(found):
        monkeypatch.setattr(scripts.pipeline, "contenders", lambda machine: found)
        arguments = "--rehearse", "--json", path
        status = run_main(monkeypatch, scripts.pipeline, *arguments)
        (row,) = json.loads(path.read_text())["rows"]
        return status, row

    return run


def first_tokens(x, num_groups):
    return x[:, :num_groups]


def test_pipeline_goes_on_without_a_rival(calls):
    status, row = calls(
        {"quickmerge": first_tokens, "a rival": failing(ImportError("no such module"))}
    )
    assert status == 0
    assert row["errors"] == {"a rival": "ImportError: no such module"}
    assert row["contenders"].keys() == {"quickmerge"}
    assert len(row["stages"]) == 4


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
    monkeypatch.setitem(sys.modules, "PIL", None)
    whole_calls = scripts.whole_calls
    monkeypatch.setattr(whole_calls, "photograph", whole_calls.photograph.__wrapped__)
    tokens = whole_calls.patches(2, 32, 64)
    assert tokens.shape == (2, 32, 64)
    assert tokens.std() > 0.01


def test_wrong_gradients_are_the_exit_status(scripts, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    import gradient_cases
    import gradients

    def case(ours):
        def make(given):
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
    for title in ("wrong", "fails"):
        assert rows[title]["seconds"].keys() == {"torch", "torch, forward"}
    assert "qm_cupy" in rows["right"]["seconds"]
    monkeypatch.setattr(gradients, "CASES", {"right": cases["right"]})
    assert run_main(monkeypatch, gradients, *arguments) == 0


def test_overhead_goes_on_without_a_library(scripts, monkeypatch, tmp_path):
    overhead = scripts.overhead
    numpy = overhead.Library(np.asarray, np.asarray, np.asarray)
    broken = numpy._replace(give=failing(RuntimeError("no device")))
    found = {"NumPy": numpy, "broken": broken}
    monkeypatch.setattr(overhead, "libraries", lambda errors: found)
    path = tmp_path / "overhead.json"
    arguments = "--rehearse", "--json", path
    assert run_main(monkeypatch, overhead, *arguments) == 0
    report = json.loads(path.read_text())
    assert report["errors"]["libraries"] == {"broken": "RuntimeError: no device"}
    assert report["microseconds"]["quickmerge"].keys() == {"NumPy"}
    assert len(report["microseconds"]["launchers"]) == 4


def test_resources_go_on_without_a_file(scripts):
    report = {"kernels": [], "errors": {}}
    saved = []
    job = "basic/no such file", "float32", 90
    scripts.resources.compile_all([job], report, lambda: saved.append(dict(report)))
    assert report["errors"].keys() == {"sm_90 float32 basic/no such file"}
    assert len(saved) == 1


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
        env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["machine"]
    assert not any(row["errors"] for row in report.get("rows", []))
    assert (tmp_path / "x.png").exists() == ("--plot" in arguments)


def test_no_script_imports_cupy_or_torch_unguarded():
    """An import at the top would end a run on a machine that lacks the library."""
    rare = {"cupy", "torch", "jax", "sklearn", "matplotlib", "PIL", "ml_dtypes"}
    for name in ("kernels", "pipeline", "gradients", "overhead", "timing", "workload"):
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        tops = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
        found = {x.module for x in tops if isinstance(x, ast.ImportFrom)}
        found |= {a.name for x in tops if isinstance(x, ast.Import) for a in x.names}
        assert not rare & {str(x).split(".")[0] for x in found}, name
