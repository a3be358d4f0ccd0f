"""Train a token projection and the two-layer prior end to end, through the merge.

    python benchmarks/training.py [--framework torch|jax] [--quick] [--json PATH]
                                  [--plot PATH] [--steps S]

A photograph (matplotlib's own) is cut into 8 x 8 patches, 64 a row. A linear map makes
each a token, `quickmerge` makes 16 of a row's 64 tokens, and another linear map makes
patches of these again. Adam trains both maps and the prior to lower

    picture error + alpha * alignment loss + fidelity loss,

through the saliency, the selection and the merge, of which the labels are constants.
The printed figures are those of the whole photograph; both frameworks start from the
same weights and read the same rows.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from PIL import Image
from report import write_json

import qm_cupy as qm
from qm_cupy.cli.progress import progress

PATCH = 8  # pixels
WIDTH = 512  # of the photograph: 64 patches a row
DIM = 16  # of a token; a patch has 64 numbers
RATIO = 4  # N / K
ALPHA = 0.1
ROWS = 16  # that a step reads
RATE = 3e-3
DECAY, SQUARE_DECAY, TINY = 0.9, 0.999, 1e-8  # of Adam, as torch has them

Weights = dict[str, Any]
Report = dict[str, Any]


def photograph() -> np.ndarray:
    """Return it in grey, (600, 512), black 0 and white 1."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        return np.asarray(file.convert("L"), dtype=np.float32)[:, :WIDTH] / 255


