"""The table of instructions: every counted kernel, its model and its floor.

`resources.py --counts` prints the table and writes it to results/instructions.json.
tests/test_instruction_counts.py compares that file with the current kernels.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import model
import nvrtc
from card_device import facts_of
from guard import guarded, say
from launches import H200, Launch, Operation, launches_of
from roofline import floor_of

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = RESULTS / "instructions.json"
GROWTH = 1.1  # a part may have this many times the instructions of the table

Report = dict[str, Any]


def measured() -> Report:
    """Return the report of kernels.py from an H200."""
    path = RESULTS / "h200" / "kernels.json"
    results: Report = json.loads(path.read_text(encoding="utf-8"))
    return results


def count_all(
    report: Report,
    operations: Iterable[Operation],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Add the operations, their kernels, and the errors of operations that fail."""
    # Counts depend on the release of NVRTC; the test's message names both releases.
    report["nvrtc"] = nvrtc.version()
    figures = measured()
    for operation in operations:
        say(operation.title)
        with guarded(report["errors"], operation.title):
            report["operations"].append(_row(operation, figures, report["kernels"]))
        save()


def compile_ahead(kernels: Iterable[str]) -> None:
    """Disassemble the files of kernels in threads, so that `count_all` reuses them.

    A file that does not compile is skipped here and is an error in `count_all`.
    """
    # A name is "folder/file/kernel dtype"; the kernels of a file are one job.
    jobs = {(name.rsplit("/", 1)[0], name.rsplit(" ", 1)[1]) for name in kernels}

    def run(job: tuple[str, str]) -> None:
        with suppress(Exception):
            model.text_of(*job)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC releases the lock
        list(pool.map(run, jobs))


def new_report() -> Report:
    return {"nvrtc": "", "kernels": {}, "operations": [], "errors": {}}


def _row(operation: Operation, figures: Report, kernels: Report) -> Report:
    """Return an operation's floor, its launches, and the predicted milliseconds."""
    ceilings = figures["ceilings"]
    if operation.fp32:
        # float32 products run on FP32 units; the measured rate is of tensor cores.
        ceilings = ceilings | {"flops": model.FP32_FLOPS}
    floor = floor_of(operation.title, operation.work, ceilings)
    # Titles here are titles of kernels.py, except those that it does not measure.
    times = {row["title"]: row["ms"].get("optimized") for row in figures["rows"]}
    rows = [_launch_row(launch, kernels) for launch in launches_of(operation)]
    predicted = [row["predicted_ms"] for row in rows]
    # Launches run one after another, so their times add up. No prediction is below the
    # floor.
    total = None if None in predicted else max(sum(predicted), floor["floor_ms"])
    return {
        "title": operation.title,
        "launches": rows,
        "floor_ms": _short(floor["floor_ms"]),
        "floor_bound": floor["bound"],
        "predicted_ms": _short(total) if total else None,
        "measured_ms": times.get(operation.title),
    }


def _launch_row(launch: Launch, kernels: Report) -> Report:
    """Return the predicted times of a launch, and add its kernel to `kernels`."""
    spec = model.model_of(launch)
    function = model.function_of(launch.file, launch.kernel, launch.dtype)
    parts = model.parts_of(launch, spec, function)
    name = f"{launch.name} {launch.dtype}"
    facts = facts_of(launch.file, launch.dtype, H200.arch)[launch.kernel]
    kernels[name] = {
        "registers": facts.registers,
        "shared_bytes": facts.shared + launch.shared,  # static and dynamic
        "blocks_per_sm": model.resident(launch),
        "code": function.code.instructions,  # of the whole kernel
        "parts": {
            part: {
                "instructions": x.path.instructions,
                "units": x.path.units,
                **({"scores": x.scores} if x.scores else {}),
            }
            for part, x in parts.items()
        },
    }
    row = {"kernel": name, "blocks": launch.blocks, "threads": launch.threads}
    # A time that depends on the data has no prediction: JSON gets null.
    if not spec.predicted:
        return row | {"ms": {}, "bound": None, "predicted_ms": None}
    # The slowest resource determines the least time of the launch.
    seconds = model.bounds(launch, spec, parts)
    bound = max(seconds, key=lambda x: seconds[x])
    return row | {
        "times": {part: _short(x.times) for part, x in parts.items()},
        "ms": {x: _short(1e3 * t) for x, t in seconds.items() if t},
        "bound": bound,
        "predicted_ms": _short(1e3 * (seconds[bound] + model.LAUNCH_SECONDS)),
    }


