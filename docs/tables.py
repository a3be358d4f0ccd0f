"""Tables of the figures in benchmarks/results/, for the pages in docs/."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from IPython.display import Markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def report(name: str) -> Any:
    """Return the figures that a benchmark has written to its JSON file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """Return a Markdown table; all columns except the first are right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def significant(x: float, digits: int = 3) -> str:
    """Return a number rounded to `digits` significant digits, without an exponent."""
    rounded = float(f"{x:.{digits}g}")
    # Decimals follow from the rounded number: 9.996 becomes 10.0, and not 10.00.
    decimals = digits - 1 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(decimals, 0)}f}"


def best(cells: list[str], values: list[float], least: bool = True) -> list[str]:
    """Print the smallest (or largest) value in bold."""
    selected = cells[values.index(min(values) if least else max(values))]
    # Compares the texts: values that look equal in the table are all bold.
    return [f"**{cell}**" if cell == selected else cell for cell in cells]


# Tables of benchmarks/pipeline.py. `runs` has an entry for each (B, N).


def called(run: dict[str, Any]) -> str:
    """Return the title of a column: N for one sequence, or B × N for a batch."""
    tokens = f"{run['num_tokens']:,}"
    return tokens if run["batch"] == 1 else f"{run['batch']} × {tokens}"


def times_of_calls(runs: Sequence[dict[str, Any]]) -> Markdown:
    """Return the milliseconds of a call of every contender, for each size."""
    # Large sizes leave slow contenders out, so the names come from all runs.
    names = dict.fromkeys(name for run in runs for name in run["contenders"])

    def milliseconds(run: dict[str, Any], name: str) -> str:
        seconds = run["contenders"].get(name, {}).get("seconds")
        return significant(1e3 * seconds) if seconds else "–"

    rows = [[name, *(milliseconds(run, name) for run in runs)] for name in names]
    return table(["N", *map(called, runs)], rows)


def layers_to_break_even(runs: Sequence[dict[str, Any]]) -> Markdown:
    """Return after how many layers a merge has saved the time that it costs."""

    def layers(run: dict[str, Any], name: str) -> str:
        layer, contender = run["layer"], run["contenders"].get(name)
        # Seconds that one layer saves. Less than 5 % of its time is not measurable.
        saved = layer["unmerged"] - layer["merged"] if layer else 0
        pays = contender and saved > 0.05 * layer["unmerged"]
        return significant(contender["seconds"] / saved, 2) if pays else "–"

    names = "quickmerge", "quickmerge, bipartite", "torch, ToMe's matching"
    rows = [[name, *(layers(run, name) for run in runs)] for name in names]
    return table(["N", *map(called, runs)], rows)


def stage_percentages(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return rows with the time of each stage, in percent of the sum of these times."""
    rows = []
    for stage in runs[0]["stages"]:
        fractions = [run["stages"][stage] / sum(run["stages"].values()) for run in runs]
        # Below 0.005 a fraction would be printed as 0 %.
        texts = [f"{100 * x:.0f} %" if x >= 0.005 else "under 1 %" for x in fractions]
        rows.append([stage, *texts])
    return rows