def patches(picture: np.ndarray) -> np.ndarray:
    """Return the patches (B, N, 64) of every row."""
    height, width = picture.shape
    parts = picture.reshape(height // PATCH, PATCH, width // PATCH, PATCH)
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(
        height // PATCH, width // PATCH, PATCH**2
    )


def assemble(rows: np.ndarray) -> np.ndarray:
    """Return the picture of patches."""
    height, width, _ = rows.shape
    parts = rows.reshape(height, width, PATCH, PATCH).swapaxes(1, 2)
    return parts.reshape(height * PATCH, width * PATCH)


def initial_weights() -> Weights:
    """Return a random projection, its transpose for the way back, and a prior."""
    rng = np.random.default_rng(0)
    project, _ = np.linalg.qr(rng.standard_normal((PATCH**2, DIM)))
    project = project.astype(np.float32)
    prior = qm.MLPPrior.init(DIM, hidden_dim=64)
    return {"project": project, "rebuild": project.T.copy(), "prior": prior}


def loss(weights: Weights, x: Any) -> tuple[Any, Any]:
    """Return the loss, and the patches (B, N, 64) made of the merged tokens."""
    tokens = x @ weights["project"]
    merged = qm.quickmerge(tokens, x.shape[1] // RATIO)
    alignment = qm.alignment_loss(merged.tokens, weights["prior"]).total.mean()
    fidelity = qm.fidelity_loss(tokens, merged.tokens, labels=merged.labels)
    rebuilt = qm.unmerge_tokens(merged.tokens, merged.labels) @ weights["rebuild"]
    error = ((rebuilt - x) ** 2).mean() / (x**2).mean()
    return error + ALPHA * alignment + fidelity, rebuilt


class Torch:
    """Weights that torch trains."""

    def __init__(self, weights: Weights) -> None:
        import torch

        from qm_cupy.torch import MLPPrior

        self.torch = torch
        prior = weights["prior"]
        self.weights = {
            "project": torch.nn.Parameter(torch.tensor(weights["project"])),
            "rebuild": torch.nn.Parameter(torch.tensor(weights["rebuild"])),
            "prior": MLPPrior(prior.forward, prior.backward),
        }
        *maps, prior = self.weights.values()
        self.adam = torch.optim.Adam([*maps, *prior.parameters()], RATE)

    def step(self, x: np.ndarray) -> None:
        value, _ = loss(self.weights, self.torch.from_numpy(x))
        self.adam.zero_grad()
        value.backward()
        self.adam.step()

    def look(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        with self.torch.no_grad():
            value, rebuilt = loss(self.weights, self.torch.from_numpy(x))
        return value.item(), rebuilt.numpy()


class Jax:
    """Weights that JAX trains, under `jax.jit`; it has no Adam of its own."""

    def __init__(self, weights: Weights) -> None:
        import jax

        import qm_cupy.jax  # noqa: F401 - makes the prior a pytree

        self.jax = jax
        self.weights = jax.tree.map(jax.numpy.asarray, weights)
        nothing = jax.tree.map(jax.numpy.zeros_like, self.weights)
        self.moments, self.count = (nothing, nothing), 0
        self.slope = jax.jit(jax.grad(lambda w, x: loss(w, x)[0]))

    def step(self, x: np.ndarray) -> None:
        slope = self.slope(self.weights, self.jax.numpy.asarray(x))
        self.count += 1
        bias = 1 - DECAY**self.count, 1 - SQUARE_DECAY**self.count
        over = self.jax.tree.map
        first = over(lambda m, g: DECAY * m + (1 - DECAY) * g, self.moments[0], slope)
        second = over(
            lambda v, g: SQUARE_DECAY * v + (1 - SQUARE_DECAY) * g * g,
            self.moments[1],
            slope,
        )
        self.weights = over(
            lambda w, m, v: w - RATE * m / bias[0] / ((v / bias[1]) ** 0.5 + TINY),
            self.weights,
            first,
            second,
        )
        self.moments = first, second

    def look(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, rebuilt = loss(self.weights, self.jax.numpy.asarray(x))
        return float(value), np.asarray(rebuilt)


FRAMEWORKS: dict[str, Callable[[Weights], Any]] = {"torch": Torch, "jax": Jax}


def decibels(error: float) -> float:
    """Return the peak signal-to-noise ratio of a mean squared error."""
    return float(-10 * np.log10(error))


def train(model: Any, x: np.ndarray, steps: int, every: int) -> list[Report]:
    """Train, and return loss, PSNR and patches now and then, from before to after."""
    rng = np.random.default_rng(0)
    seen = []
    with progress(steps, sys.stderr, "steps") as shown:
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                value, rebuilt = model.look(x)
                found = {"step": step, "loss": value, "patches": rebuilt}
                seen.append({**found, "psnr": decibels(((rebuilt - x) ** 2).mean())})
            if step < steps:
                model.step(x[np.sort(rng.choice(len(x), ROWS, replace=False))])
            shown(step)
    return seen


def plot(picture: np.ndarray, seen: list[Report], mean: float, path: Path) -> None:
    """Draw the photograph, it before and after training, and the course of both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained")
    for axis, title, image in (
        (axes[0], "photograph", picture),
        (axes[1], f"step 0: {seen[0]['psnr']:.1f} dB", None),
        (axes[2], f"step {seen[-1]['step']}: {seen[-1]['psnr']:.1f} dB", None),
    ):
        rows = seen[0 if axis is axes[1] else -1]["patches"]
        shown = assemble(rows) + mean if image is None else image
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    steps = [found["step"] for found in seen]
    axes[3].plot(steps, [found["loss"] for found in seen], "C0o-", label="loss")
    axes[3].set(xlabel="step", ylabel="loss", ylim=(0, None), title="whole photograph")
    other = axes[3].twinx()
    other.plot(steps, [found["psnr"] for found in seen], "C1s--", label="PSNR")
    other.set(ylabel="PSNR, dB")
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--quick", action="store_true", help="24 steps")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw before and after here, a PNG")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    steps = 24 if options.quick else options.steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    picture = photograph()
    x = patches(picture)
    mean = float(x.mean())
    x -= mean
    batch, num_tokens, _ = x.shape
    print(f"qm_cupy {qm.__version__}, {options.framework}, on the CPU")
    print(f"{batch} rows of {num_tokens} patches, merged to {num_tokens // RATIO}")
    model = FRAMEWORKS[options.framework](initial_weights())
    seen = train(model, x, steps, max(steps // 8, 1))
    print(f"{'step':>6}{'loss':>10}{'PSNR, dB':>10}")
    for found in seen:
        print(f"{found['step']:>6}{found['loss']:>10.4f}{found['psnr']:>10.2f}")
    if options.plot:
        plot(picture, seen, mean, options.plot)
    if options.json:
        figures = [{k: y for k, y in f.items() if k != "patches"} for f in seen]
        write_json(options.json, {"framework": options.framework, "steps": figures})


if __name__ == "__main__":
    main()
