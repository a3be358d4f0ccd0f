"""Measure what a call costs besides its mathematics, by array library.

    python benchmarks/overhead.py [--quick | --rehearse] [--json PATH]

The arrays are so small (8 tokens of width 4) that nearly all of the time is overhead.
All libraries run in one process and take turns; figures are medians of many short runs,
in microseconds. torch and JAX are measured if they are installed. With a GPU and CuPy,
the arrays are on the GPU too, and the time is that until the call returns, while its
kernels still run.

The conversion of a result is shown beside the library's own import of a NumPy (or CuPy)
array, which is its lower limit. The last rows are the Python time of `quickmerge` on a
GPU. They need no GPU: the launchers run with kernels that do nothing.

The JSON is written after every row. A library that fails is an entry of "errors". Exit
status: 1 if a call of ours failed; 4 if the process lost the GPU; 130 if interrupted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # seam.py

from guard import complete, guarded, leave, say, synchronize
from machine import cpu, cupy_or_reason, describe, torch_on_gpu, torch_or_none
from report import write_json
from seam import cuda

import qm_cupy as qm
from qm_cupy.arrays.conversion import convert_inputs

Calls = dict[str, Callable[[], Any]]
CALLS_PER_RUN = 50  # calls between two readings of the clock


class Library(NamedTuple):
    """Three conversions of an array, for one library."""

    from_numpy: Callable[[np.ndarray], Any]
    """Convert a NumPy array to the library's array, on the device that is measured."""
    computed: Callable[[np.ndarray], Any]
    """Convert a NumPy array to the type of our results: NumPy, or CuPy on a GPU."""
    own_import: Callable[[Any], Any]
    """Convert such a result with the library's own import."""


BARE = "  the library's own import"  # the only call that is not one of ours


def of_jax() -> Library:
    """Return JAX's conversions, on its default device."""
    import jax

    # JAX may be a build for the CPU on a machine with a GPU.
    on_gpu = cupy_or_reason()[0] is not None and jax.default_backend() == "gpu"
    computed = cupy_or_reason()[0].asarray if on_gpu else np.asarray
    own_import = jax.numpy.from_dlpack if on_gpu else jax.numpy.asarray
    return Library(jax.numpy.asarray, computed, own_import)


def libraries(errors: dict[str, str]) -> dict[str, Library]:
    """Return the libraries that can be used; an import that fails is an error."""
    result = {"NumPy": Library(np.asarray, np.asarray, np.asarray)}
    cupy, torch = cupy_or_reason()[0], torch_or_none()
    if cupy is not None:
        result["CuPy"] = Library(cupy.asarray, cupy.asarray, cupy.asarray)
    if torch is not None:
        result["torch"] = Library(torch.from_numpy, np.asarray, torch.from_numpy)
    if torch_on_gpu() is not None:
        # Our results on a GPU are CuPy arrays, which torch imports by DLPack.
        result["torch CUDA"] = Library(
            lambda x: torch.from_numpy(x).cuda(), cupy.asarray, torch.from_dlpack
        )
    if find_spec("jax"):
        with guarded(errors, "JAX"):
            result["JAX"] = of_jax()
    return result


