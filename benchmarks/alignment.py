"""Autoregressive priors: all prefixes at once, and what a fitted one is worth.

    python benchmarks/alignment.py [--quick] [--json PATH]

First the losses of K merged tokens against the loop over prefixes, as the formula
reads. Then real tokens: patches of a photograph (matplotlib's own), short runs of each
raster row; rows 2, 7, 12, … are held out. Errors are mean squared ones of held-out
tokens, over that of the best constant, the training mean. Last, merging: the alignment
loss of runs merged to half, under a prior fitted to training runs merged the same way,
with groups in causal order and in an order drawn at random.
"""

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from PIL import Image
from report import median_seconds, write_json

import qm_cupy as qm
from qm_cupy.clustering import METHODS

PATCH = 8  # pixels
HELD_OUT = 5  # every fifth row
Report = dict[str, Any]


def losses_by_loop(merged: np.ndarray, prior: qm.MLPPrior) -> float:
    """The paper's form: a mean and a forward pass for every prefix."""
    total, steps = 0.0, len(merged) - 1
    for t in range(1, len(merged)):
        ahead = prior.forward(merged[:t].mean(axis=0))
        behind = prior.backward(merged[t:].mean(axis=0))
        total += ((ahead - merged[t]) ** 2).mean()
        total += ((behind - merged[t - 1]) ** 2).mean()
    return total / steps


def measure_time(num_groups: int, runs: int) -> Report:
    merged = np.random.default_rng(0).standard_normal((num_groups, 512))
    merged = merged.astype(np.float32)
    prior = qm.MLPPrior.init(512)
    # Which warms both up.
    gap = losses_by_loop(merged, prior) - qm.alignment_loss(merged, prior).total
    seconds = median_seconds(
        {
            "loop": lambda: losses_by_loop(merged, prior),
            "qm_cupy": lambda: qm.alignment_loss(merged, prior),
        },
        runs,
    )
    ratio = seconds["qm_cupy"] / seconds["loop"]
    loop, ours = (1e3 * x for x in seconds.values())
    print(f"losses, K = {num_groups}, D = 512: loop {loop:.1f} ms, ", end="")
    print(f"all at once {ours:.1f} ms, ratio {ratio:.3f}")
    return {"num_groups": num_groups, **seconds, "difference": float(gap)}


def runs_of_patches(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out runs (R, length, D), less the training mean."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        picture = np.asarray(file.convert("L"), dtype=np.float32) / 255
    rows, columns = (size // PATCH for size in picture.shape)
    columns -= columns % length
    whole = picture[: rows * PATCH, : columns * PATCH]
    patches = whole.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2)
    runs = patches.reshape(rows, columns // length, length, PATCH * PATCH)
    held = np.arange(rows) % HELD_OUT == 2
    train, test = runs[~held], runs[held]
    mean = train.mean(axis=(0, 1, 2))
    return tuple(x.reshape(-1, *x.shape[2:]) - mean for x in (train, test))


def measure_worth(length: int, steps: int) -> Report:
    train, test = runs_of_patches(length)
    prior = qm.MLPPrior.init(train.shape[-1])
    constant = float((test[:, 1:] ** 2).mean())
    errors = {
        "constant": constant,
        "last token": float(((test[:, 1:] - test[:, :-1]) ** 2).mean()),
        "untrained": float(prior.loss(test).forward.mean()),
        "ridge": float(prior.fit(train).loss(test).forward.mean()),
        "ridge, Adam": float(prior.fit(train, steps=steps).loss(test).forward.mean()),
    }
    row = "".join(f"{error / constant:>13.3f}" for error in errors.values())
    print(f"{length:>6}{len(train):>7}{row}")
    return {"length": length, "runs": len(train), **errors}


def shuffled(merged: Any, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permuted(
        np.tile(np.arange(merged.tokens.shape[1]), (len(merged.tokens), 1)), axis=1
    )
    return np.take_along_axis(merged.tokens, order[..., None], axis=1)


def measure_order(method: str, length: int) -> Report:
    """The loss over the mean squared entry of the very tokens it is of."""
    train, test = (
        qm.quickmerge(x, 0.5, method=method) for x in runs_of_patches(length)
    )
    prior = qm.MLPPrior.init(test.tokens.shape[-1])
    power = float((test.tokens**2).mean())
    causal = prior.fit(train.tokens).loss(test.tokens)
    mixed = prior.fit(shuffled(train, 0)).loss(shuffled(test, 1))
    found = {
        "causal": float(causal.total.mean()) / power,
        "arbitrary": float(mixed.total.mean()) / power,
    }
    print(f"{method:>12}{found['causal']:>12.3f}{found['arbitrary']:>12.3f}")
    return {"method": method, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    quick = options.quick
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}")
    report: Report = {"machine": machine}
    report["time"] = measure_time(64 if quick else 1024, 2 if quick else 9)
    titles = "constant", "last token", "untrained", "ridge", "ridge, Adam"
    print("\nheld-out error over the constant's, by length and number of runs")
    print(f"{'length':>6}{'runs':>7}" + "".join(f"{x:>13}" for x in titles))
    report["worth"] = []
    for length in (8,) if quick else (4, 8, 16, 32):
        print(f"length {length} …", file=sys.stderr)
        report["worth"].append(measure_worth(length, 3 if quick else 500))
    print("\nalignment loss after merging runs of 16 to 8, over the tokens' power")
    print(f"{'':>12}{'causal':>12}{'arbitrary':>12}")
    methods = METHODS[:1] if quick else METHODS
    report["order"] = [measure_order(method, 16) for method in methods]
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
