"""Each kernel against its floor, and against what torch and CuPy users have today.

    python benchmarks/kernels.py [--quick | --rehearse] [--json PATH] [--plot PATH]
                                 [--minutes M] [--seconds S] [--no-compile] [--resume]

Needs a GPU and CuPy; takes torch if it is there. The ceilings (copy, matrix product,
exp, launch) are measured in the same run. Times are the GPU's, medians, contenders in
turn: calls are queued behind a kernel that spins, so Python's own time does not show.

Small sizes come first, and the JSON is written after every row. A contender that fails
is an entry of its row. torch.compile comes last, with the largest size first. Exit
status: 1 if one of our kernels failed or was wrong; 3 without a GPU; 4 if the process
lost the GPU; 130 if interrupted. After a 4, `--resume` measures in a new process what
is not in the JSON yet.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the seam

from guard import (
    complete,
    free_memory,
    guarded,
    leave,
    one_line,
    say,
    synchronize,
    time_limit,
)
from machine import clocks, cupy_or_reason, describe, properties
from report import write_json
from roofline import ASSUMED, floor_of
from roofline import draw as draw_roofline
from seam import cuda
from timing import measure, raw
from workload import Case, Operation, as_torch, cupy, draw, dtype, operations, torch

import qm_cupy as qm

OURS = "basic", "optimized"
COLUMNS = (*OURS, "torch", "torch.compile", "CuPy")
COMPILE_SECONDS = 60.0  # for one torch.compile and its timing
CHECK_SECONDS = 60.0  # 1.5 s for 4096 tokens of width 1024 on two cores
MAX_ATTENTION_BYTES = 12e9  # of given attention, at most

Report = dict[str, Any]


# -------------------------------------------------------------------- ceilings


def ceilings(report: Report, tiny: bool) -> None:
    """Measure what this GPU can do, each per second, and the time of a launch.

    What cannot be measured is assumed, and `report` says so.
    """
    size = min(1 << 30, cupy.cuda.Device().mem_info[0] // 8)
    size, n, blocks = (1 << 12, 64, 1) if tiny else (size, 8192, 1 << 13)
    found: Report = {"title": "ceilings"}

    @functools.cache
    def buffers() -> Any:
        return cupy.zeros(size, np.uint8), cupy.empty(size, np.uint8)

    @functools.cache
    def factor() -> Any:
        return as_torch(draw(n, n)) if torch else draw(n, n).astype(np.float16)

    @functools.cache
    def out() -> Any:
        return cupy.empty(8, np.float32)

    runs = {
        "copy": lambda: cupy.copyto(buffers()[1], buffers()[0]),
        "product": lambda: factor() @ factor(),
        "exp": lambda: raw("exponentials")((blocks,), (256,), (out(),)),
        "launch": lambda: raw("spin")((1,), (1,), (np.int64(0),)),
    }
    measure(runs, 1 if tiny else 11, found)
    seconds = {name: ms / 1e3 for name, ms in found["ms"].items() if ms > 0}
    rates = {
        "bytes": ("copy", 2 * size),  # read and written
        "flops": ("product", 2 * n**3),
        "exps": ("exp", blocks * 256 * 8 * 4096),
    }
    measured = {
        rate: amount / seconds[name]
        for rate, (name, amount) in rates.items()
        if name in seconds
    }
    if "launch" in seconds:
        measured["launch_s"] = seconds["launch"]
    report["ceilings"] = {**ASSUMED, **measured}
    report["assumed"] = {x: "not measured" for x in ASSUMED.keys() - measured.keys()}
    report["assumed"] |= found["errors"]


# ------------------------------------------------------------------ correctness


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Fill outputs with NaN first: what a kernel leaves out shows."""
    fresh = cuda.empty

    def empty(shape: Any, dtype: Any) -> Any:
        x = fresh(shape, dtype)
        if x.size:
            x.reshape(-1).view(np.uint8).fill(0xFF)
        return x

    cuda.empty = empty
    try:
        yield
    finally:
        cuda.empty = fresh


def reference(case: Case) -> Any:
    """Return the sample's result in float64, by the NumPy reference."""
    arrays = [x[case.sample].get() for x in case.inputs]
    arrays = [x if x.dtype.kind == "i" else x.astype(np.float64) for x in arrays]
    with time_limit(CHECK_SECONDS):
        return case.ours(*arrays)


def check(case: Case, wanted: Any) -> float:
    """Return the largest error of a sequence against the reference in float64."""
    with nan_outputs():
        got = case.ours(*case.inputs)[case.sample].get().astype(np.float64)
    # The merged tokens have 8 bits in bfloat16; all else is summed in float32.
    np.testing.assert_allclose(got, wanted, rtol=8e-3, atol=1e-3)
    return float(np.abs(got - wanted).max())