def calls(library: Library) -> Calls:
    """Return the calls to measure with a library's arrays, by title."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    from_numpy, computed = library.from_numpy, library.computed(x)
    tokens, mask = from_numpy(x), from_numpy(np.ones(8, np.bool_))
    labels = from_numpy(np.arange(8, dtype=np.int32) % 2)
    # `convert_inputs` converts arguments; its first result converts results back.
    convert_back, *_ = convert_inputs({"tokens": tokens})
    return {
        "conversion, one array in": lambda: convert_inputs({"tokens": tokens}),
        "conversion, two arrays in": lambda: convert_inputs(
            {"tokens": tokens, "mask": mask}
        ),
        "conversion, one array out": lambda: convert_back(computed),
        BARE: lambda: library.own_import(computed),
        "unmerge_tokens": lambda: qm.unmerge_tokens(tokens, labels),
        "quickmerge": lambda: qm.quickmerge(tokens, 2),
    }


def launchers() -> Calls:
    """Return calls of `quickmerge` by method, for use in `without_kernels`."""
    tokens = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    methods = "average", "bipartite", "nearest", "contiguous"
    return {x: lambda x=x: qm.quickmerge(tokens, 2, method=x) for x in methods}


class Nothing:
    """A kernel that does not run."""

    # Launchers read and set these attributes of a CuPy kernel.
    shared_size_bytes = max_dynamic_shared_size_bytes = 0

    def __call__(self, *launch: Any, **options: Any) -> None:
        """Return at once."""


def without_kernels() -> ExitStack:
    """Return a context in which NumPy arrays count as GPU arrays and no kernel runs."""
    stand_ins = {
        "raw_kernel": lambda *names: Nothing(),
        "empty": np.empty,
        "to_device": np.asarray,
        "is_cuda": lambda x: True,
        # The multiprocessors of an H200, and the shared memory that a block can use.
        "current_device": lambda: cuda.Device(
            multiprocessors=132, shared_bytes=227 << 10
        ),
    }
    # seam.py names the functions of the library through which it reaches a GPU.
    scope = ExitStack()
    for name, stand_in in stand_ins.items():
        scope.enter_context(mock.patch.object(cuda, name, stand_in))
    return scope


def measure(
    contenders: Calls, runs: int, errors: dict[str, str], during: str
) -> dict[str, float]:
    """Return the median microseconds of each contender, after one warm-up.

    Contenders take turns, so that a slow phase of the machine affects all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, runs):
        for name, call in contenders.items():
            if name in errors:
                continue
            with guarded(errors, name, during):
                # The warm-up (turn -1) and a rehearsal make one call each.
                start = time.perf_counter()
                for _ in range(CALLS_PER_RUN if turn >= 0 and runs > 1 else 1):
                    call()
                taken = time.perf_counter() - start
                # Outside the timed part. A full queue of launches would delay the next
                # calls.
                synchronize()
                if turn >= 0:
                    times[name].append(taken / (CALLS_PER_RUN if runs > 1 else 1) * 1e6)
    return {
        name: statistics.median(taken)
        for name, taken in times.items()
        if taken and name not in errors
    }


class Measurements:
    """Microseconds by title and library, and the errors."""

    def __init__(self, runs: int, save: Callable[[], None]) -> None:
        self.runs, self.save = runs, save
        self.medians: dict[str, dict[str, float]] = {}
        self.errors: dict[str, dict[str, str]] = {}

    def row(self, title: str, contenders: Calls) -> None:
        """Measure one call with every library, and save."""
        say(title.strip())
        errors = self.errors.setdefault(title.strip(), {})
        self.medians[title.strip()] = measure(contenders, self.runs, errors, title)
        self.save()

    def run(self) -> None:
        failures = self.errors["libraries"] = {}
        by_library: dict[str, Calls] = {}
        for name, library in libraries(failures).items():
            with guarded(failures, name, "arrays for the calls"):
                by_library[name] = calls(library)
        # All libraries have the same titles; a row has one column for each library.
        for title in next(iter(by_library.values()), {}):
            self.row(title, {name: those[title] for name, those in by_library.items()})
        errors = self.errors.setdefault("launchers", {})
        with guarded(errors, "all", "launchers"), without_kernels():
            self.row("launchers", launchers())

    def show(self) -> None:
        """Print a column for each library, then the launchers, then the errors."""
        titles = [x for x in self.medians if x != "launchers"]
        names = list(dict.fromkeys(name for x in titles for name in self.medians[x]))
        print(f"{'':<30}" + "".join(f"{name:>11}" for name in names))
        for title in titles:
            taken = [self.medians[title].get(name) for name in names]
            cells = ["-" if x is None else f"{x:.1f}" for x in taken]
            print(f"{title:<30}" + "".join(f"{x:>11}" for x in cells))
        print("Python time of `quickmerge` on a GPU, by method:")
        for method, taken in self.medians.get("launchers", {}).items():
            print(f"  {method:<28}{taken:>11.1f}")
        for title, errors in self.errors.items():
            for name, error in errors.items():
                print(f"{title}, {name}: {error}")

    def failed(self) -> bool:
        """Return whether a call of ours failed."""
        # A library that is installed but does not work is not our failure.
        apart = "libraries", BARE.strip()
        return any(e for title, e in self.errors.items() if title not in apart)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--rehearse", action="store_true", help="make each call once")
    parser.add_argument("--json", type=Path, help="write the medians here as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": cpu()}
    if cupy_or_reason()[0] is not None:
        report["gpu"] = describe()

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    measurements = Measurements(
        1 if options.rehearse else 3 if options.quick else 40, save
    )
    report |= {"microseconds": measurements.medians, "errors": measurements.errors}
    where = ", ".join(str(x) for x in report.get("gpu", {}).values())
    print(f"qm_cupy {qm.__version__}, {cpu()}; microseconds, N, D = (8, 4)")
    if where:
        print(where)
    return complete(measurements.run, save, measurements.show, measurements.failed)


if __name__ == "__main__":
    leave(main())
