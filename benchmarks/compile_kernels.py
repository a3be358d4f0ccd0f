"""Compile every kernel for this machine's GPU, in parallel, into CuPy's disk cache.

    python benchmarks/compile_kernels.py [--processes P] [--dtypes DTYPE ...]

NVRTC takes about half a second for each file and dtype. Later processes, such as the
tests, read the machine code from the cache. The exit status is 1 if a file fails.
"""

import argparse
import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # seam.py

from seam import cuda

DTYPES = ("float16", "bfloat16", "float32", "float64", "tf32")


def compile_file(job: tuple[str, str]) -> tuple[str | None, float]:
    """Compile a file for a dtype; return the error, or None, and the seconds."""
    file, dtype = job
    start = time.monotonic()
    try:
        cuda.compile_file(file, dtype)
    # Return the error: a failed file must not stop the pool.
    except Exception as error:
        wrong = f"{file} {dtype}: {type(error).__name__}: {error}"
        return wrong, time.monotonic() - start
    return None, time.monotonic() - start


def say_slowest(times: list[tuple[float, str, str]]) -> None:
    """Print the five compilations that took longest."""
    for seconds, file, dtype in sorted(times, reverse=True)[:5]:
        print(f"{seconds:6.1f} s  {file} {dtype}", flush=True)


def show_interrupts() -> None:
    """Print a traceback at an interrupt and go on; the main process ends this one."""
    faulthandler.register(signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options = parser.parse_args()
    # "tf32" compiles the float32 kernels that use TF32; only optimized kernels do.
    jobs = [
        (file, dtype)
        for file, dtype in itertools.product(cuda.kernel_files(), options.dtypes)
        if dtype != "tf32" or file.startswith("optimized/")
    ]
    start, failures, times = time.monotonic(), 0, []
    # Spawn: a forked process would inherit the state of CUDA.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        options.processes, mp_context=context, initializer=show_interrupts
    )
    try:
        for job, (failure, seconds) in zip(
            jobs, pool.map(compile_file, jobs), strict=True
        ):
            times.append((seconds, *job))
            if failure:
                failures += 1
                print(failure, flush=True)
    except KeyboardInterrupt:  # the cache keeps every file that is compiled
        say_slowest(times)
        late = " ".join(jobs[min(len(times), len(jobs) - 1)])
        print(f"interrupted after {len(times)} of {len(jobs)}, at {late}", flush=True)
        # Otherwise the processes would compile every job that is queued.
        for process in pool._processes.values():
            process.terminate()
        os._exit(130)
    say_slowest(times)
    seconds = time.monotonic() - start
    print(f"{len(jobs)} compilations, {failures} failed, {seconds:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
