"""What a call costs beside its mathematics: microseconds, by array library.

    python benchmarks/overhead.py [--quick | --rehearse] [--json PATH]

One process, libraries in turn, medians of many short runs. torch and JAX are measured
where they are installed, and on a GPU, with CuPy, where there is one: then it is the
time until a call returns, its kernels under way. Beside the way out stands each
library's own import of a NumPy (or CuPy) array, below which it cannot be. Last stands
the Python of `quickmerge` on a GPU, on any machine: launchers whose kernels do nothing.

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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the seam

from guard import complete, guarded, leave, say, synchronize
from machine import cpu, cupy_or_reason, describe, torch_on_gpu, torch_or_none
from report import write_json
from seam import cuda

import qm_cupy as qm
from qm_cupy.arrays.conversion import enter

Calls = dict[str, Callable[[], Any]]
RUN = 50  # calls between two looks at the clock


class Library(NamedTuple):
    """How arrays get into a library."""

    give: Callable[[np.ndarray], Any]
    """From NumPy, to where they are measured."""
    inside: Callable[[np.ndarray], Any]
    """From NumPy to what the conversion gives back: NumPy's, or CuPy's on a GPU."""
    take: Callable[[Any], Any]
    """The library's own import of that."""


BARE = "  the library's own import"  # the one call that is not ours


def of_jax() -> Library:
    import jax

    on_gpu = cupy_or_reason()[0] is not None and jax.default_backend() == "gpu"
    inside = cupy_or_reason()[0].asarray if on_gpu else np.asarray
    take = jax.numpy.from_dlpack if on_gpu else jax.numpy.asarray
    return Library(jax.numpy.asarray, inside, take)


def libraries(errors: dict[str, str]) -> dict[str, Library]:
    """Return the libraries that can be used; one that fails at once is an error."""
    found = {"NumPy": Library(np.asarray, np.asarray, np.asarray)}
    cupy, torch = cupy_or_reason()[0], torch_or_none()
    if cupy is not None:
        found["CuPy"] = Library(cupy.asarray, cupy.asarray, cupy.asarray)
    if torch is not None:
        found["torch"] = Library(torch.from_numpy, np.asarray, torch.from_numpy)
    if torch_on_gpu() is not None:
        found["torch CUDA"] = Library(
            lambda x: torch.from_numpy(x).cuda(), cupy.asarray, torch.from_dlpack
        )
    if find_spec("jax"):
        with guarded(errors, "JAX"):
            found["JAX"] = of_jax()
    return found


def calls(library: Library) -> Calls:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    give, inside = library.give, library.inside(x)
    tokens, mask = give(x), give(np.ones(8, np.bool_))
    labels = give(np.arange(8, dtype=np.int32) % 2)
    leave, *_ = enter({"tokens": tokens})
    return {
        "conversion, one array in": lambda: enter({"tokens": tokens}),
        "conversion, two arrays in": lambda: enter({"tokens": tokens, "mask": mask}),
        "conversion, one array out": lambda: leave(inside),
        BARE: lambda: library.take(inside),
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
        "current_device": lambda: cuda.Device(
            multiprocessors=132, shared_bytes=227 << 10
        ),
    }
    scope = ExitStack()
    for name, stand_in in stand_ins.items():
        scope.enter_context(mock.patch.object(cuda, name, stand_in))
    return scope


def measure(
    contenders: Calls, runs: int, errors: dict[str, str], during: str
) -> dict[str, float]:
    """Return the median microseconds of each, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, runs):
        for name, call in contenders.items():
            if name in errors:
                continue
            with guarded(errors, name, during):
                start = time.perf_counter()
                for _ in range(RUN if turn >= 0 and runs > 1 else 1):
                    call()
                taken = time.perf_counter() - start
                # A full queue of launches would hold up the next calls.
                synchronize()
                if turn >= 0:
                    times[name].append(taken / (RUN if runs > 1 else 1) * 1e6)
    return {
        name: statistics.median(taken)
        for name, taken in times.items()
        if taken and name not in errors
    }


class Measurements:
    """Microseconds by title and library, and what failed."""

    def __init__(self, runs: int, save: Callable[[], None]) -> None:
        self.runs, self.save = runs, save
        self.medians: dict[str, dict[str, float]] = {}
        self.errors: dict[str, dict[str, str]] = {}

    def row(self, title: str, contenders: Calls) -> None:
        say(title.strip())
        errors = self.errors.setdefault(title.strip(), {})
        self.medians[title.strip()] = measure(contenders, self.runs, errors, title)
        self.save()

    def run(self) -> None:
        at_once = self.errors["libraries"] = {}
        by_library: dict[str, Calls] = {}
        for name, library in libraries(at_once).items():
            with guarded(at_once, name, "arrays for the calls"):
                by_library[name] = calls(library)
        for title in next(iter(by_library.values()), {}):
            self.row(title, {name: those[title] for name, those in by_library.items()})
        errors = self.errors.setdefault("launchers", {})
        with guarded(errors, "all", "launchers"), without_kernels():
            self.row("launchers", launchers())

    def show(self) -> None:
        titles = [x for x in self.medians if x != "launchers"]
        names = list(dict.fromkeys(name for x in titles for name in self.medians[x]))
        print(f"{'':<30}" + "".join(f"{name:>11}" for name in names))
        for title in titles:
            taken = [self.medians[title].get(name) for name in names]
            cells = ["-" if x is None else f"{x:.1f}" for x in taken]
            print(f"{title:<30}" + "".join(f"{x:>11}" for x in cells))
        print("Python of `quickmerge` on a GPU, by method:")
        for method, taken in self.medians.get("launchers", {}).items():
            print(f"  {method:<28}{taken:>11.1f}")
        for title, errors in self.errors.items():
            for name, error in errors.items():
                print(f"{title}, {name}: {error}")

    def failed(self) -> bool:
        # A library that is installed but does not work is not ours.
        apart = "libraries", BARE.strip()
        return any(e for title, e in self.errors.items() if title not in apart)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--rehearse", action="store_true", help="each call once")
    parser.add_argument("--json", type=Path, help="write the medians here as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": cpu()}
    if cupy_or_reason()[0] is not None:
        report["gpu"] = describe()

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    found = Measurements(1 if options.rehearse else 3 if options.quick else 40, save)
    report |= {"microseconds": found.medians, "errors": found.errors}
    where = ", ".join(str(x) for x in report.get("gpu", {}).values())
    print(f"qm_cupy {qm.__version__}, {cpu()}; microseconds, N, D = (8, 4)")
    if where:
        print(where)
    return complete(found.run, save, found.show, found.failed)


if __name__ == "__main__":
    leave(main())
