"""Means over documents with 95 % intervals by a bootstrap, as tables and as JSON."""

from typing import Any

import numpy as np

Report = dict[str, Any]

RESAMPLES = 2000  # of the bootstrap


def by_document(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return means over the items of each document: (..., X) to (..., documents)."""
    means = [values[..., owner == d].mean(axis=-1) for d in np.unique(owner)]
    return np.stack(means, axis=-1)


def interval(values: np.ndarray) -> list[float]:
    """Return the mean over documents and its 95 % interval, by a bootstrap."""
    means = values[_samples(len(values))].mean(axis=1)
    return [float(values.mean()), *map(float, np.quantile(means, (0.025, 0.975)))]


def ratio(values: np.ndarray, peer: np.ndarray) -> list[float]:
    """Return the ratio of two means over the same documents, and its interval."""
    # Both means use the same samples: the documents are paired.
    samples = _samples(len(values))
    ratios = values[samples].mean(axis=1) / peer[samples].mean(axis=1)
    whole = values.mean() / peer.mean()
    return [float(whole), *map(float, np.quantile(ratios, (0.025, 0.975)))]


def difference(values: np.ndarray, peer: np.ndarray) -> list[float]:
    """Return the mean difference over the same documents, and its interval."""
    return interval(values - peer)


def _samples(count: int) -> np.ndarray:
    """Draw as many documents as there are, with replacement, for each resample."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def table(
    title: str,
    names: list[str],
    columns: list[str],
    scores: np.ndarray,
    peer: str | None = None,
    baseline: np.ndarray | None = None,
    decibels: bool = False,
) -> Report:
    """Print and return means over documents with their intervals.

    `scores` has the axes (contender, column, document), and is NaN where a contender
    did not run. If `peer` is given, the report also has the ratios to that contender,
    or the differences from it if the scores are in decibels. If `baseline` (document,)
    is given, all figures are ratios to it.
    """
    width = max(map(len, names)) + 2
    print(f"\n{title}")
    print(" " * width + "".join(f"{c:>24}" for c in columns))
    report: Report = {}
    for n, name in enumerate(names):
        row, report[name] = "", {}
        for c, column in enumerate(columns):
            values = scores[n, c]
            if np.isnan(values).any():
                row += f"{'-':>24}"
                continue
            estimate = interval(values) if baseline is None else ratio(values, baseline)
            report[name][column] = {"mean" if baseline is None else "ratio": estimate}
            if peer in names:
                compare, word = (difference, "minus") if decibels else (ratio, "over")
                versus = compare(values, scores[names.index(peer), c])
                report[name][column][f"{word} {peer}"] = versus
            text = f"{estimate[0]:.4g} ({estimate[1]:.3g}-{estimate[2]:.3g})"
            row += f"{text:>24}"
        print(f"{name:{width}}{row}")
    return report
