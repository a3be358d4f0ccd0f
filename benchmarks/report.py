"""Functions that several benchmarks use: medians of contenders, and JSON files."""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from guard import guarded

from qm_cupy.atomic_write import atomic_write


def median_seconds(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    errors: dict[str, str] | None = None,
    during: str = "",
) -> dict[str, float]:
    """Return the median seconds of each contender, without a warm-up.

    If `errors` is given, a contender that fails becomes an entry there and is not in
    the result. Otherwise its error is raised.
    """
    # Contenders take turns, so that a slow phase of the machine affects all of them.
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            if errors is not None and name in errors:
                continue
            # With `errors`, a failure ends this contender and not the run.
            with nullcontext() if errors is None else guarded(errors, name, during):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    # A contender that failed in a later round has no median, although it has times.
    failed = errors or {}
    return {
        name: statistics.median(taken)
        for name, taken in times.items()
        if taken and name not in failed
    }


def write_json(path: Path, report: Any) -> None:
    """Write a report to a file, completely or not at all."""
    # An interrupt during the write leaves the file of the last complete write.
    with atomic_write(path) as file:
        file.write(json.dumps(report, indent=2).encode())