def _short(x: float) -> float:
    """Return a number rounded to four significant digits, for the JSON."""
    return float(f"{x:.4g}")


def differences(table: Report, now: Report) -> list[str]:
    """Return the problems: parts that grew, kernels that are missing, and errors."""
    problems = [f"{title}: {error}" for title, error in now["errors"].items()]
    problems += [
        f"{name}: is launched now, but is not in the table"
        for name in now["kernels"].keys() - table["kernels"].keys()
    ]
    for name, before in table["kernels"].items():
        if name not in now["kernels"]:
            problems.append(f"{name}: is in the table, but is not launched any more")
            continue
        problems += _growth(name, before, now["kernels"][name])
    return problems


def _growth(name: str, before: Report, now: Report) -> list[str]:
    """Return a line for each part of a kernel that grew, appeared or disappeared."""
    problems = []
    for part in sorted(before["parts"].keys() | now["parts"].keys()):
        if part not in before["parts"] or part not in now["parts"]:
            there = "table" if part in before["parts"] else "kernel"
            problems.append(f"{name}, {part}: only in the {there}")
            continue
        # A part that became shorter is not a problem.
        old, new = before["parts"][part], now["parts"][part]
        if new["instructions"] > GROWTH * old["instructions"]:
            # Name only the units whose counts differ.
            units = ", ".join(
                f"{unit} {old['units'].get(unit, 0)} to {new['units'].get(unit, 0)}"
                for unit in dict.fromkeys([*old["units"], *new["units"]])
                if old["units"].get(unit) != new["units"].get(unit)
            )
            counts = f"{old['instructions']} instructions, now {new['instructions']}"
            problems.append(f"{name}, {part}: {counts} ({units})")
    return problems


def show(report: Report) -> None:
    """Print the counts of the kernels, then the times of the operations.

    The column "ratio" is floor / model.
    """
    for name, kernel in report["kernels"].items():
        print(
            f"\n{name}: {kernel['registers']} registers, {kernel['shared_bytes']} B "
            f"shared, {kernel['blocks_per_sm']} blocks per SM, {kernel['code']} "
            "instructions of code"
        )
        for part, x in kernel["parts"].items():
            score = x["instructions"] / x["scores"] if x.get("scores") else 0
            per_score = f", {score:.1f} per score" if score else ""
            units = ", ".join(f"{unit} {count}" for unit, count in x["units"].items())
            print(f"    {part}: {x['instructions']} instructions{per_score}: {units}")
    print(
        f"\n{'ms on an H200':<48}{'floor':>9}{'model':>9}{'ratio':>7}{'measured':>10}"
    )
    for row in report["operations"]:
        predicted, taken = row["predicted_ms"], row["measured_ms"]
        ratio = f"{row['floor_ms'] / predicted:.0%}" if predicted else "-"
        cells = f"{predicted:>9.4f}" if predicted else f"{'-':>9}"
        cells += f"{ratio:>7}" + (f"{taken:>10.4f}" if taken else f"{'-':>10}")
        print(f"{row['title']:<48}{row['floor_ms']:>9.4f}{cells}")
        for x in row["launches"]:
            ms = f"{x['predicted_ms']:.4f}" if x["predicted_ms"] else "not predicted"
            print(f"    {x['kernel']}: {ms}, {x['bound'] or 'depends on the data'}")
    for title, error in report["errors"].items():
        print(f"    {title}: {error}")
