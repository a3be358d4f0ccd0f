"""Measure autoregressive priors: their speed, and how well fitted ones predict.

    python benchmarks/alignment.py [--quick] [--json PATH]

1. Time: the alignment losses of K merged tokens, all prefixes at once, against a loop
   over the prefixes.
2. Prediction of real tokens, in short runs. The tokens are the patches of a photograph
   (matplotlib's own), row by row, and the hidden states of passages of Python's
   language reference after layer 3 of a sentence encoder (if its weights are installed:
   see minilm.py). Every fifth row and every fifth passage is held out. The figures are
   mean squared errors of held-out tokens, divided by the error of the best constant,
   the training mean.
3. Order: the alignment loss of runs merged to half, under a prior fitted to training
   runs merged the same way. The groups are in causal order or in a random order.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from minilm import MiniLM
from PIL import Image
from report import median_seconds, write_json
from texts import cut, documents

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS

PATCH = 8  # pixels
PASSAGE = 256  # word pieces, including [CLS] and [SEP]
LAYER = 3  # hidden states are those after this many layers
HELD_OUT = 5  # every fifth row and every fifth passage is held out
Report = dict[str, Any]
Runs = tuple[np.ndarray, np.ndarray]  # training and held-out runs, each (R, length, D)


def losses_by_loop(merged: np.ndarray, prior: qm.MLPPrior) -> float:
    """Return the total loss by the paper's form: one mean and one pass per prefix."""
    total, steps = 0.0, len(merged) - 1
    for t in range(1, len(merged)):
        # f reads the mean of x_1..x_t and predicts x_{t+1};
        # g reads the mean of x_{t+1}..x_K and predicts x_t.
        predicted_next = prior.forward(merged[:t].mean(axis=0))
        predicted_previous = prior.backward(merged[t:].mean(axis=0))
        total += ((predicted_next - merged[t]) ** 2).mean()
        total += ((predicted_previous - merged[t - 1]) ** 2).mean()
    return total / steps


def measure_time(num_groups: int, runs: int) -> Report:
    """Time both forms of the losses, and return how much their results differ."""
    merged = np.random.default_rng(0).standard_normal((num_groups, 512))
    merged = merged.astype(np.float32)
    prior = qm.MLPPrior.init(512)
    # These first calls also warm both forms up.
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
    print(f"alignment losses, K = {num_groups}, D = 512: loop {loop:.1f} ms, ", end="")
    print(f"all steps at once {ours:.1f} ms, ratio {ratio:.3f}")
    return {"num_groups": num_groups, **seconds, "difference": float(gap)}


