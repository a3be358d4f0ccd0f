"""The table of instructions: every counted kernel, its model and its floor.

`resources.py --counts` prints it and writes it to results/instructions.json, which
tests/test_instruction_counts.py compares with the kernels of the day.
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
GROWTH = 1.1  # how much longer a part may be than in the table

Report = dict[str, Any]


def measured() -> Report:
    """Return what kernels.py measured on an H200."""
    path = RESULTS / "h200" / "kernels.json"
    found: Report = json.loads(path.read_text(encoding="utf-8"))
    return found


def count_all(
    report: Report,
    operations: Iterable[Operation],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Add the kernels, the operations, and the errors of those that fail."""
    report["nvrtc"] = nvrtc.version()
    figures = measured()
    for operation in operations:
        say(operation.title)
        with guarded(report["errors"], operation.title):
            report["operations"].append(_row(operation, figures, report["kernels"]))
        save()


def compile_ahead(kernels: Iterable[str]) -> None:
    """Disassemble the files of kernels in threads, so that `count_all` finds them kept.

    What does not compile is an error there.
    """
    jobs = {(name.rsplit("/", 1)[0], name.rsplit(" ", 1)[1]) for name in kernels}

    def run(job: tuple[str, str]) -> None:
        with suppress(Exception):
            model.text_of(*job)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC releases the lock
        list(pool.map(run, jobs))


def new_report() -> Report:
    return {"nvrtc": "", "kernels": {}, "operations": [], "errors": {}}


def _row(operation: Operation, figures: Report, kernels: Report) -> Report:
    ceilings = figures["ceilings"]
    if operation.fp32:
        ceilings = ceilings | {"flops": model.FP32_FLOPS}
    floor = floor_of(operation.title, operation.work, ceilings)
    times = {row["title"]: row["ms"].get("optimized") for row in figures["rows"]}
    rows = [_launch_row(launch, kernels) for launch in launches_of(operation)]
    each = [row["predicted_ms"] for row in rows]
    total = None if None in each else max(sum(each), floor["floor_ms"])
    return {
        "title": operation.title,
        "launches": rows,
        "floor_ms": _short(floor["floor_ms"]),
        "floor_bound": floor["bound"],
        "predicted_ms": _short(total) if total else None,
        "measured_ms": times.get(operation.title),
    }


def _launch_row(launch: Launch, kernels: Report) -> Report:
    """Return a launch's times, and add its kernel to `kernels`."""
    spec = model.model_of(launch)
    function = model.function_of(launch.file, launch.kernel, launch.dtype)
    parts = model.parts_of(launch, spec, function)
    name = f"{launch.name} {launch.dtype}"
    facts = facts_of(launch.file, launch.dtype, H200.arch)[launch.kernel]
    kernels[name] = {
        "registers": facts.registers,
        "shared_bytes": facts.shared + launch.shared,
        "blocks_per_sm": model.resident(launch),
        "code": function.code.instructions,
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
    if not spec.predicted:
        return row | {"ms": {}, "bound": None, "predicted_ms": None}
    seconds = model.bounds(launch, spec, parts)
    bound = max(seconds, key=lambda x: seconds[x])
    return row | {
        "times": {part: _short(x.times) for part, x in parts.items()},
        "ms": {x: _short(1e3 * t) for x, t in seconds.items() if t},
        "bound": bound,
        "predicted_ms": _short(1e3 * (seconds[bound] + model.LAUNCH_SECONDS)),
    }


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def differences(table: Report, now: Report) -> list[str]:
    """Return what a test should refuse: parts that grew, kernels that are missing."""
    found = [f"{title}: {error}" for title, error in now["errors"].items()]
    found += [
        f"{name}: is launched now and not in the table"
        for name in now["kernels"].keys() - table["kernels"].keys()
    ]
    for name, before in table["kernels"].items():
        if name not in now["kernels"]:
            found.append(f"{name}: is in the table and not launched any more")
            continue
        found += _growth(name, before, now["kernels"][name])
    return found


def _growth(name: str, before: Report, now: Report) -> list[str]:
    found = []
    for part in sorted(before["parts"].keys() | now["parts"].keys()):
        if part not in before["parts"] or part not in now["parts"]:
            there = "table" if part in before["parts"] else "kernel"
            found.append(f"{name}, {part}: only in the {there}")
            continue
        old, new = before["parts"][part], now["parts"][part]
        if new["instructions"] > GROWTH * old["instructions"]:
            units = ", ".join(
                f"{unit} {old['units'].get(unit, 0)} to {new['units'].get(unit, 0)}"
                for unit in dict.fromkeys([*old["units"], *new["units"]])
                if old["units"].get(unit) != new["units"].get(unit)
            )
            counts = f"{old['instructions']} instructions, now {new['instructions']}"
            found.append(f"{name}, {part}: {counts} ({units})")
    return found


def show(report: Report) -> None:
    """Print the kernels' counts, then the operations' times."""
    for name, kernel in report["kernels"].items():
        print(
            f"\n{name}: {kernel['registers']} registers, {kernel['shared_bytes']} B "
            f"shared, {kernel['blocks_per_sm']} blocks an SM, {kernel['code']} "
            "instructions of code"
        )
        for part, x in kernel["parts"].items():
            score = x["instructions"] / x["scores"] if x.get("scores") else 0
            each = f", {score:.1f} a score" if score else ""
            units = ", ".join(f"{unit} {count}" for unit, count in x["units"].items())
            print(f"    {part}: {x['instructions']} instructions{each}: {units}")
    print(
        f"\n{'ms on an H200':<48}{'floor':>9}{'model':>9}{'share':>7}{'measured':>10}"
    )
    for row in report["operations"]:
        predicted, taken = row["predicted_ms"], row["measured_ms"]
        share = f"{row['floor_ms'] / predicted:.0%}" if predicted else "-"
        cells = f"{predicted:>9.4f}" if predicted else f"{'-':>9}"
        cells += f"{share:>7}" + (f"{taken:>10.4f}" if taken else f"{'-':>10}")
        print(f"{row['title']:<48}{row['floor_ms']:>9.4f}{cells}")
        for x in row["launches"]:
            ms = f"{x['predicted_ms']:.4f}" if x["predicted_ms"] else "not predicted"
            print(f"    {x['kernel']}: {ms}, {x['bound'] or 'depends on the data'}")
    for title, error in report["errors"].items():
        print(f"    {title}: {error}")
