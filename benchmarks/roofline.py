"""Floors, the least times of the operations of workload.py, and their plot.

An operation must move its bytes, and compute its products and its exponentials. Each of
these takes at least its amount divided by the GPU's rate (the ceiling), and a launch
takes a constant time. The largest of these times is the floor.

`kernels.py` measures the ceilings of the GPU it runs on. `unmeasured` computes the
floors from assumed ceilings, and needs no GPU.
"""

import re
from typing import Any

import numpy as np
from workload import Work, operations

# One H200, per second: bytes of its memory, flops of its tensor cores in bfloat16, and
# exponentials. A launch takes no time. These values are assumed, not measured.
ASSUMED = {"bytes": 4.3e12, "flops": 790e12, "exps": 4.2e12, "launch_s": 0.0}
RESOURCES = {  # marker and colour of each floor
    "bytes": ("o", "#0072b2"),
    "flops": ("s", "#d55e00"),
    "exps": ("^", "#009e73"),
    "launch": ("|", "#000000"),
}
CONTENDERS = {  # marker and colour of each measured time
    "basic": ("x", "#777777"),
    "optimized": ("D", "#000000"),
    "torch": ("+", "#cc79a7"),
    "torch.compile": ("*", "#e69f00"),
}

Report = dict[str, Any]


def floors(work: Work, ceilings: dict[str, float]) -> dict[str, float]:
    """Return the least seconds by each ceiling; flops count at tensor-core rate."""
    seconds = {name: x / ceilings[name] for name, x in work._asdict().items()}
    return seconds | {"launch": ceilings["launch_s"]}


def floor_of(title: str, work: Work, ceilings: dict[str, float]) -> Report:
    """Return a row of the report: the work and the floor, without measured times."""
    seconds = floors(work, ceilings)
    bound = max(seconds, key=lambda name: seconds[name])
    floor = {"bound": bound, "floor_ms": 1e3 * seconds[bound]}
    return {"title": title, "work": work._asdict(), **floor}


def unmeasured() -> Report:
    """Return the report of `kernels.py` for an assumed GPU, without measured times."""
    rows = [
        {"size": x.size, **floor_of(x.title, x.count(*x.sizes), ASSUMED)}
        for x in operations("all")
    ]
    machine = {"GPU": "an H200, assumed"}
    return {"machine": machine, "ceilings": ASSUMED, "rows": rows}


def largest(report: Report) -> list[Report]:
    """Return the rows of the largest size, with titles that omit the size.

    In a run that was cut short, that size may have few rows. Then the result is the
    rows of the size that has most.
    """
    # Sizes run from small to large: reversed, `max` takes the largest among equals.
    sizes = [row["size"] for row in report["rows"]]
    size = max(reversed(sizes), key=sizes.count, default="")
    rows = [row for row in report["rows"] if row["size"] == size]
    return [row | {"title": re.sub(r"\b[A-Z]=\d+ ", "", row["title"])} for row in rows]


def draw(report: Report) -> Any:
    """Draw the roofline, and the floors and measured times of the largest size.

    Returns the figure. The number after a title on the right marks the operation on the
    left. Operations without flops are not on the left.
    """
    from matplotlib import pyplot as plt

    ceilings, rows = report["ceilings"], largest(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    _draw_roof(left, rows, ceilings)
    _draw_floors(right, rows, ceilings)
    # Each operation adds the same labels; the legend shows each of them once.
    handles, labels = right.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique, loc="outside lower right", ncols=len(RESOURCES) + 1
    )
    figure.suptitle(report["machine"]["GPU"])
    return figure


def _draw_roof(axis: Any, rows: list[Report], ceilings: dict[str, float]) -> None:
    """Draw flops per second over flops per byte: floors hollow, measurements filled."""
    # The roof is the least of memory (intensity * bytes per second) and tensor cores.
    x = np.geomspace(0.3, 1e4, 200)
    roof = np.minimum(x * ceilings["bytes"], ceilings["flops"])
    axis.plot(x, roof, color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", title="roofline")
    axis.set(xlabel="flops per byte", ylabel="flops per second")
    axis.grid(alpha=0.3)
    near: dict[tuple[float, float], list[str]] = {}  # numbers in one label, by point
    for number, row in enumerate(rows, 1):
        flops, ms = row["work"]["flops"], row.get("ms", {})
        if not flops:
            continue
        # x: flops per byte; y: flops per second that the floor allows.
        point = flops / row["work"]["bytes"], 1e3 * flops / row["floor_ms"]
        marker, colour = RESOURCES[row["bound"]]
        style = {"marker": marker, "color": colour, "linestyle": "none"}
        axis.plot(*point, **style, markerfacecolor="white", markersize=8)
        for name, (marker, colour) in CONTENDERS.items():
            if name in ms:
                reached = 1e3 * flops / ms[name]
                axis.plot(point[0], reached, marker=marker, color=colour)
        # Points closer than a factor of e^0.3 on both axes get one label.
        alike = (p for p in near if abs(np.log(np.divide(p, point))).max() < 0.3)
        near.setdefault(next(alike, point), []).append(str(number))
    axis.set_ylim(top=3 * ceilings["flops"])  # room for the numbers
    for (intensity, reached), numbers in near.items():
        slope, flat = intensity * ceilings["bytes"], ceilings["flops"]
        # The label stands right of a point below the roof, and above a point on it.
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
    """Draw the milliseconds by each ceiling; the floor, the largest, is a bar."""
    for position, row in enumerate(rows):
        axis.barh(position, row["floor_ms"], color="#dddddd", label="floor")
        seconds = floors(Work(**row["work"]), ceilings)
        times = {name: 1e3 * x for name, x in seconds.items() if x}
        for name, ms in (times | row.get("ms", {})).items():
            if style := (RESOURCES | CONTENDERS).get(name):
                marker, colour = style
                line = {"marker": marker, "color": colour, "linestyle": "none"}
                axis.plot(ms, position, **line, label=name)
    titles = [f"{row['title']}  {number}" for number, row in enumerate(rows, 1)]
    axis.set_yticks(range(len(rows)), titles)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="ms", title="least milliseconds by each ceiling")
    axis.grid(axis="x", alpha=0.3)
