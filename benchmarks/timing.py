"""The GPU's time of calls, contenders in turn.

Calls are queued behind a kernel that spins, so Python's own time does not show. Where
that kernel does not compile, it does.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from guard import guarded, one_line, say, synchronize
from machine import cupy_or_reason

cupy, _ = cupy_or_reason()
LONGEST_SPIN = 0.05  # seconds
LONG = 0.5  # seconds of a call that is timed once
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


@functools.cache
def raw(name: str) -> Any:
    return cupy.RawKernel(SOURCE, name)


@functools.cache
def spinner() -> Callable[[float], None] | None:
    """Return what keeps the GPU busy for some seconds, or None if nothing does."""
    try:
        raw("spin")((1,), (1,), (np.int64(0),))
        synchronize()
    except Exception as error:
        say(f"times include Python's own, no kernel spins: {one_line(error)}")
        return None
    return lambda seconds: raw("spin")((1,), (1,), (np.int64(1e9 * seconds),))


def gpu_time(run: Callable[[], Any], calls: int, ahead: float) -> tuple[float, float]:
    """Return seconds per call: the GPU's, and Python's, which starts `ahead` of it."""
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    if spin := spinner():
        spin(min(ahead, LONGEST_SPIN))
    start.record()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    python = (time.perf_counter() - before) / calls
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / calls, python


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, row: dict[str, Any]
) -> None:
    """Add medians by contender to `row`, and the errors of those that fail.

    Contenders run in turn. What is measured so far is in the row after an interrupt.
    """
    plan: dict[str, tuple[int, int, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    errors = row.setdefault("errors", {})
    try:
        for turn in range(-1, rounds):
            for name, run in runs.items():
                if name in errors or (turn >= 0 and turn >= plan[name][1]):
                    continue
                with guarded(errors, name, row.get("title", "")):
                    if turn < 0:
                        run()  # compiles
                        synchronize()  # an error of this contender belongs to it
                        plan[name] = _planned(run, rounds, times[name])
                    else:
                        calls, _, ahead = plan[name]
                        times[name].append(gpu_time(run, calls, ahead))
    finally:
        for unit, place in (("ms", 0), ("python_ms", 1)):
            medians = row.setdefault(unit, {})
            for name, pairs in times.items():
                if pairs and name not in errors:
                    taken = [pair[place] for pair in pairs]
                    medians[name] = 1e3 * statistics.median(taken)


def _planned(
    run: Callable[[], Any], rounds: int, times: list[tuple[float, float]]
) -> tuple[int, int, float]:
    """Return calls a round, rounds and how far Python starts ahead, by one call."""
    seconds, python = gpu_time(run, 1, 0.01)
    if seconds > LONG:
        times.append((seconds, python))
        return 1, 0, 0
    calls = min(max(int(2e-3 / max(seconds, 1e-6)), 1), 16)
    turns = min(max(int(1 / max(seconds, 1e-6)), 1), rounds)  # a second in all
    return calls, turns, 2 * calls * python
