"""Time each kernel beside its floor, and beside the same formula in torch and CuPy.

    python benchmarks/kernels.py [--quick | --rehearse] [--json PATH] [--plot PATH]
                                 [--minutes M] [--seconds S] [--no-compile] [--resume]

The script needs a GPU and CuPy, and uses torch if it is installed. The same run
measures the ceilings: the rates of a copy, a matrix product and exponentials, and the
time of a launch. Times are medians of the GPU's time, and contenders take turns. Calls
are queued behind a kernel that spins, so the times do not include Python's own time.

Small sizes come first, and the JSON is written after every row. A contender that fails
is an entry of its row. torch.compile comes last, with the largest size first. Exit
status: 1 if one of our kernels failed or was wrong; 3 without a GPU; 4 if the process
lost the GPU; 130 if interrupted. After a 4, `--resume` measures in a new process the
rows that are not yet in the JSON.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # seam.py

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
COMPILE_SECONDS = 60.0  # limit for one torch.compile and its timing
# Limit for the reference; 4096 tokens of width 1024 take 1.5 s on two cores.
CHECK_SECONDS = 60.0
MAX_ATTENTION_BYTES = 12e9  # limit for the attention that is an input

Report = dict[str, Any]


# -------------------------------------------------------------------- ceilings


def ceilings(report: Report, tiny: bool) -> None:
    """Measure the rates of this GPU (per second), and the time of a launch.

    A rate that cannot be measured gets an assumed value, and `report` names it.
    """
    # 1 GiB, or less if memory is short: the copy needs two buffers of this size.
    size = min(1 << 30, cupy.cuda.Device().mem_info[0] // 8)
    size, n, blocks = (1 << 12, 64, 1) if tiny else (size, 8192, 1 << 13)
    results: Report = {"title": "ceilings"}

    # Each input is made inside its contender's first call, so that a failure (too
    # little memory, no cuBLAS) costs one rate and not all of them.
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
    measure(runs, 1 if tiny else 11, results)
    seconds = {name: ms / 1e3 for name, ms in results["ms"].items() if ms > 0}
    rates = {  # the call that measures a rate, and the amount of one call
        "bytes": ("copy", 2 * size),  # every byte is read and written
        "flops": ("product", 2 * n**3),  # n³ multiply-adds of 2 flops
        "exps": ("exp", blocks * 256 * 8 * 4096),  # 8 x 4096 of each thread
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
    report["assumed"] |= results["errors"]


# ------------------------------------------------------------------ correctness


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Fill outputs with NaN first, so that elements a kernel leaves out show."""
    fresh = cuda.empty

    def empty(shape: Any, dtype: Any) -> Any:
        x = fresh(shape, dtype)
        if x.size:
            # All bits set is NaN in every float dtype, and -1 in integers.
            x.reshape(-1).view(np.uint8).fill(0xFF)
        return x

    cuda.empty = empty
    try:
        yield
    finally:
        cuda.empty = fresh


def reference(case: Case) -> Any:
    """Return the result of one sequence in float64, by the NumPy reference."""
    arrays = [x[case.sample].get() for x in case.inputs]
    arrays = [x if x.dtype.kind == "i" else x.astype(np.float64) for x in arrays]
    with time_limit(CHECK_SECONDS):
        return case.ours(*arrays)


def check(case: Case, wanted: Any) -> float:
    """Return the largest error of a sequence against the reference in float64."""
    with nan_outputs():
        got = case.ours(*case.inputs)[case.sample].get().astype(np.float64)
    # Merged tokens in bfloat16 have 8 bits; all other results are float32 sums.
    np.testing.assert_allclose(got, wanted, rtol=8e-3, atol=1e-3)
    return float(np.abs(got - wanted).max())


def check_ours(case: Case, names: list[str], row: Report) -> None:
    """Add to `row` the error of each of our kernels, and the kernels that are wrong."""
    with guarded(row["errors"], "reference", row["title"]):
        wanted = reference(case)
    if "reference" in row["errors"]:
        return
    for name in names:
        with guarded(row["errors"], name, row["title"]):
            try:
                with qm.use_kernels(name):
                    row["error"][name] = check(case, wanted)
                synchronize()  # an error of this kernel belongs to it
            except AssertionError as error:
                row["wrong"][name] = " ".join(str(error).split())[:200]


# ------------------------------------------------------------------- contenders


