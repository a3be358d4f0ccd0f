"""Train a token projection and the two-layer prior end to end, through the merge.

    python benchmarks/training.py [--framework torch|jax] [--quick] [--json PATH]
                                  [--plot PATH] [--steps S]

A photograph (matplotlib's own) is cut into 8 x 8 patches, 64 per row. A linear map
turns each patch into a token, `quickmerge` merges the 64 tokens of a row into 16, and
another linear map turns the merged tokens into patches again. Adam trains both maps and
the prior to minimise

    picture error + alpha * alignment loss + fidelity loss.

Gradients flow through the saliency, the selection and the merge; the labels are
constants. The printed figures are those of the whole photograph. Both frameworks start
from the same weights and read the same rows.
"""

import argparse
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
WIDTH = 512  # pixels of the photograph that are used: 64 patches per row
DIM = 16  # width of a token; a patch has 64 numbers
RATIO = 4  # N / K
ALPHA = 0.1  # weight of the alignment loss
ROWS = 16  # rows of patches per step
RATE = 3e-3  # learning rate
DECAY, SQUARE_DECAY, TINY = 0.9, 0.999, 1e-8  # constants of Adam, as in torch

Weights = dict[str, Any]
Report = dict[str, Any]


def photograph() -> np.ndarray:
    """Return the photograph in grey, (600, 512), where 0 is black and 1 is white."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        return np.asarray(file.convert("L"), dtype=np.float32)[:, :WIDTH] / 255


def patches(picture: np.ndarray) -> np.ndarray:
    """Return the patches (B, N, 64) of every row of the picture."""
    height, width = picture.shape
    # (B, PATCH, N, PATCH): the axes of a patch come last after the swap.
    parts = picture.reshape(height // PATCH, PATCH, width // PATCH, PATCH)
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(
        height // PATCH, width // PATCH, PATCH**2
    )


def assemble(rows: np.ndarray) -> np.ndarray:
    """Return the picture that patches (B, N, 64) form."""
    height, width, _ = rows.shape
    parts = rows.reshape(height, width, PATCH, PATCH).swapaxes(1, 2)
    return parts.reshape(height * PATCH, width * PATCH)


def initial_weights() -> Weights:
    """Return a random projection, its transpose for the way back, and a prior."""
    rng = np.random.default_rng(0)
    # Q has orthonormal columns, so the transpose of the projection undoes it as far as
    # DIM numbers can.
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
    # The squared error relative to the mean square of the patches.
    error = ((rebuilt - x) ** 2).mean() / (x**2).mean()
    return error + ALPHA * alignment + fidelity, rebuilt


class Torch:
    """The weights in torch, and its Adam."""

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
        # The prior is a module; the maps are parameters.
        *maps, prior = self.weights.values()
        self.adam = torch.optim.Adam([*maps, *prior.parameters()], RATE)

    def step(self, x: np.ndarray) -> None:
        """Make one step of Adam on rows (B, N, 64)."""
        value, _ = loss(self.weights, self.torch.from_numpy(x))
        self.adam.zero_grad()
        value.backward()
        self.adam.step()

    def evaluate(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and the rebuilt patches."""
        with self.torch.no_grad():
            value, rebuilt = loss(self.weights, self.torch.from_numpy(x))
        return value.item(), rebuilt.numpy()


class Jax:
    """The weights in JAX, and an Adam of our own, because JAX has none."""

    def __init__(self, weights: Weights) -> None:
        import jax

        import qm_cupy.jax  # noqa: F401 - makes the prior a pytree

        self.jax = jax
        self.weights = jax.tree.map(jax.numpy.asarray, weights)
        nothing = jax.tree.map(jax.numpy.zeros_like, self.weights)
        self.moments, self.count = (nothing, nothing), 0
        self.slope = jax.jit(jax.grad(lambda w, x: loss(w, x)[0]))

    def step(self, x: np.ndarray) -> None:
        """Make one step of Adam on rows (B, N, 64)."""
        slope = self.slope(self.weights, self.jax.numpy.asarray(x))
        self.count += 1
        # m = β1 m + (1 - β1) g and v = β2 v + (1 - β2) g²; both start at 0, so the
        # step divides them by 1 - β1^t and 1 - β2^t.
        bias = 1 - DECAY**self.count, 1 - SQUARE_DECAY**self.count
        tree_map = self.jax.tree.map
        first = tree_map(
            lambda m, g: DECAY * m + (1 - DECAY) * g, self.moments[0], slope
        )
        second = tree_map(
            lambda v, g: SQUARE_DECAY * v + (1 - SQUARE_DECAY) * g * g,
            self.moments[1],
            slope,
        )
        self.weights = tree_map(
            lambda w, m, v: w - RATE * m / bias[0] / ((v / bias[1]) ** 0.5 + TINY),
            self.weights,
            first,
            second,
        )
        self.moments = first, second

    def evaluate(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and the rebuilt patches."""
        value, rebuilt = loss(self.weights, self.jax.numpy.asarray(x))
        return float(value), np.asarray(rebuilt)


FRAMEWORKS: dict[str, Callable[[Weights], Any]] = {"torch": Torch, "jax": Jax}


def decibels(error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error."""
    # The peak is 1, which is white.
    return float(-10 * np.log10(error))


def train(model: Any, x: np.ndarray, steps: int, every: int) -> list[Report]:
    """Train; return loss, PSNR and patches before, every `every` steps, and after."""
    rng = np.random.default_rng(0)  # both frameworks draw the same rows
    seen = []
    with progress(steps, "steps") as shown:
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                value, rebuilt = model.evaluate(x)
                record = {"step": step, "loss": value, "patches": rebuilt}
                seen.append({**record, "psnr": decibels(((rebuilt - x) ** 2).mean())})
            if step < steps:
                model.step(x[np.sort(rng.choice(len(x), ROWS, replace=False))])
            shown(step)
    return seen


def plot(picture: np.ndarray, seen: list[Report], mean: float, path: Path) -> None:
    """Draw the photograph, the results before and after training, and the curves."""
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
    steps = [record["step"] for record in seen]
    axes[3].plot(steps, [record["loss"] for record in seen], "C0o-", label="loss")
    axes[3].set(xlabel="step", ylabel="loss", ylim=(0, None), title="whole photograph")
    other = axes[3].twinx()
    other.plot(steps, [record["psnr"] for record in seen], "C1s--", label="PSNR")
    other.set(ylabel="PSNR, dB")
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--quick", action="store_true", help="24 steps")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw the results to this PNG")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    steps = 24 if options.quick else options.steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    picture = photograph()
    x = patches(picture)
    # Train on patches without the mean of the photograph; `plot` adds it again.
    mean = float(x.mean())
    x -= mean
    batch, num_tokens, _ = x.shape
    print(f"qm_cupy {qm.__version__}, {options.framework}, on the CPU")
    print(f"{batch} rows of {num_tokens} patches, merged to {num_tokens // RATIO}")
    model = FRAMEWORKS[options.framework](initial_weights())
    seen = train(model, x, steps, max(steps // 8, 1))
    print(f"{'step':>6}{'loss':>10}{'PSNR, dB':>10}")
    for record in seen:
        print(f"{record['step']:>6}{record['loss']:>10.4f}{record['psnr']:>10.2f}")
    if options.plot:
        plot(picture, seen, mean, options.plot)
    if options.json:
        figures = [{k: y for k, y in f.items() if k != "patches"} for f in seen]
        write_json(options.json, {"framework": options.framework, "steps": figures})


if __name__ == "__main__":
    main()
