"""One failure in benchmarks/kernels.py costs one figure, not the run; needs no GPU."""

import itertools
import json
import time
import types

import numpy as np
import pytest
from benchmark_scripts import ILLEGAL, Array, failing, loaded, run_main
from seam import cuda

pytestmark = pytest.mark.rehearsal


@pytest.fixture(scope="module")
def scripts():
    with loaded() as modules:
        yield modules


class Event:
    """A CUDA event on the CPU: the time of `record`."""

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


def some_cupy():
    """Return a stand-in with the functions of CuPy that kernels.py needs on a CPU."""
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
    """kernels.py on NumPy arrays, with operations that a test adds."""

    def __init__(self, scripts, monkeypatch, path):
        self.scripts, self.monkeypatch, self.path = scripts, monkeypatch, path
        self.operations = []
        kernels, cupy = scripts.kernels, some_cupy()

        # The rates of this machine are not measured: rows only need some ceilings.
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
        """Add an operation whose right result is 2 x, for x of ones."""
        workload = self.scripts.workload

        def case():
            x = np.ones((2, 3), np.float32).view(Array)
            return workload.Case((x,), ours, doubled, in_cupy, (0,))

        made = workload.Operation(
            "B=1 N=3", title, make or case, lambda: workload.Work(8, flops), ()
        )
        self.operations.append(made)

    def run(self, *arguments):
        """Run the script, and return its exit status."""
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


def only(name, otherwise):
    """Return `doubled`, replaced by `otherwise` while the kernels `name` are in use.

    The reference passes plain NumPy arrays, and always gets the right result.
    """
    return lambda x: (
        otherwise(x)
        if isinstance(x, Array) and cuda.implementation() == name
        else doubled(x)
    )


def test_failure_of_cupy_leaves_the_others_and_the_json(kernels, capsys):
    # The message has two lines, and must be one line in the table.
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
    # The time of a wrong result would be misleading.
    assert row["ms"].keys() == {"basic", "CuPy"}
    assert row["error"] == {"basic": 0}


def test_inputs_that_cannot_be_made_cost_their_row(kernels):
    # Without inputs there is nothing to check, so this counts as a failure of ours.
    kernels.add("first", make=failing(MemoryError("too much")))
    kernels.add("second")
    assert kernels.run() == 1
    first, second = kernels.rows.values()
    assert first["errors"] == {"inputs": "MemoryError: too much"}
    assert second["ms"]


def test_interrupt_leaves_what_was_measured(kernels, capsys):
    kernels.add("first")
    kernels.add("second", in_cupy=failing(KeyboardInterrupt()))
    kernels.add("third")  # not reached
    assert kernels.run() == 130
    assert kernels.rows.keys() == {"first", "second"}
    assert kernels.rows["first"]["ms"]
    out, err = capsys.readouterr()
    assert "interrupted" in err
    assert "first" in out


def test_interrupted_row_keeps_the_times_it_has(kernels):
    count = itertools.count(1)

    def interrupts(x):
        if next(count) > 2:  # in the first round, after the warm-up and the planning
            raise KeyboardInterrupt

    kernels.add("first", in_cupy=interrupts)
    assert kernels.run() == 130
    assert kernels.rows["first"]["ms"].keys() == {"basic", "optimized"}


def test_rows_are_on_disk_before_the_next(kernels):
    # While the second row is made, the JSON has the times of the first. If the process
    # were killed here, the report would name the second as under way.
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
    # The message names the operation and the contender that broke the context.
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "lost the GPU" in x]
    assert "second, CuPy" in line


def test_new_process_measures_the_rest(kernels):
    done = []
    kernels.add("first", in_cupy=lambda x: done.append("first"))
    kernels.add("second", in_cupy=failing(RuntimeError(ILLEGAL)))
    kernels.add("third", in_cupy=lambda x: done.append("third"))
    assert kernels.run() == 4
    # The new process does not repeat the row that lost the GPU.
    done.clear()
    assert kernels.run("--resume") == 0
    assert kernels.rows.keys() == {"first", "second", "third"}
    assert set(done) == {"third"}
    assert ILLEGAL in kernels.rows["second"]["errors"]["CuPy"]