def input_sets(case: Case) -> list[tuple[Any, ...]]:
    """Return copies of the inputs that together do not fit the L2 cache."""
    size = sum(x.nbytes for x in case.inputs)
    # Calls go from copy to copy. With three times the size of the cache in total, each
    # call reads its inputs from memory, as the floor assumes.
    cache = properties().get("l2CacheSize", 0)
    copies = min(math.ceil(3 * cache / size), 256) if size < 3 * cache else 1
    copied = (tuple(map(cupy.copy, case.inputs)) for _ in range(copies - 1))
    return [case.inputs, *copied]


def over(function: Callable[..., Any], sets: list[Any], axes: int) -> Any:
    """Return a call that uses one input set after another.

    If `axes` is not 0, a call goes through the slices of that many leading axes.
    """
    turn = itertools.cycle(sets)
    if not axes:
        return lambda: function(*next(turn))

    def run() -> None:  # drops the results: those of all slices would not fit memory
        arrays = next(turn)
        for index in np.ndindex(arrays[0].shape[:axes]):
            function(*(x[index] for x in arrays))

    return run


def ours_over(name: Any, case: Case, sets: list[Any]) -> Callable[[], Any]:
    """Return a call of our kernels `name` that uses one input set after another."""
    turn = itertools.cycle(sets)

    def run() -> Any:
        with qm.use_kernels(name):
            return case.ours(*next(turn))

    return run


def contenders(case: Case, errors: dict[str, str], title: str) -> Report:
    """Return each contender's call, except that of torch.compile."""
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
    """Decide which contenders a row skips, from the times of smaller sizes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last: dict[tuple[str, str], tuple[float, float]] = {}

    def too_slow(self, operation: str, name: str, cost: float) -> str:
        """Return why a contender is skipped, or an empty string."""
        before, ms = self.last.get((operation, name), (1.0, 0.0))
        # Assume that the time grows in proportion to the cost of the row.
        seconds = ms / 1e3 * max(cost / before, 1)
        return f"skipped, about {seconds:.1f} s" if seconds > self.seconds else ""

    def learn(self, operation: str, row: Report) -> None:
        """Remember the times of a row."""
        for name, ms in row["ms"].items():
            self.last[operation, name] = max(row["cost"], 1e-9), ms


def measure_row(
    operation: Operation, row: Report, rounds: int, patience: Patience
) -> None:
    """Check and time one operation; failures are entries of the row."""
    kernel = operation.make.__name__
    with guarded(row["errors"], "inputs", row["title"]):
        case = operation.make(*operation.sizes)
        synchronize()
    if "inputs" in row["errors"]:
        return
    slow = {name: patience.too_slow(kernel, name, row["cost"]) for name in COLUMNS}
    row["skipped"] = {name: why for name, why in slow.items() if why}
    check_ours(case, [x for x in OURS if x not in row["skipped"]], row)
    runs: Report = {}
    with guarded(row["errors"], "inputs", row["title"]):
        runs = contenders(case, row["errors"], row["title"])
    # A contender that is wrong or has failed has no time.
    out = row["skipped"].keys() | row["wrong"].keys() | row["errors"].keys()
    measure({x: run for x, run in runs.items() if x not in out}, rounds, row)
    patience.learn(kernel, row)


def measure_compiled(
    operation: Operation, row: Report, rounds: int, seconds: float
) -> None:
    """Add the time of torch.compile to a row, or its error."""
    name = "torch.compile"
    with guarded(row["errors"], name, row["title"]), time_limit(seconds):
        # Without a reset, torch stops compiling after a number of recompilations.
        torch.compiler.reset()
        case = operation.make(*operation.sizes)
        sets = [tuple(map(as_torch, arrays)) for arrays in input_sets(case)]
        run = over(torch.compile(case.in_torch), sets, case.sliced)
        measure({name: run}, rounds, row)


# -------------------------------------------------------------------- the report


def new_row(operation: Operation, peak: dict[str, float]) -> Report:
    """Return a row with the operation's work and floor, and no times yet."""
    _, title, _, count, sizes = operation
    row = floor_of(title, count(*sizes), peak)
    # The floor is the largest of these times; `Patience` compares their sum.
    cost = sum(row["work"][x] / peak[x] for x in row["work"])
    empty: Report = {x: {} for x in ("ms", "python_ms", "error", "wrong", "errors")}
    return {"size": operation.size, **row, "cost": cost, "skipped": {}, **empty}


