"""The picture of quality.py: each task over the percentage of tokens that are kept."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from quality_tables import Report


class Line(NamedTuple):
    """How a contender looks in every panel."""

    label: str
    color: str  # of Okabe and Ito
    marker: str


WARD = Line("ward", "#0072B2", "s")
AVERAGE = Line("average", "#56B4E9", "o")
BEST = Line("quickmerge with the attention", "#D55E00", "*")
EUCLIDEAN = Line("ward, Euclidean", "#E69F00", "P")
TOME = Line("ToMe, tokens", "#009E73", "D")
TOME_KEYS = Line("ToMe, keys", "#009E73", "d")
KMEANS = Line("k-means", "#CC79A7", "^")
CHUNKS = Line("uniform chunks", "#999999", "v")
RANDOM = Line("pruned at random", "#000000", "x")

# The contender of a panel -> its line.
IN_PLACE = {
    "quickmerge, attention": BEST,
    "ward": WARD,
    "average": AVERAGE,
    "k-means": KMEANS,
    "ToMe in steps of 16, tokens": TOME,
    "ToMe in steps of 16, keys": TOME_KEYS,
    "uniform chunks": CHUNKS,
    "pruned at random": RANDOM,
}
OVER = {
    "quickmerge, attention": BEST,
    "ward, size mass": WARD,
    "average, size mass": AVERAGE,
    "ToMe, tokens": TOME,
    "ToMe, keys": TOME_KEYS,
}
SEARCH = {
    "ward": WARD,
    "average": AVERAGE,
    "k-means, unit vectors": KMEANS,
    "ToMe in steps of 8, tokens": TOME,
    "uniform chunks": CHUNKS,
    "pruned at random": RANDOM,
}
PICTURES = {
    "ward, Euclidean": EUCLIDEAN,
    "ward": WARD,
    "average": AVERAGE,
    "k-means": KMEANS,
    "ToMe in steps of 64, tokens": TOME,
    "uniform chunks": CHUNKS,
    "pruned at random": RANDOM,
}


def plot(report: Report, path: Path) -> None:
    """Draw the figures of each task over the percentage of tokens kept."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    text = report["text"]
    panels = [
        ("text, merged after layer 3: error (lower is better)", IN_PLACE),
        ("text, merged over the layers: error (lower is better)", OVER),
        ("search: nDCG@10 / unpooled nDCG@10 (higher is better)", SEARCH),
        ("pictures: PSNR in dB (higher is better)", PICTURES),
    ]
    results = [
        text["after layer 3"],
        text["over the layers"],
        report["search"]["nDCG@10"],
        report["pictures"],
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (title, lines), result in zip(axes.flat, panels, results, strict=True):
        _panel(axis, lines, result)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens kept, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
    for axis, ticks in (
        (axes[0, 0], (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
        (axes[0, 1], (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
    ):
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    handles = {}
    for axis in axes.flat:
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=5, frameon=False
    )
    figure.savefig(path, dpi=120, format="png")


def _panel(axis: Any, lines: dict[str, Line], results: Report) -> None:
    """Draw means with their intervals, and name the ticks of the columns."""
    ticks: set[float] = set()
    labels: set[str] = set()
    for name, line in lines.items():
        # --quick leaves contenders out. Two names may have one line: draw the first.
        if name not in results or line.label in labels:
            continue
        columns = results[name]
        x = [percent(column) for column in columns]
        # (columns, 3): mean or ratio, and the ends of its interval.
        y = np.array([next(iter(values.values())) for values in columns.values()])
        bars = np.abs(y[:, 1:] - y[:, :1]).T  # distances from the mean
        axis.errorbar(
            x, y[:, 0], bars, color=line.color, marker=line.marker,
            label=line.label, capsize=2, linewidth=1.2,
            # Keys are dashed, so that they differ from tokens in more than the marker.
            linestyle="--" if line is TOME_KEYS else "-",
            markersize=9 if line is BEST else 5,
        )  # fmt: skip
        ticks |= set(x)
        labels.add(line.label)
    axis.set_xticks(sorted(ticks), [f"{tick:.3g}" for tick in sorted(ticks)])


def percent(column: str) -> float:
    """Return the percentage of a column "25%", or "1/4" in the search."""
    return float(column[:-1]) if column[-1] == "%" else 100 / float(column[2:])