def check_ours(case: Case, names: list[str], row: Report) -> None:
    """Add to `row` the error of each of our kernels, and those that are wrong."""
    with guarded(row["errors"], "reference", row["title"]):
        wanted = reference(case)
    if "reference" in row["errors"]:
        return
    for name in names:
        with guarded(row["errors"], name, row["title"]):
            try:
                with qm.use_kernels(name):
                    row["error"][name] = check(case, wanted)
                synchronize()
            except AssertionError as error:
                row["wrong"][name] = " ".join(str(error).split())[:200]


# ------------------------------------------------------------------- contenders


def input_sets(case: Case) -> list[tuple[Any, ...]]:
    """Return copies of the inputs, so that together they leave the L2 cache."""
    size = sum(x.nbytes for x in case.inputs)
    cache = properties().get("l2CacheSize", 0)
    copies = min(math.ceil(3 * cache / size), 256) if size < 3 * cache else 1
    copied = (tuple(map(cupy.copy, case.inputs)) for _ in range(copies - 1))
    return [case.inputs, *copied]


def over(function: Callable[..., Any], sets: list[Any], axes: int) -> Any:
    """Return a call on one input set after another, a slice of `axes` at a time."""
    turn = itertools.cycle(sets)
    if not axes:
        return lambda: function(*next(turn))

    def run() -> None:  # without results: those of all slices fit no memory
        arrays = next(turn)
        for place in np.ndindex(arrays[0].shape[:axes]):
            function(*(x[place] for x in arrays))

    return run


def ours_over(name: Any, case: Case, sets: list[Any]) -> Callable[[], Any]:
    turn = itertools.cycle(sets)

    def run() -> Any:
        with qm.use_kernels(name):
            return case.ours(*next(turn))

    return run


def contenders(case: Case, errors: dict[str, str], title: str) -> Report:
    """Return everyone's call without arguments, torch.compile's apart."""
    sets = input_sets(case)
    runs: Report = {name: ours_over(name, case, sets) for name in OURS}
    if torch:
        with guarded(errors, "torch", title):
            tensors = [tuple(map(as_torch, arrays)) for arrays in sets]
            runs["torch"] = over(case.in_torch, tensors, case.sliced)
            for name, function in case.others.items():
                runs[name] = over(function, tensors, case.sliced)
    if case.in_cupy:
        runs["CuPy"] = over(case.in_cupy, sets, case.sliced)
    return runs


class Patience:
    """Contenders that a row leaves out, judged by smaller sizes of the operation."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last: dict[tuple[str, str], tuple[float, float]] = {}

    def too_slow(self, kind: str, name: str, floor_ms: float) -> str:
        """Return why a contender is left out, or nothing."""
        before, ms = self.last.get((kind, name), (1.0, 0.0))
        seconds = ms / 1e3 * max(floor_ms / before, 1)
        return f"left out, about {seconds:.1f} s" if seconds > self.seconds else ""

    def learn(self, kind: str, row: Report) -> None:
        for name, ms in row["ms"].items():
            self.last[kind, name] = max(row["cost"], 1e-9), ms


def measure_row(
    operation: Operation, row: Report, rounds: int, patience: Patience
) -> None:
    """Check and time one operation; what fails is in the row."""
    kind = operation.make.__name__
    with guarded(row["errors"], "inputs", row["title"]):
        case = operation.make(*operation.sizes)
        synchronize()
    if "inputs" in row["errors"]:
        return
    late = {name: patience.too_slow(kind, name, row["cost"]) for name in COLUMNS}
    row["skipped"] = {name: why for name, why in late.items() if why}
    check_ours(case, [x for x in OURS if x not in row["skipped"]], row)
    runs: Report = {}
    with guarded(row["errors"], "inputs", row["title"]):
        runs = contenders(case, row["errors"], row["title"])
    out = row["skipped"].keys() | row["wrong"].keys() | row["errors"].keys()
    measure({x: run for x, run in runs.items() if x not in out}, rounds, row)
    patience.learn(kind, row)


def measure_compiled(
    operation: Operation, row: Report, rounds: int, seconds: float
) -> None:
    """Add torch.compile's time to a row, or its error."""
    name = "torch.compile"
    with guarded(row["errors"], name, row["title"]), time_limit(seconds):
        torch.compiler.reset()  # which else gives up after so many recompilations
        case = operation.make(*operation.sizes)
        sets = [tuple(map(as_torch, arrays)) for arrays in input_sets(case)]
        run = over(torch.compile(case.in_torch), sets, case.sliced)
        measure({name: run}, rounds, row)


# -------------------------------------------------------------------- the report


def new_row(operation: Operation, peak: dict[str, float]) -> Report:
    _, title, _, count, sizes = operation
    row = floor_of(title, count(*sizes), peak)
    cost = sum(row["work"][x] / peak[x] for x in row["work"])  # for `Patience`
    empty: Report = {x: {} for x in ("ms", "python_ms", "error", "wrong", "errors")}
    return {"size": operation.size, **row, "cost": cost, "skipped": {}, **empty}


