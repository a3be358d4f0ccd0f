"""Time the NumPy reference beside the naive form of each formula, and torch.

    python benchmarks/reference.py [--quick] [--json PATH]

Everything runs on the CPU, in one process. Contenders take turns, so that a slow phase
of the machine affects all of them. The figures are medians, and ratios to the time of
the naive form (below 1 is faster).
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import median_seconds, write_json
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist
from scipy.special import entr, softmax

import qm_cupy as qm

try:
    import torch
except ImportError:
    torch = None

Contenders = dict[str, Callable[[], Any]]


def entropy_contenders(tokens: np.ndarray) -> Contenders:
    """Return forms of the self-attention entropy, H_i = -Σ_j A_ij log A_ij.

    The naive forms hold several arrays of N × N.
    """

    def naive() -> np.ndarray:
        scores = tokens @ tokens.T / np.sqrt(np.float32(tokens.shape[1]))
        return entr(softmax(scores, axis=-1)).sum(axis=-1)

    def authors() -> np.ndarray:
        # The authors add 1e-8 inside the logarithm, so that log(0) cannot occur.
        scores = tokens @ tokens.T / np.sqrt(np.float32(tokens.shape[1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return -(weights * np.log(weights + 1e-8)).sum(axis=-1)

    contenders: Contenders = {
        "naive": naive,
        "naive, log(A + 1e-8)": authors,
        "qm_cupy": lambda: qm.self_attention_entropy(tokens),
    }
    if torch is not None:
        x = torch.from_numpy(tokens)  # a view: conversion is not timed

        def in_torch() -> Any:
            weights = torch.softmax(x @ x.T / x.shape[1] ** 0.5, dim=-1)
            return torch.special.entr(weights).sum(dim=-1)

        contenders["torch"] = in_torch
    return contenders


def alignment_contenders(merged: np.ndarray) -> Contenders:
    """Return forms of both alignment losses: a loop over steps, or all at once."""
    prior = qm.MLPPrior.init(merged.shape[-1])

    def naive() -> float:
        total = 0.0
        steps = merged.shape[0] - 1
        for t in range(steps):
            # f reads the mean of the tokens up to t and predicts t + 1; g reads the
            # mean of the tokens from t + 1 on and predicts t.
            total += np.mean(
                (prior.forward(merged[: t + 1].mean(0)) - merged[t + 1]) ** 2
            )
            total += np.mean((prior.backward(merged[t + 1 :].mean(0)) - merged[t]) ** 2)
        return total / steps

    contenders: Contenders = {
        "naive": naive,
        "qm_cupy": lambda: qm.alignment_loss(merged, prior).total,
    }
    if torch is not None:
        x = torch.from_numpy(merged)
        # The weights of f and of g: the same network in every form.
        nets = [
            [torch.from_numpy(w) for w in net]
            for net in (prior.forward, prior.backward)
        ]

        def loss(net: list[Any], context: Any, target: Any) -> Any:
            hidden = torch.relu(torch.nn.functional.linear(context, *net[:2]))
            guess = torch.nn.functional.linear(hidden, *net[2:])
            return torch.mean((guess - target) ** 2)

        def in_torch() -> float:
            steps = range(len(x) - 1)
            forward_loss = sum(
                loss(nets[0], x[: t + 1].mean(0), x[t + 1]) for t in steps
            )
            backward_loss = sum(loss(nets[1], x[t + 1 :].mean(0), x[t]) for t in steps)
            return float(forward_loss + backward_loss) / (len(x) - 1)

        contenders["torch, step by step"] = in_torch
    return contenders


def clustering_contenders(tokens: np.ndarray, num_groups: int) -> Contenders:
    """Return forms of average linkage, cut at K groups."""

    def naive() -> np.ndarray:
        tree = hierarchy.linkage(pdist(tokens, "cosine"), "average")
        return hierarchy.fcluster(tree, num_groups, "maxclust")

    return {"naive": naive, "qm_cupy": lambda: qm.cluster_tokens(tokens, num_groups)}


def merge_contenders(
    tokens: np.ndarray, labels: np.ndarray, mass: np.ndarray
) -> Contenders:
    """Return forms of the weighted means of the groups, Σ m_j x_j / Σ m_j."""
    num_groups = int(labels.max()) + 1

    def naive() -> np.ndarray:
        # One pass over all N labels for each group.
        groups = (labels == k for k in range(num_groups))
        return np.stack(
            [np.average(tokens[g], axis=0, weights=mass[g]) for g in groups]
        )

    contenders: Contenders = {
        "naive": naive,
        "qm_cupy": lambda: qm.merge_tokens(tokens, labels, num_groups, mass=mass),
    }
    if torch is not None:
        x, weight = torch.from_numpy(tokens), torch.from_numpy(mass)[:, None]
        index = torch.from_numpy(labels.astype(np.int64))  # `index_add_` needs integers

        def in_torch() -> Any:
            total = torch.zeros(num_groups, x.shape[1]).index_add_(0, index, x * weight)
            return total / torch.zeros(num_groups, 1).index_add_(0, index, weight)

        contenders["torch index_add"] = in_torch
    return contenders


def measure(contenders: Contenders, repeats: int) -> dict[str, float]:
    """Check the results, and return the median seconds of each contender."""
    # These calls also warm up.
    results = {name: np.asarray(run()) for name, run in contenders.items()}
    for name, result in results.items():
        # Labels are not compared: the same groups can have other numbers.
        if result.dtype.kind == "f":
            np.testing.assert_allclose(
                result, results["naive"], rtol=2e-3, atol=2e-3, err_msg=name
            )
    return median_seconds(contenders, repeats)


def cases(quick: bool) -> dict[str, Contenders]:
    """Return the contenders of each formula and size, by title."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    sizes = [(256, 192)] if quick else [(1024, 768), (4096, 1024)]
    contenders_by_title: dict[str, Contenders] = {}
    for size in sizes:
        # The factor keeps the attention from falling on the diagonal alone.
        contenders_by_title[f"entropy of hidden states, N, D = {size}"] = (
            entropy_contenders(0.3 * draw(*size))
        )
    contenders_by_title["alignment losses, K, D = (204, 512)"] = alignment_contenders(
        draw(204, 512)
    )
    size = (256, 192) if quick else (1024, 768)
    contenders_by_title[f"average linkage to N/5, N, D = {size}"] = (
        clustering_contenders(draw(*size), size[0] // 5)
    )
    size = sizes[-1]
    # N / 4 groups of four tokens each, at random positions.
    labels = rng.permutation(np.arange(size[0]) % (size[0] // 4)).astype(np.int32)
    mass = rng.random(size[0], dtype=np.float32)
    contenders_by_title[f"merge to N/4, N, D = {size}"] = merge_contenders(
        draw(*size), labels, mass
    )
    return contenders_by_title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--json", type=Path, help="write the medians here as well")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(machine + (f", torch {torch.__version__}" if torch else ", no torch"))
    contenders_by_title = cases(options.quick)
    report: dict[str, dict[str, float]] = {}
    for number, (title, contenders) in enumerate(contenders_by_title.items(), 1):
        print(f"[{number}/{len(contenders_by_title)}] {title}", file=sys.stderr)
        report[title] = measure(contenders, 3 if options.quick else 15)
    print(f"{'':<42}{'ms':>10}{'to naive':>10}")
    for title, medians in report.items():
        print(title)
        for name, median in medians.items():
            ratio = median / medians["naive"]
            print(f"    {name:<38}{1e3 * median:>10.2f}{ratio:>9.2f}×")
    if options.json:
        write_json(options.json, {"machine": machine, "seconds": report})


if __name__ == "__main__":
    main()