def rows_of_patches() -> np.ndarray:
    """Return the rows of a photograph's patches (R, N, D)."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        picture = np.asarray(file.convert("L"), dtype=np.float32) / 255
    rows, columns = (size // PATCH for size in picture.shape)
    # The photograph's edge is cut off where it does not fill a patch.
    whole = picture[: rows * PATCH, : columns * PATCH]
    patches = whole.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2)
    # (rows, columns, PATCH, PATCH): each row of patches is one sequence.
    return patches.reshape(rows, columns, PATCH * PATCH)


def hidden_states(model: MiniLM, limit: int | None) -> np.ndarray:
    """Return the hidden states of each passage (P, N, D), without [CLS] and [SEP]."""
    # A document must fill a passage; [CLS] and [SEP] take two of its places.
    texts = documents(model, limit, PASSAGE - 2)
    passages = np.concatenate([cut(x.text, PASSAGE) for x in texts])
    batches = [
        model.run(model.embed(passages[first : first + 8]), 0, LAYER)[:, 1:-1]
        for first in range(0, len(passages), 8)
    ]
    return np.concatenate(batches)


def in_runs(sequences: np.ndarray, length: int) -> Runs:
    """Cut sequences (R, N, D) into runs, and subtract the training mean."""
    count, num_tokens, dim = sequences.shape
    whole = sequences[:, : num_tokens // length * length]
    runs = whole.reshape(count, -1, length, dim)  # (R, runs of a sequence, length, D)
    # Whole sequences are held out, so that no row or passage has runs in both sets.
    held = np.arange(count) % HELD_OUT == 2
    train, test = runs[~held], runs[held]
    # After this the best constant prediction is 0, so its error is a mean square.
    mean = train.mean(axis=(0, 1, 2))
    train, test = (x.reshape(-1, length, dim) - mean for x in (train, test))
    return train, test


def forward_loss(tokens: np.ndarray, prior: qm.Prior) -> float:
    """Return the mean loss of predicting the next token."""
    return float(qm.alignment_loss(tokens, prior).forward.mean())


def measure_worth(train: np.ndarray, test: np.ndarray, steps: int) -> Report:
    """Return the errors of predicting the next held-out token, by method."""
    prior = qm.MLPPrior.init(train.shape[-1])
    # The first token of a run is never predicted, so no error includes it.
    constant = float((test[:, 1:] ** 2).mean())
    errors = {
        "constant": constant,
        "last token": float(((test[:, 1:] - test[:, :-1]) ** 2).mean()),
        "untrained": forward_loss(test, prior),
        "ridge": forward_loss(test, prior.fit(train)),
        "ridge, Adam": forward_loss(test, prior.fit(train, steps=steps)),
    }
    row = "".join(f"{error / constant:>13.3f}" for error in errors.values())
    count, length, _ = train.shape
    print(f"{length:>6}{count:>7}{row}")
    return {"length": length, "runs": count, **errors}


def shuffled(merged: Any, seed: int) -> np.ndarray:
    """Return the merged tokens, each sequence in a random order of its own."""
    order = np.random.default_rng(seed).permuted(
        np.tile(np.arange(merged.tokens.shape[1]), (len(merged.tokens), 1)), axis=1
    )
    return np.take_along_axis(merged.tokens, order[..., None], axis=1)


def measure_order(method: str, runs: Runs) -> Report:
    """Return the alignment loss divided by the mean square of the merged tokens.

    The division removes the scale of the tokens, which differs between methods.
    """
    train, test = (qm.quickmerge(x, 0.5, method=method) for x in runs)
    prior = qm.MLPPrior.init(test.tokens.shape[-1])
    power = float((test.tokens**2).mean())
    causal = qm.alignment_loss(test.tokens, prior.fit(train.tokens))
    # The prior is fitted to shuffled runs too, so each order has its own prior.
    mixed = qm.alignment_loss(shuffled(test, 1), prior.fit(shuffled(train, 0)))
    losses = {
        "causal": float(causal.total.mean()) / power,
        "arbitrary": float(mixed.total.mean()) / power,
    }
    print(f"{method:>12}{losses['causal']:>12.3f}{losses['arbitrary']:>12.3f}")
    return {"method": method, **losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    quick = options.quick
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}")
    report: Report = {"machine": machine}
    report["time"] = measure_time(64 if quick else 1024, 2 if quick else 9)
    sources: dict[str, Callable[[], np.ndarray]] = {"patches": rows_of_patches}
    try:
        model = MiniLM()
    except ImportError as error:
        print(f"the hidden states of text are skipped: {error}")
    else:
        sources["text"] = lambda: hidden_states(model, 16 if quick else None)
    titles = "constant", "last token", "untrained", "ridge", "ridge, Adam"
    for source, read in sources.items():
        sequences = read()
        count, num_tokens, dim = sequences.shape
        results: Report = {"worth": [], "order": []}
        report[source] = results
        print(f"\n{source}: {count} sequences of {num_tokens} tokens of width {dim}")
        print("held-out error / error of the best constant, by length of the runs")
        print(f"{'length':>6}{'runs':>7}" + "".join(f"{x:>13}" for x in titles))
        for length in (8,) if quick else (4, 8, 16, 32):
            print(f"{source}, length {length} …", file=sys.stderr)
            runs = in_runs(sequences, length)
            results["worth"].append(measure_worth(*runs, 3 if quick else 500))
        print("alignment loss / mean square of the tokens, runs of 16 merged to 8")
        print(f"{'':>12}{'causal':>12}{'arbitrary':>12}")
        for method in METHODS[:1] if quick else METHODS:
            print(f"{source}, {method} …", file=sys.stderr)
            results["order"].append(measure_order(method, in_runs(sequences, 16)))
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
