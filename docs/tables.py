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
