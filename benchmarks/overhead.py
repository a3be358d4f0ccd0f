"""What a call costs beside its mathematics: microseconds, by array library.

    python benchmarks/overhead.py [--quick] [--json PATH]

One process, libraries in turn, medians of many short runs. torch and JAX are measured
where they are installed, and on a GPU, with CuPy, where there is one: then it is the
time until a call returns, its kernels under way. Beside the way out stands each
library's own import of a NumPy (or CuPy) array, below which it cannot be. Last stands
the Python of `quickmerge` on a GPU, on any machine: launchers whose kernels do nothing.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from report import write_json

import qm_cupy as qm
from qm_cupy import _cuda
from qm_cupy._arrays import enter

Calls = dict[str, Callable[[], Any]]
RUN = 50  # calls between two looks at the clock


class Library(NamedTuple):
    """How arrays get into a library."""

    give: Callable[[np.ndarray], Any]
    """From NumPy, to where they are measured."""
    inside: Callable[[np.ndarray], Any]
    """From NumPy to what the door lets out: NumPy's, or CuPy's on a GPU."""
    take: Callable[[Any], Any]
    """The library's own import of that."""


def libraries() -> dict[str, Library]:
    found = {"NumPy": Library(np.asarray, np.asarray, np.asarray)}
    cupy = None
    if find_spec("cupy"):
        import cupy

        cupy = cupy if cupy.is_available() else None
    if cupy:
        found["CuPy"] = Library(cupy.asarray, cupy.asarray, cupy.asarray)
    if find_spec("torch"):
        import torch

        found["torch"] = Library(torch.from_numpy, np.asarray, torch.from_numpy)
        if cupy and torch.cuda.is_available():
            found["torch CUDA"] = Library(
                lambda x: torch.from_numpy(x).cuda(), cupy.asarray, torch.from_dlpack
            )
    if find_spec("jax"):
        import jax

        on_gpu = cupy and jax.default_backend() == "gpu"
        inside = cupy.asarray if on_gpu else np.asarray
        take = jax.numpy.from_dlpack if on_gpu else jax.numpy.asarray
        found["JAX"] = Library(jax.numpy.asarray, inside, take)
    return found


def calls(library: Library) -> Calls:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    give, inside = library.give, library.inside(x)
    tokens, mask = give(x), give(np.ones(8, np.bool_))
    labels = give(np.arange(8, dtype=np.int32) % 2)
    leave, *_ = enter(tokens=tokens)
    return {
        "door, one array in": lambda: enter(tokens=tokens),
        "door, two arrays in": lambda: enter(tokens=tokens, mask=mask),
        "door, one array out": lambda: leave(inside),
        "  the library's own import": lambda: library.take(inside),
        "unmerge_tokens": lambda: qm.unmerge_tokens(tokens, labels),
        "quickmerge": lambda: qm.quickmerge(tokens, 2),
    }


def launchers() -> Calls:
    tokens = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    methods = "average", "bipartite", "nearest", "contiguous"
    return {x: lambda x=x: qm.quickmerge(tokens, 2, method=x) for x in methods}


class Nothing:
    """A kernel that does not run."""

    shared_size_bytes = max_dynamic_shared_size_bytes = 0

    def __call__(self, *launch: Any, **options: Any) -> None:
        """Return at once."""


def without_kernels() -> ExitStack:
    """Return a context in which NumPy's arrays pass for a GPU's, and nothing runs."""
    stand_ins = {
        "raw_kernel": lambda *names: Nothing(),
        "empty": np.empty,
        "to_device": np.asarray,
        "is_cuda": lambda x: True,
        "device": lambda: _cuda.Device(multiprocessors=132, shared_bytes=227 << 10),
    }
    scope = ExitStack()
    for name, stand_in in stand_ins.items():
        scope.enter_context(mock.patch.object(_cuda, name, stand_in))
    return scope


def measure(contenders: Calls, runs: int) -> dict[str, float]:
    """Return the median microseconds of each, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(runs):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(RUN):
                call()
            times[name].append((time.perf_counter() - start) / RUN * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, help="write the medians here as well")
    options = parser.parse_args()
    by_library = {name: calls(found) for name, found in libraries().items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}; microseconds, N, D = (8, 4)")
    print(f"{'':<30}" + "".join(f"{name:>11}" for name in by_library))
    report: dict[str, dict[str, float]] = {}
    for title in next(iter(by_library.values())):
        contenders = {name: those[title] for name, those in by_library.items()}
        report[title.strip()] = measure(contenders, 3 if options.quick else 40)
        row = "".join(f"{x:>11.1f}" for x in report[title.strip()].values())
        print(f"{title:<30}{row}")
    with without_kernels():
        report["launchers"] = measure(launchers(), 3 if options.quick else 40)
    print("Python of `quickmerge` on a GPU, by method:")
    for method, taken in report["launchers"].items():
        print(f"  {method:<28}{taken:>11.1f}")
    if options.json:
        write_json(options.json, {"machine": machine, "microseconds": report})


if __name__ == "__main__":
    main()