def test_gpu_that_cannot_be_waited_for_is_lost(kernels, scripts, monkeypatch):
    # The text of the error is unknown, but waiting for the GPU fails as well.
    monkeypatch.setattr(scripts.guard, "synchronize", failing(RuntimeError("unknown")))
    kernels.add("first", in_cupy=failing(RuntimeError("as if nothing were wrong")))
    kernels.add("second")
    assert kernels.run() == 4
    assert kernels.rows.keys() == {"first"}


def test_slow_contender_is_left_out_of_larger_sizes(kernels):
    # 20 ms at the small size; a thousand times the flops would take 20 s, over 10 s.
    kernels.add("small", in_cupy=lambda x: time.sleep(0.02), flops=1e12)
    kernels.add("large", in_cupy=lambda x: time.sleep(0.02), flops=1e15)
    assert kernels.run("--seconds", 10) == 0
    small, large = kernels.rows.values()
    assert "CuPy" in small["ms"]
    assert large["skipped"].keys() == {"CuPy"}
    assert large["ms"].keys() == {"basic", "optimized"}


def test_out_of_time_ends_in_order(kernels):
    # Too little time is not a failure.
    kernels.add("first")
    assert kernels.run("--minutes", 0) == 0
    assert kernels.rows == {}


class SomeTorch:
    """A torch whose `compile` fails from the second call on."""

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
    # All other times are known before the first compilation.
    assert {"optimized", "torch"} <= first["ms"].keys() & second["ms"].keys()
    if arguments:
        assert "compile" not in done
        return
    assert done.index("compile") > max(i for i, x in enumerate(done) if x == "second")
    assert first["ms"]["torch.compile"] > 0
    assert second["errors"] == {"torch.compile": "RuntimeError: no C compiler"}


def test_ceiling_that_cannot_be_measured_is_assumed(scripts, monkeypatch):
    kernels = scripts.kernels

    # Only the copy has a time, of 2 ms.
    def measure(runs, rounds, results):
        results |= {"ms": {"copy": 2.0}, "errors": {"product": "no cuBLAS"}}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "cupy", some_cupy())
    report = {}
    kernels.ceilings(report, tiny=True)
    # A tiny copy reads and writes 4096 bytes.
    assert report["ceilings"]["bytes"] == 2 * (1 << 12) / 2e-3
    assert report["ceilings"]["flops"] == kernels.ASSUMED["flops"]
    assert report["assumed"].keys() == {"flops", "exps", "launch_s", "product"}


# ------------------------------------------------------------- sizes and inputs


def test_small_sizes_come_first(scripts):
    # If time runs out or a large size fails, the small sizes are already measured.
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
    # Given attention is the only input whose size grows like N²; its layers are cut to
    # the memory.
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
    """Return workload.py with NumPy for CuPy, and torch on the CPU, in float32."""
    workload, torch = scripts.workload, pytest.importorskip("torch")
    for name, value in (
        ("cupy", np),
        ("torch", torch),
        ("dtype", lambda: "float32"),
        ("normal", lambda count: rng.standard_normal(count, np.float32)),
    ):
        monkeypatch.setattr(workload, name, value)
    return workload


def test_other_libraries_compute_the_same_as_ours(scripts, on_cpu):
    """They get one slice at a time, as in the timing.

    A comparison of times is only fair between equal results.
    """
    import torch

    checked = 0
    for operation in on_cpu.operations("rehearse"):
        case = operation.make(*operation.sizes)
        wanted = np.asarray(case.ours(*case.inputs))
        tensors = tuple(map(torch.from_numpy, case.inputs))
        for function, arrays in ((case.in_torch, tensors), (case.in_cupy, case.inputs)):
            if function is None:
                continue
            parts = []  # the results of the slices
            run = scripts.kernels.over(
                lambda *x, f=function, parts=parts: parts.append(np.asarray(f(*x))),
                [arrays],
                case.sliced,
            )
            run()
            got = np.reshape(parts, wanted.shape)
            if "Gumbel" not in operation.title:  # there, torch draws its own noise
                np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-4)
            checked += 1
    assert checked == 22  # 13 operations in torch, 9 of them in CuPy too
