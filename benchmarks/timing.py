"""Measure the GPU's time of calls; contenders take turns.

Calls are queued behind a kernel that spins. Python submits the calls while it spins, so
the times do not include Python's own time. If that kernel does not compile, they do.
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
LONG = 0.5  # seconds; a call that takes longer is timed once
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
    """Return a kernel of `SOURCE`."""
    return cupy.RawKernel(SOURCE, name)


@functools.cache
def spinner() -> Callable[[float], None] | None:
    """Return a function that keeps the GPU busy for some seconds, or None."""
    try:
        raw("spin")((1,), (1,), (np.int64(0),))
        synchronize()
    except Exception as error:
        say(f"times include Python's own time, no kernel spins: {one_line(error)}")
        return None
    return lambda seconds: raw("spin")((1,), (1,), (np.int64(1e9 * seconds),))


def gpu_time(
    run: Callable[[], Any], calls: int, head_start: float
) -> tuple[float, float]:
    """Return seconds per call, of the GPU and of Python.

    Python submits the calls while the GPU spins for `head_start` seconds.
    """
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    if spin := spinner():
        spin(min(head_start, LONGEST_SPIN))
    # The first event is reached when the spin ends, the second after the last call.
    start.record()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    python = (time.perf_counter() - before) / calls
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / calls, python  # from ms


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, row: dict[str, Any]
) -> None:
    """Add medians by contender to `row`, and the errors of contenders that fail.

    Contenders take turns, so that a slow phase of the machine affects all of them.
    After an interrupt, the row has the medians of the rounds so far.
    """
    # Calls per round, rounds, and seconds of spinning, by contender.
    plan: dict[str, tuple[int, int, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    errors = row.setdefault("errors", {})
    try:
        # Turn -1 warms up and plans.
        for turn in range(-1, rounds):
            for name, run in runs.items():
                if name in errors or (turn >= 0 and turn >= plan[name][1]):
                    continue
                with guarded(errors, name, row.get("title", "")):
                    if turn < 0:
                        run()  # the first call compiles
                        synchronize()  # an error of this contender belongs to it
                        plan[name] = _planned(run, rounds, times[name])
                    else:
                        calls, _, head_start = plan[name]
                        times[name].append(gpu_time(run, calls, head_start))
    finally:
        for unit, index in (("ms", 0), ("python_ms", 1)):
            medians = row.setdefault(unit, {})
            for name, pairs in times.items():
                if pairs and name not in errors:
                    taken = [pair[index] for pair in pairs]
                    medians[name] = 1e3 * statistics.median(taken)


def _planned(
    run: Callable[[], Any], rounds: int, times: list[tuple[float, float]]
) -> tuple[int, int, float]:
    """Return calls per round, rounds and seconds of spinning, from one timed call."""
    seconds, python = gpu_time(run, 1, 0.01)
    if seconds > LONG:
        times.append((seconds, python))
        return 1, 0, 0
    # About 2 ms per round, of 1 to 16 calls.
    calls = min(max(int(2e-3 / max(seconds, 1e-6)), 1), 16)
    turns = min(max(int(1 / max(seconds, 1e-6)), 1), rounds)  # about a second in total
    # Spin for twice the time that Python needs to submit the calls of a round.
    return calls, turns, 2 * calls * python
