"""Figures of benchmarks/results/, as tables of the pages that are being built."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from IPython.display import Markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def report(name: str) -> Any:
    """Return the figures that a benchmark has written."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """Return a table, its columns but the first to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def significant(x: float, digits: int = 3) -> str:
    """Return a number of so many digits, without an exponent."""
    rounded = float(f"{x:.{digits}g}")
    places = digits - 1 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(places, 0)}f}"


def best(cells: list[str], values: list[float], least: bool = True) -> list[str]:
    """Mark the least (or greatest) of the values, by their texts."""
    chosen = cells[values.index(min(values) if least else max(values))]
    return [f"**{cell}**" if cell == chosen else cell for cell in cells]


# Tables of what benchmarks/pipeline.py wrote: a row of `runs` for each size.


def called(run: dict[str, Any]) -> str:
    """Return N, or B × N."""
    tokens = f"{run['num_tokens']:,}"
    return tokens if run["batch"] == 1 else f"{run['batch']} × {tokens}"


def times_of_calls(runs: Sequence[dict[str, Any]]) -> Markdown:
    """Return milliseconds of every contender's call."""
    names = dict.fromkeys(name for run in runs for name in run["contenders"])

    def taken(run: dict[str, Any], name: str) -> str:
        seconds = run["contenders"].get(name, {}).get("seconds")
        return significant(1e3 * seconds) if seconds else "–"

    rows = [[name, *(taken(run, name) for run in runs)] for name in names]
    return table(["N", *map(called, runs)], rows)


def layers_to_break_even(runs: Sequence[dict[str, Any]]) -> Markdown:
    """Return how many layers save what a merge costs, where one saves anything."""

    def layers(run: dict[str, Any], name: str) -> str:
        layer, contender = run["layer"], run["contenders"].get(name)
        saved = layer["unmerged"] - layer["merged"] if layer else 0
        pays = contender and saved > 0.05 * layer["unmerged"]
        return significant(contender["seconds"] / saved, 2) if pays else "–"

    names = "quickmerge", "quickmerge, bipartite", "torch, ToMe's matching"
    rows = [[name, *(layers(run, name) for run in runs)] for name in names]
    return table(["N", *map(called, runs)], rows)


def stage_percentages(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of what each stage takes of `quickmerge`."""
    rows = []
    for stage in runs[0]["stages"]:
        shares = [run["stages"][stage] / sum(run["stages"].values()) for run in runs]
        texts = [f"{100 * x:.0f} %" if x >= 0.005 else "under 1 %" for x in shares]
        rows.append([stage, *texts])
    return rows
