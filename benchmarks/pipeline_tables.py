"""Tables and figures from the report of benchmarks/pipeline.py."""

from pathlib import Path
from typing import Any

import numpy as np

RATIO = 4  # N / K
GROWTH_FROM = 500  # tokens; calls with fewer tokens are mostly overhead

Report = dict[str, Any]


def growth(rows: list[Report], name: str) -> float | None:
    """Return the p of time growth like N ** p for one sequence, if it is known."""
    points = [
        (row["num_tokens"], row["contenders"][name]["seconds"])
        for row in rows
        if row["batch"] == 1
        and row["num_tokens"] > GROWTH_FROM
        and name in row["contenders"]
    ]
    if len(points) < 2:
        return None
    # p is the slope of log(seconds) over log(N), by least squares.
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def layers_to_break_even(row: Report, name: str) -> float:
    """Return how many layers after the merge save as much time as merging takes."""
    saved = row["layer"]["unmerged"] - row["layer"]["merged"]
    merging: float = row["contenders"][name]["seconds"]
    return merging / saved if saved > 0 else np.inf


def break_even(rows: list[Report], name: str, layers: int) -> tuple[float, str]:
    """Return the N from which merging pays off for one sequence, and a text for it.

    Between two measured N, the result is interpolated linearly in log(N) and in the
    logarithm of the layers to break even.
    """
    ours = [r for r in rows if r["batch"] == 1 and name in r["contenders"]]
    # Layers that must follow the merge, by N.
    needed = np.array([layers_to_break_even(row, name) for row in ours])
    if not ours:
        return np.inf, "not measured"
    sizes = np.array([row["num_tokens"] for row in ours])
    # Merging pays off where it needs at most the layers that the model has left.
    losing = np.flatnonzero(needed > layers)
    if len(losing) == 0:  # it pays off at every size
        return float(sizes[0]), f"at every N from {sizes[0]}"
    last = losing[-1]  # the crossing is between this size and the next
    if last == len(sizes) - 1:  # it does not pay off at the largest size
        return np.inf, f"not at N = {sizes[-1]}"
    if not np.isfinite(needed[last]):  # a layer saved no time: nothing to interpolate
        return float(sizes[last + 1]), f"from N = {sizes[last + 1]}"
    # The logarithm of needed / layers is positive before the crossing, 0 at it.
    ratios = np.log(needed[last : last + 2] / layers)
    part = ratios[0] / (ratios[0] - ratios[1])
    between = np.log(sizes[last : last + 2])
    crossing = float(np.exp(between[0] + part * (between[1] - between[0])))
    return crossing, f"from N = {crossing:.0f}"


def staged(rows: list[Report]) -> list[Report]:
    """Return the rows in which every stage was measured."""
    num_stages = max((len(row.get("stages", {})) for row in rows), default=0)
    return [
        row for row in rows if num_stages and len(row.get("stages", {})) == num_stages
    ]


def layered(rows: list[Report]) -> list[Report]:
    """Return the rows in which the layer was measured for N and for N / 4 tokens."""
    return [row for row in rows if len(row.get("layer") or {}) == 2]


def column_titles(rows: list[Report]) -> str:
    """Return a heading "B x N" for each row of the report."""
    sizes = [f"{row['batch']} x {row['num_tokens']}" for row in rows]
    return "".join(f"{size:>12}" for size in sizes)


def print_calls(rows: list[Report], names: list[str]) -> None:
    """Print time, launches and memory of each contender, then the stages."""
    heads = column_titles(rows)
    for title, field, scale in (
        ("milliseconds per call", "seconds", 1e3),
        ("kernel launches per call", "launches", 1),
        ("peak MB above the input", "peak_bytes", 1e-6),
    ):
        cells = {name: [r["contenders"].get(name) for r in rows] for name in names}
        # Launches and memory are not known on every machine.
        if not any(c and c[field] is not None for row in cells.values() for c in row):
            continue
        print(f"\n{title + ', B x N':<40}{heads}" + "   growth" * (scale == 1e3))
        for name, row in cells.items():
            values = [c[field] if c else None for c in row]
            texts = ["-" if x is None else f"{scale * x:.4g}" for x in values]
            exponent = growth(rows, name) if scale == 1e3 else None
            last = f"   N^{exponent:.2f}" if exponent else ""
            print(f"{name:<40}" + "".join(f"{t:>12}" for t in texts) + last)
    rows = staged(rows)
    print(f"\n{'time by stage of the paper':<40}{column_titles(rows)}")
    for stage in rows[0]["stages"] if rows else ():
        fractions = [r["stages"][stage] / sum(r["stages"].values()) for r in rows]
        print(f"{stage:<40}" + "".join(f"{s:>12.0%}" for s in fractions))


