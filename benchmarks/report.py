"""What the benchmarks share: medians of contenders in turn, figures to a file."""

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
    """Return the median seconds of each contender, run in turn, without a warm-up.

    With `errors`, one that fails is an entry there and no longer in the result; without
    it, the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            if errors is not None and name in errors:
                continue
            with nullcontext() if errors is None else guarded(errors, name, during):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    failed = errors or {}
    return {
        name: statistics.median(taken)
        for name, taken in times.items()
        if taken and name not in failed
    }


def write_json(path: Path, report: Any) -> None:
    """Write a report at once, or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(report, indent=2).encode())
