"""Each kernel against its floor, and against what torch and CuPy users have today.

    python benchmarks/kernels.py [--quick] [--json PATH] [--plot PATH]
                                 [--minutes M]

Needs a GPU and CuPy; takes torch if it is there. The ceilings (copy, matrix product,
exp, launch) are measured in the same run. Times are the GPU's, medians, contenders in
turn: calls are queued behind a kernel that spins, so Python's own time does not show.
"""

import argparse
import datetime
import functools
import gc
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

from report import write_json
from roofline import draw as draw_roofline
from roofline import floor_of
from workload import DTYPE, Case, Operation, cupy, draw, operations, torch

import qm_cupy as qm
from qm_cupy import _cuda

COLUMNS = ("basic", "optimized", "torch", "torch.compile", "CuPy")
SOURCE = r"""
__device__ long long now() {
    long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
extern "C" __global__ void spin(long long nanoseconds) {
    for (const long long start = now(); now() - start < nanoseconds;) {}
}
extern "C" __global__ void exponentials(float* out) {
    float x[8];  // eight chains, so that no exp waits for the one before
    for (int i = 0; i < 8; ++i) x[i] = threadIdx.x + i;
    for (int n = 0; n < 4096; ++n)
        for (int i = 0; i < 8; ++i)
            asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
    for (int i = 0; i < 8; ++i) if (x[i] == 0.5f) out[i] = x[i];  // never
}
"""


def gpu_time(run: Callable[[], Any], calls: int, ahead: float) -> tuple[float, float]:
    """Return seconds per call: the GPU's, and Python's, which starts `ahead` of it."""
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    raw("spin")((1,), (1,), (np.int64(1e9 * min(ahead, 0.5)),))
    start.record()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    python = (time.perf_counter() - before) / calls
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / calls, python


@functools.cache
def raw(name: str) -> Any:
    return cupy.RawKernel(SOURCE, name)


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Return medians by contender, all in turn, and the errors of those that fail."""
    plan: dict[str, tuple[int, int, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    for turn in range(-1, rounds):
        for name, run in runs.items():
            try:
                if turn < 0:
                    run()  # compiles
                    seconds, python = gpu_time(run, 1, 0.01)
                    calls = min(max(int(2e-3 / max(seconds, 1e-6)), 1), 16)
                    turns = min(
                        max(int(1 / max(seconds, 1e-6)), 1), rounds
                    )  # a second in all
                    plan[name] = calls, turns, 2 * calls * python
                elif name in plan and turn < plan[name][1]:
                    calls, _, ahead = plan[name]
                    times[name].append(gpu_time(run, calls, ahead))
            except Exception as error:  # a rival's failure is a result too
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                plan.pop(name, None)
                free_memory()
    taken = {name: zip(*pairs, strict=True) for name, pairs in times.items() if pairs}
    medians = {name: [*map(statistics.median, pair)] for name, pair in taken.items()}
    return {
        "ms": {x: 1e3 * m[0] for x, m in medians.items() if x not in errors},
        "python_ms": {x: 1e3 * m[1] for x, m in medians.items() if x not in errors},
        "errors": errors,
    }


def free_memory() -> None:
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if torch:
        torch.cuda.empty_cache()


def ceilings() -> dict[str, float]:
    """Measure what this GPU can do, each per second, and the time of a launch."""
    size = min(4 << 30, cupy.cuda.Device().mem_info[0] // 4)
    source, target = (cupy.zeros(size, np.uint8) for _ in range(2))
    n, out = 8192, cupy.empty(8, np.float32)
    x = torch.from_dlpack(draw(n, n)) if torch else draw(n, n).astype(np.float16)
    many = 1 << 16  # blocks of 256 threads with 8 chains of 4096
    runs = {
        "copy": lambda: cupy.copyto(target, source),
        "product": lambda: x @ x,
        "exp": lambda: raw("exponentials")((many,), (256,), (out,)),
        "launch": lambda: raw("spin")((1,), (1,), (np.int64(0),)),
    }
    found = measure(runs, 11)
    if found["errors"]:
        raise RuntimeError(f"no ceilings: {found['errors']}")
    seconds = {name: ms / 1e3 for name, ms in found["ms"].items()}
    return {
        "bytes": 2 * size / seconds["copy"],  # read and written
        "flops": 2 * n**3 / seconds["product"],
        "exps": many * 256 * 8 * 4096 / seconds["exp"],
        "launch_s": seconds["launch"],
    }


def check(case: Case) -> float:
    """Return the largest error of a sequence against the reference in float64.

    Outputs are poisoned first: what a kernel leaves out shows.
    """
    fresh = _cuda.empty

    def poisoned(shape: Any, dtype: Any) -> Any:
        x = fresh(shape, dtype)
        x.reshape(-1).view(np.uint8).fill(0xFF)
        return x

    _cuda.empty = poisoned
    try:
        got = case.ours(*case.inputs)[case.sample].get().astype(np.float64)
    finally:
        _cuda.empty = fresh
    arrays = [x[case.sample].get() for x in case.inputs]
    arrays = [x if x.dtype.kind == "i" else x.astype(np.float64) for x in arrays]
    wanted = case.ours(*arrays)
    # The merged tokens have 8 bits in bfloat16; all else is summed in float32.
    np.testing.assert_allclose(got, wanted, rtol=8e-3, atol=1e-3)
    return float(np.abs(got - wanted).max())


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """Return everyone's call without arguments, on one input set after another."""
    size = sum(x.nbytes for x in case.inputs)
    cache = properties()["l2CacheSize"]
    copies = min(math.ceil(3 * cache / size), 256) if size < 3 * cache else 1
    sets = [
        case.inputs,
        *(tuple(map(cupy.copy, case.inputs)) for _ in range(copies - 1)),
    ]

    def over(function: Callable[..., Any], sets: list[Any]) -> Callable[[], Any]:
        turn = itertools.cycle(sets)
        if not case.layered:
            return lambda: function(*next(turn))
        return lambda: [function(*layer) for layer in zip(*next(turn), strict=True)]

    def ours(name: Any) -> Callable[[], Any]:
        turn = itertools.cycle(sets)

        def run() -> Any:
            with qm.use_kernels(name):
                return case.ours(*next(turn))

        return run

    runs = {name: ours(name) for name in COLUMNS[:2]}
    if torch:
        torch.compiler.reset()  # which else gives up after so many recompilations
        tensors = [tuple(map(torch.from_dlpack, arrays)) for arrays in sets]
        runs["torch"] = over(case.in_torch, tensors)
        runs["torch.compile"] = over(torch.compile(case.in_torch), tensors)
        for name, function in case.others.items():
            runs[name] = over(function, tensors)
    if case.in_cupy:
        runs["CuPy"] = over(case.in_cupy, sets)
    return runs


