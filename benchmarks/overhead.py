"""What a call costs beside its mathematics: microseconds, by array library, on the CPU.

    python benchmarks/overhead.py [--quick] [--json PATH]

One process, libraries in turn, medians of many short runs. torch and JAX are measured
where they are installed; beside the way out stands each library's own import of a NumPy
array, below which it cannot be.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import qm_cupy as qm
from qm_cupy._arrays import enter

Calls = dict[str, Callable[[], Any]]
RUN = 50  # calls between two looks at the clock


def importers() -> dict[str, Callable[[np.ndarray], Any]]:
    """Return, by library, its own way to take a NumPy array."""
    found: dict[str, Callable[[np.ndarray], Any]] = {"NumPy": np.asarray}
    if find_spec("torch"):
        import torch

        found["torch"] = torch.from_numpy
    if find_spec("jax"):
        import jax.numpy

        found["JAX"] = jax.numpy.asarray
    return found


def calls(give: Callable[[np.ndarray], Any]) -> Calls:
    rng = np.random.default_rng(0)
    inside = rng.standard_normal((8, 4)).astype(np.float32)
    tokens, mask = give(inside), give(np.ones(8, np.bool_))
    labels = give(np.arange(8, dtype=np.int32) % 2)
    leave, *_ = enter(tokens=tokens)
    return {
        "door, one array in": lambda: enter(tokens=tokens),
        "door, two arrays in": lambda: enter(tokens=tokens, mask=mask),
        "door, one array out": lambda: leave(inside),
        "  the library's own import": lambda: give(inside),
        "unmerge_tokens": lambda: qm.unmerge_tokens(tokens, labels),
        "quickmerge": lambda: qm.quickmerge(tokens, 2),
    }


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
    by_library = {name: calls(give) for name, give in importers().items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}; microseconds, N, D = (8, 4)")
    print(f"{'':<30}" + "".join(f"{name:>10}" for name in by_library))
    report: dict[str, dict[str, float]] = {}
    for title in next(iter(by_library.values())):
        contenders = {name: those[title] for name, those in by_library.items()}
        report[title.strip()] = measure(contenders, 3 if options.quick else 40)
        row = "".join(f"{x:>10.1f}" for x in report[title.strip()].values())
        print(f"{title:<30}{row}")
    if options.json:
        partial = options.json.with_suffix(".part")
        partial.write_text(
            json.dumps({"machine": machine, "microseconds": report}, indent=2)
        )
        partial.replace(options.json)


if __name__ == "__main__":
    main()