def measure_all(report: Report, options: Any, save: Callable[[], None]) -> None:
    """Fill the report row by row, and save it after every row."""
    end = time.monotonic() + 60 * options.minutes
    rounds = 2 if options.rehearse else 5 if options.quick else 15
    report["machine"] = {**describe(), "dtype": dtype()}
    say(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    say("ceilings")
    ceilings(report, options.rehearse)
    save()
    which = "rehearse" if options.rehearse else "quick" if options.quick else "all"
    # The attention that is an input takes at most a quarter of the free memory.
    free = cupy.cuda.Device().mem_info[0]
    todo = list(operations(which, min(free / 4, MAX_ATTENTION_BYTES)))
    patience = Patience(options.seconds)
    there = {row["title"] for row in report["rows"]}
    for number, operation in enumerate(todo, 1):
        if time.monotonic() > end:
            say(f"out of time: {len(todo) - number + 1} rows skipped")
            break
        if operation.title in there:
            continue
        say(f"[{number}/{len(todo)}] {operation.title}")
        free_memory()
        row = new_row(operation, report["ceilings"])
        report["rows"].append(row)
        report["under way"] = operation.title
        save()  # if the process is killed, the JSON names the operation under way
        measure_row(operation, row, rounds, patience)
        save()
    report["under way"] = ""
    # For comparison with the clocks at the start, which `describe` reports.
    report["clocks after"] = clocks()
    save()
    if torch and not options.no_compile:
        measure_all_compiled(todo, report, rounds, end, save)


def measure_all_compiled(
    todo: list[Operation], report: Report, rounds: int, end: float, save: Any
) -> None:
    """Add the times of torch.compile to the rows that have none."""
    rows = {row["title"]: row for row in report["rows"]}
    sizes = list(dict.fromkeys(operation.size for operation in todo))
    # The largest size first: its times matter most if time runs out.
    for operation in sorted(todo, key=lambda operation: -sizes.index(operation.size)):
        row = rows.get(operation.title)
        if row is None or "torch.compile" in row["ms"].keys() | row["errors"].keys():
            continue
        left = end - time.monotonic()
        if left <= 0:
            say("out of time: the remaining rows of torch.compile are skipped")
            return
        say(f"torch.compile: {operation.title}")
        free_memory()
        if "inputs" not in row["errors"]:
            seconds = min(COMPILE_SECONDS, left)
            measure_compiled(operation, row, rounds, seconds)
        save()


def show(rows: list[Report]) -> None:
    """Print milliseconds by contender, our ratios, the floor and what bounds it."""
    head = "".join(f"{x:>14}" for x in (*COLUMNS, "opt./basic", "floor", "floor/opt."))
    print(f"{'ms':<50}{head}  bound")
    for row in rows:
        ms = row["ms"]
        cells = [f"{ms[x]:.4f}" if x in ms else "-" for x in COLUMNS]
        ratio = reached = "-"
        if ms.get("optimized"):
            reached = f"{row['floor_ms'] / ms['optimized']:.0%}"
            ratio = f"{ms['optimized'] / ms['basic']:.3f}" if ms.get("basic") else "-"
        cells += [ratio, f"{row['floor_ms']:.4f}", reached]
        print(f"{row['title']:<50}{''.join(f'{x:>14}' for x in cells)}  {row['bound']}")
        for name in ms.keys() - set(COLUMNS):
            print(f"    {name}: {ms[name]:.4f}")
        for field in ("errors", "wrong", "skipped"):
            for name, error in row[field].items():
                print(f"    {name}{' is wrong' * (field == 'wrong')}: {error}")


def show_all(report: Report, plot: Path | None) -> None:
    """Print the report, and draw the roofline if there is a path for it."""
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
        except Exception as error:  # the figures are on disk already
            say(f"the plot failed: {one_line(error)}")


def ours_failed(rows: list[Report]) -> bool:
    """Return whether our kernels, their inputs or the reference failed."""
    blamed = {*OURS, "inputs", "reference"}
    return any(row["wrong"] or blamed & row["errors"].keys() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--rehearse", action="store_true", help="try all steps, tiny")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--seconds", type=float, default=3, help="limit of one call")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--resume", action="store_true", help="keep the JSON's rows")
    options = parser.parse_args()
    if cupy is None:
        print("no GPU is available: " + cupy_or_reason()[1])
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