def print_errors(rows: list[Report]) -> None:
    """Print a line for each error."""
    for row in rows:
        for name, error in row.get("errors", {}).items():
            print(f"{row['batch']} x {row['num_tokens']}, {name}: {error}")


def print_break_even(rows: list[Report], names: list[str], layers: int) -> Report:
    """Print the time of a layer and the layers to break even.

    Returns the N from which merging pays off by contender, or None if it does not.
    """
    rows = layered(rows)
    heads = column_titles(rows)
    print(f"\n{'milliseconds per layer, B x N':<40}{heads}")
    for which, title in (
        ("unmerged", "N tokens"),
        ("merged", f"N / {RATIO} tokens"),
    ):
        print(
            f"{title:<40}" + "".join(f"{1e3 * r['layer'][which]:>12.4g}" for r in rows)
        )
    print(f"\n{'layers to break even':<40}{heads}   with {layers} layers it pays off")
    sizes: Report = {}
    for name in names:
        needed = [
            f"{layers_to_break_even(r, name):.3g}" if name in r["contenders"] else "-"
            for r in rows
        ]
        sizes[name], summary = break_even(rows, name, layers)
        print(f"{name:<40}" + "".join(f"{t:>12}" for t in needed) + f"   {summary}")
    # JSON has no infinity.
    return {n: x if np.isfinite(x) else None for n, x in sizes.items()}


def plot(report: Report, path: Path) -> None:
    """Draw the time, the layers to break even and the percentage of each stage by N."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # Curves over N are of one sequence.
    rows = [row for row in report["rows"] if row["batch"] == 1]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for n, (name, marker) in enumerate(zip(report["growth"], "osDd^v", strict=False)):
        here = [row for row in rows if name in row["contenders"]]
        sizes = [row["num_tokens"] for row in here]
        style = {"marker": marker, "label": name, "color": f"C{n}"}
        taken = [1e3 * row["contenders"][name]["seconds"] for row in here]
        axes[0].plot(sizes, taken, **style)
        there = layered(here)
        needed = [layers_to_break_even(row, name) for row in there]
        axes[1].plot([row["num_tokens"] for row in there], needed, **style)
    axes[0].set(title="milliseconds per call", yscale="log")
    axes[1].set(title="layers after the merge to break even", yscale="log")
    for axis in axes[:2]:
        axis.set(xscale="log", xlabel="tokens N")
        # Ticks at the sizes that were measured, and no others.
        axis.set_xticks([row["num_tokens"] for row in rows])
        axis.set_xticklabels([str(row["num_tokens"]) for row in rows])
        axis.minorticks_off()
    rows = staged(rows)
    below = np.zeros(len(rows))  # top of the bars so far
    names = [str(row["num_tokens"]) for row in rows]
    for stage, (hatch, grey) in zip(
        rows[0]["stages"] if rows else (),
        (("", "0.25"), ("//", "0.85"), ("", "0.6"), ("..", "0.95")),
        strict=False,
    ):
        whole = [sum(row["stages"].values()) for row in rows]
        percentages = np.array([r["stages"][stage] for r in rows]) / whole * 100
        style = {"hatch": hatch, "color": grey, "edgecolor": "black"}
        axes[2].bar(names, percentages, bottom=below, label=stage, **style)
        below += percentages
    axes[2].set(title="time of each stage, %", xlabel="tokens N", ylim=(0, 100))
    for axis, side, columns in ((axes[0], "left", 3), (axes[2], "right", 2)):
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc=f"outside lower {side}", ncols=columns)
    figure.savefig(path, dpi=120, format="png")
