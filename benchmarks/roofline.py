"""Floors: how fast the operations of workload.py could be at most, and their picture.

`kernels.py` measures the ceilings of the GPU it runs on; `unmeasured` takes the floors
from assumed ones, which needs no GPU.
"""

import re
from typing import Any

import numpy as np
from workload import Work, operations

# One H200: its memory, its tensor cores in bfloat16 and its exp units, with nothing for
# a launch. Assumed, not measured.
ASSUMED = {"bytes": 4.3e12, "flops": 790e12, "exps": 4.2e12, "launch_s": 0.0}
RESOURCES = {  # marker and colour of each floor
    "bytes": ("o", "#0072b2"),
    "flops": ("s", "#d55e00"),
    "exps": ("^", "#009e73"),
    "launch": ("|", "#000000"),
}
CONTENDERS = {  # of what is measured
    "basic": ("x", "#777777"),
    "optimized": ("D", "#000000"),
    "torch": ("+", "#cc79a7"),
    "torch.compile": ("*", "#e69f00"),
}

Report = dict[str, Any]


def floors(work: Work, ceilings: dict[str, float]) -> dict[str, float]:
    """Return the least seconds by each ceiling; all flops at the tensor cores' rate."""
    seconds = {name: x / ceilings[name] for name, x in work._asdict().items()}
    return seconds | {"launch": ceilings["launch_s"]}


def floor_of(title: str, work: Work, ceilings: dict[str, float]) -> Report:
    """Return a row of the report: the work and the floor, without a measurement."""
    seconds = floors(work, ceilings)
    bound = max(seconds, key=lambda name: seconds[name])
    floor = {"bound": bound, "floor_ms": 1e3 * seconds[bound]}
    return {"title": title, "work": work._asdict(), **floor}


def unmeasured() -> Report:
    """Return what `kernels.py` would report of an assumed GPU, without times."""
    rows = [
        {"size": x.size, **floor_of(x.title, x.count(*x.sizes), ASSUMED)}
        for x in operations("all")
    ]
    machine = {"GPU": "an H200, assumed"}
    return {"machine": machine, "ceilings": ASSUMED, "rows": rows}


def largest(report: Report) -> list[Report]:
    """Return the rows of the last size, or of that with most rows in a run cut short.

    Their titles are without it.
    """
    sizes = [row["size"] for row in report["rows"]]
    size = max(reversed(sizes), key=sizes.count, default="")
    rows = [row for row in report["rows"] if row["size"] == size]
    return [row | {"title": re.sub(r"\b[A-Z]=\d+ ", "", row["title"])} for row in rows]


def draw(report: Report) -> Any:
    """Draw the roofline and each operation's floors, and what is measured beside them.

    Of the largest size; returns the figure. A title's number is its place on the left,
    where an operation without flops has none.
    """
    from matplotlib import pyplot as plt

    ceilings, rows = report["ceilings"], largest(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    _draw_roof(left, rows, ceilings)
    _draw_floors(right, rows, ceilings)
    handles, labels = right.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique, loc="outside lower right", ncols=len(RESOURCES) + 1
    )
    figure.suptitle(report["machine"]["GPU"])
    return figure


def _draw_roof(axis: Any, rows: list[Report], ceilings: dict[str, float]) -> None:
    """Draw flops a second over flops a byte: hollow at the floor, full as measured."""
    x = np.geomspace(0.3, 1e4, 200)
    roof = np.minimum(x * ceilings["bytes"], ceilings["flops"])
    axis.plot(x, roof, color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", title="roofline")
    axis.set(xlabel="flops a byte", ylabel="flops a second")
    axis.grid(alpha=0.3)
    near: dict[tuple[float, float], list[str]] = {}  # numbers that share a label
    for number, row in enumerate(rows, 1):
        flops, ms = row["work"]["flops"], row.get("ms", {})
        if not flops:
            continue
        point = flops / row["work"]["bytes"], 1e3 * flops / row["floor_ms"]
        marker, colour = RESOURCES[row["bound"]]
        style = {"marker": marker, "color": colour, "linestyle": "none"}
        axis.plot(*point, **style, markerfacecolor="white", markersize=8)
        for name, (marker, colour) in CONTENDERS.items():
            if name in ms:
                reached = 1e3 * flops / ms[name]
                axis.plot(point[0], reached, marker=marker, color=colour)
        alike = (p for p in near if abs(np.log(np.divide(p, point))).max() < 0.3)
        near.setdefault(next(alike, point), []).append(str(number))
    axis.set_ylim(top=3 * ceilings["flops"])  # room for the numbers
    for (intensity, reached), numbers in near.items():
        slope, flat = intensity * ceilings["bytes"], ceilings["flops"]
        if reached < 0.9 * min(slope, flat):
            offset, align = (8, -4), "left"
        else:
            offset, align = (0, 7), "center" if flat < slope else "right"
        axis.annotate(
            ", ".join(numbers),
            (intensity, reached),
            offset,
            textcoords="offset points",
            ha=align,
        )


def _draw_floors(axis: Any, rows: list[Report], ceilings: dict[str, float]) -> None:
    """Draw milliseconds by each ceiling, the largest of which is the floor."""
    for place, row in enumerate(rows):
        axis.barh(place, row["floor_ms"], color="#dddddd", label="floor")
        seconds = floors(Work(**row["work"]), ceilings)
        times = {name: 1e3 * x for name, x in seconds.items() if x}
        for name, ms in (times | row.get("ms", {})).items():
            if style := (RESOURCES | CONTENDERS).get(name):
                marker, colour = style
                line = {"marker": marker, "color": colour, "linestyle": "none"}
                axis.plot(ms, place, **line, label=name)
    titles = [f"{row['title']}  {number}" for number, row in enumerate(rows, 1)]
    axis.set_yticks(range(len(rows)), titles)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="ms", title="milliseconds at least, by each ceiling")
    axis.grid(axis="x", alpha=0.3)
