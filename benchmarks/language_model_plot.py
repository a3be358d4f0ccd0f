"""The pictures of language_model.py: perplexity over what is kept, and KL by method.

    python benchmarks/language_model_plot.py

It reads benchmarks/results/language_model.json and writes language_model.png beside it.
"""

import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality_tables import interval

RESULTS = Path(__file__).parent / "results"
LENGTH = "1024"  # of the contexts
# Methods of the first panel, with a colour of Okabe and Ito and a marker.
LINES = {
    "merge_kv_cache, second reading": ("black", "X"),
    "KVzip": ("#999933", "<"),
    "merge_kv_cache, per_layer, per_head": ("#D55E00", "*"),
    "merge_kv_cache, per_layer": ("#E69F00", "P"),
    "merge_kv_cache": ("#0072B2", "s"),
    "attention matching": ("#CC79A7", "^"),
    "H2O": ("#009E73", "D"),
    "SnapKV": ("#56B4E9", "o"),
    "sinks and recent": ("#999999", "v"),
}
Report = dict[str, Any]


def plot(report: Report, path: Path) -> None:
    """Draw both panels from the parts `continuation` and `more` of a report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results, more = (report[name][LENGTH] for name in ("continuation", "more"))
    assert results["documents"] == more["documents"]
    results = {**results, "methods": more["methods"] | results["methods"]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    perplexity(axes[0], results)
    divergence(axes[1], results, "0.25")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def perplexity(axis: Any, results: Report) -> None:
    """Draw the perplexity of each method over the percentage of entries kept."""
    whole = float(np.exp(np.mean(results["full"]["loss"])))
    for name, (color, marker) in LINES.items():
        row = results["methods"][name]
        kept = sorted(row, key=float)
        values = [float(np.exp(np.mean(row[b]["loss"]))) for b in kept]
        percent = [100 * float(b) for b in kept]
        axis.plot(percent, values, marker=marker, color=color, label=name)
    axis.axhline(whole, color="black", linewidth=1, linestyle=":", label="whole cache")
    axis.set_xscale("log")
    ticks = [100 * float(b) for b in kept]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel("entries kept, %")
    axis.set_title("perplexity of the next 128 tokens (lower is better)", fontsize=10)
    axis.legend(fontsize=8, edgecolor="none", framealpha=0.85)


def divergence(axis: Any, results: Report, budget: str) -> None:
    """Draw KL of every method at one budget, with 95 % intervals by document."""
    means = {
        name: interval(np.array(row[budget]["kl"]))
        for name, row in results["methods"].items()
        if len(row) > 1  # measured at every budget
    }
    names = sorted(means, key=lambda name: -means[name][0])
    for y, name in enumerate(names):
        mean, low, high = means[name]
        color = "#D55E00" if "merge_kv_cache" in name else "#0072B2"
        axis.plot([low, high], [y, y], color=color, linewidth=2)
        axis.plot(mean, y, "o", color=color)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("KL divergence from the whole cache, nats")
    percent = f"{100 * float(budget):g} %"
    axis.set_title(f"{percent} of the entries kept (lower is better)", fontsize=10)


def coloured_text(words: Sequence[str], labels: Sequence[int]) -> str:
    """Return HTML of a text in which tokens of one group have one colour.

    Tokens that are alone in their group are grey.
    """
    sizes = Counter(labels)
    groups = {label: i for i, label in enumerate(x for x in sizes if sizes[x] > 1)}
    spans = []
    for word, label in zip(words, labels, strict=True):
        style = "color:#999"
        if label in groups:
            # Steps of the golden angle, so that groups that follow differ.
            hue = round(137.508 * groups[label]) % 360
            style = f"color:black;background:hsl({hue},70%,80%)"
        text = html.escape(word).replace("\n", "↵<br>")
        spans.append(f'<span style="{style}" title="group {label}">{text}</span>')
    return f'<div style="line-height:1.7">{"".join(spans)}</div>'


def main() -> None:
    """Draw the picture of the results that are stored."""
    text = (RESULTS / "language_model.json").read_text(encoding="utf-8")
    path = RESULTS / "language_model.png"
    plot(json.loads(text), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