def row_of(operation: Operation, peak: dict[str, float], rounds: int) -> dict[str, Any]:
    title, make, count, sizes = operation
    case = make(*sizes)
    row = floor_of(title, count(*sizes), peak) | {"wrong": {}, "error": {}}
    for name in COLUMNS[:2]:
        try:
            with qm.use_kernels(name):
                row["error"][name] = check(case)
        except Exception as error:
            row["wrong"][name] = " ".join(str(error).split())[:200]
    runs = contenders(case)
    return row | measure(
        {x: r for x, r in runs.items() if x not in row["wrong"]}, rounds
    )


def show(rows: list[dict[str, Any]]) -> None:
    head = "".join(f"{x:>14}" for x in (*COLUMNS, "opt./basic", "floor", "floor/opt."))
    print(f"{'ms':<50}{head}  bound")
    for row in rows:
        ms = row["ms"]
        cells = [f"{ms[x]:.4f}" if x in ms else "-" for x in COLUMNS]
        ratio = share = "-"
        if "optimized" in ms:
            share = f"{row['floor_ms'] / ms['optimized']:.0%}"
            ratio = f"{ms['optimized'] / ms['basic']:.3f}" if "basic" in ms else "-"
        cells += [ratio, f"{row['floor_ms']:.4f}", share]
        print(f"{row['title']:<50}{''.join(f'{x:>14}' for x in cells)}  {row['bound']}")
        for name in ms.keys() - set(COLUMNS):
            print(f"    {name}: {ms[name]:.4f}")
        for name, error in (row["errors"] | row["wrong"]).items():
            print(f"    {name}: {error}")


def properties() -> dict[str, Any]:
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())


def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    return {
        "GPU": properties()["name"].decode(),
        "driver": driver,
        "CUDA": str(cupy.cuda.runtime.runtimeGetVersion()),
        "CuPy": cupy.__version__,
        "torch": torch.__version__ if torch else "none",
        "dtype": DTYPE,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them here, a PNG")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop")
    options = parser.parse_args()
    if cupy is None or not cupy.is_available():
        print("no GPU: " + ("no CuPy" if cupy is None else "CuPy finds none"))
        sys.exit(3)
    end = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "rows": []}
    todo = list(operations(options.quick, cupy.cuda.Device().mem_info[0]))
    for number, operation in enumerate(todo, 1):
        if time.monotonic() > end:
            print(f"out of time: {len(todo) - number + 1} left out", file=sys.stderr)
            break
        print(f"[{number}/{len(todo)}] {operation.title}", file=sys.stderr, flush=True)
        free_memory()
        rounds = 5 if options.quick else 15
        report["rows"].append(row_of(operation, report["ceilings"], rounds))
        if options.json:  # after each, so that a run cut short leaves what it has
            write_json(options.json, report)
    for part in ("machine", "ceilings"):
        print(", ".join(f"{name} {value}" for name, value in report[part].items()))
    show(report["rows"])
    if options.plot:
        draw_roofline(report).savefig(options.plot, dpi=120, format="png")
    sys.exit(1 if any(row["wrong"] for row in report["rows"]) else 0)


if __name__ == "__main__":
    main()
