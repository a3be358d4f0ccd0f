"""What the benchmarks share: medians of contenders in turn, figures to a file."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qm_cupy._replacing import replacing


def median_seconds(
    contenders: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Return the median seconds of each contender, run in turn, without a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def write_json(path: Path, report: Any) -> None:
    """Write a report at once, or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(report, indent=2).encode())