def measure_all(report: Report, options: Any, save: Callable[[], None]) -> None:
    """Fill the report, row by row, and save it after each."""
    end = time.monotonic() + 60 * options.minutes
    rounds = 2 if options.rehearse else 5 if options.quick else 15
    report["machine"] = {**describe(), "dtype": dtype()}
    say(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    say("ceilings")
    ceilings(report, options.rehearse)
    save()
    which = "rehearse" if options.rehearse else "quick" if options.quick else "all"
    free = cupy.cuda.Device().mem_info[0]
    todo = list(operations(which, min(free / 4, MAX_ATTENTION_BYTES)))
    patience = Patience(options.seconds)
    there = {row["title"] for row in report["rows"]}
    for number, operation in enumerate(todo, 1):
        if time.monotonic() > end:
            say(f"out of time: {len(todo) - number + 1} left out")
            break
        if operation.title in there:
            continue
        say(f"[{number}/{len(todo)}] {operation.title}")
        free_memory()
        row = new_row(operation, report["ceilings"])
        report["rows"].append(row)
        report["under way"] = operation.title
        save()  # a process that is killed leaves the name of what it was doing
        measure_row(operation, row, rounds, patience)
        save()
    report["under way"] = ""
    report["clocks after"] = clocks()
    save()
    if torch and not options.no_compile:
        measure_all_compiled(todo, report, rounds, end, save)


def measure_all_compiled(
    todo: list[Operation], report: Report, rounds: int, end: float, save: Any
) -> None:
    rows = {row["title"]: row for row in report["rows"]}
    sizes = list(dict.fromkeys(operation.size for operation in todo))
    # Large sizes first: there it matters.
    for operation in sorted(todo, key=lambda operation: -sizes.index(operation.size)):
        row = rows.get(operation.title)
        if row is None or "torch.compile" in row["ms"].keys() | row["errors"].keys():
            continue
        left = end - time.monotonic()
        if left <= 0:
            say("out of time: the rest of torch.compile left out")
            return
        say(f"torch.compile: {operation.title}")
        free_memory()
        if "inputs" not in row["errors"]:
            seconds = min(COMPILE_SECONDS, left)
            measure_compiled(operation, row, rounds, seconds)
        save()


def show(rows: list[Report]) -> None:
    head = "".join(f"{x:>14}" for x in (*COLUMNS, "opt./basic", "floor", "floor/opt."))
    print(f"{'ms':<50}{head}  bound")
    for row in rows:
        ms = row["ms"]
        cells = [f"{ms[x]:.4f}" if x in ms else "-" for x in COLUMNS]
        ratio = share = "-"
        if ms.get("optimized"):
            share = f"{row['floor_ms'] / ms['optimized']:.0%}"
            ratio = f"{ms['optimized'] / ms['basic']:.3f}" if ms.get("basic") else "-"
        cells += [ratio, f"{row['floor_ms']:.4f}", share]
        print(f"{row['title']:<50}{''.join(f'{x:>14}' for x in cells)}  {row['bound']}")
        for name in ms.keys() - set(COLUMNS):
            print(f"    {name}: {ms[name]:.4f}")
        for kind in ("errors", "wrong", "skipped"):
            for name, error in row[kind].items():
                print(f"    {name}{' is wrong' * (kind == 'wrong')}: {error}")


def show_all(report: Report, plot: Path | None) -> None:
    for part in ("machine", "ceilings", "assumed", "clocks after"):
        values = report.get(part, {}).items()
        if values:
            print(f"{part}: " + ", ".join(f"{name} {value}" for name, value in values))
    show(report["rows"])
    if plot and report["rows"]:
        try:
            import matplotlib as mpl

            mpl.use("Agg")
            draw_roofline(report).savefig(plot, dpi=120, format="png")
        except Exception as error:  # the figures are on disk, this is one more view
            say(f"no picture: {one_line(error)}")


def ours_failed(rows: list[Report]) -> bool:
    blamed = {*OURS, "inputs", "reference"}
    return any(row["wrong"] or blamed & row["errors"].keys() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--rehearse", action="store_true", help="tiny, to try it all")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them here, a PNG")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop")
    parser.add_argument("--seconds", type=float, default=3, help="the most for a call")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--resume", action="store_true", help="keep the JSON's rows")
    options = parser.parse_args()
    if cupy is None:
        print("no GPU: " + cupy_or_reason()[1])
        return 3
    report: Report = {"machine": {}, "ceilings": {}, "rows": []}
    if options.resume and options.json and options.json.exists():
        report["rows"] = json.loads(options.json.read_text())["rows"]

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    return complete(
        lambda: measure_all(report, options, save),
        save,
        lambda: show_all(report, options.plot),
        lambda: ours_failed(report["rows"]),
    )


if __name__ == "__main__":
    leave(main())
