"""The command `demo`: merge the patches of a picture, by default to a fifth of them."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write
from ..install_advice import install_command
from ..priors.mlp_prior import MLPPrior
from ..stages.alignment.alignment_loss import alignment_loss
from ..stages.budget import token_budget
from ..stages.clustering.cluster_tokens import Method, cluster_tokens
from ..stages.clustering.metrics import Metric
from ..stages.fidelity.fidelity_loss import fidelity_loss
from ..stages.fidelity.norm_mass import norm_mass
from ..stages.fidelity.reconstruction_error import reconstruction_error
from ..stages.merging.groups import group_positions, group_sizes
from ..stages.merging.merge_tokens import merge_tokens
from ..stages.merging.unmerge_tokens import unmerge_tokens
from ..stages.saliency.saliency import saliency
from ..stages.saliency.self_attention_entropy import self_attention_entropy
from ..stages.selection.gumbel_softmax import gumbel_softmax
from ..stages.selection.saliency_mass import saliency_mass
from .options import add_budget, add_method, add_noise_seed, add_weights

# The largest number of tokens. A larger picture has larger patches.
_MAX_TOKENS = 5000
_MIN_PATCH = 8  # the smallest side of a square patch, in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.description = (
        "Merge the patches of a picture, print errors, losses and times, and write "
        "merged.png and merged.npz to FOLDER."
    )
    add = parser.add_argument
    add(
        "--image",
        type=Path,
        metavar="PATH",
        help="picture to merge (default: a portrait that comes with matplotlib)",
    )
    add_budget(parser, default=0.2)
    add(
        "--output",
        type=Path,
        default=Path("qm-cupy-demo"),
        metavar="FOLDER",
        help="folder to write the results to (default: qm-cupy-demo)",
    )
    add_method(parser, default="ward", metric="euclidean")
    add_weights(parser)
    add_noise_seed(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    run_demo(
        arguments.image,
        arguments.budget,
        arguments.output,
        method=arguments.method,
        metric=arguments.metric,
        step=arguments.step,
        weights=arguments.weights,
        noise_seed=arguments.noise_seed,
    )


def run_demo(
    image: Path | None,
    budget: Any,
    output: Path,
    *,
    method: Method,
    metric: Metric,
    step: int | None,
    weights: str,
    noise_seed: int | None,
) -> None:
    """Merge the patches of a picture, print the measurements, and write the results."""
    picture = _read_picture(image)  # (height, width, 3) within 0..1
    # The side of a patch: at least _MIN_PATCH, and so large that the picture has no
    # more than _MAX_TOKENS whole patches.
    patch = max(_MIN_PATCH, int(np.ceil(np.sqrt(picture[..., 0].size / _MAX_TOKENS))))
    pixels, rows = cut_into_patches(picture, patch)  # (N, patch·patch·3)
    tokens = pixels - pixels.mean(axis=0)  # cosines of positive numbers are all alike
    num_groups = token_budget(budget, len(tokens))
    output.mkdir(parents=True, exist_ok=True)

    # Call the stages of `quickmerge` one by one, to time each of them.
    seconds: dict[str, float] = {}
    mass = np.ones(len(tokens), np.float32)
    if weights != "uniform":
        with _timed("saliency", seconds):
            scores = mass = saliency(self_attention_entropy(tokens))
    if weights == "mass":
        with _timed("selection", seconds):
            mass = saliency_mass(scores, gumbel_softmax(scores, seed=noise_seed))
    with _timed("clustering", seconds):
        labels = cluster_tokens(
            tokens, num_groups, method=method, metric=metric, step=step
        )
    with _timed("merging", seconds):
        merged = merge_tokens(tokens, labels, num_groups, mass=mass)  # (K, D)
        # Merge the pixels in the same way, to draw the merged picture.
        rebuilt = unmerge_tokens(
            merge_tokens(pixels, labels, num_groups, mass=mass), labels
        )
    with _timed("alignment", seconds):
        loss = alignment_loss(merged, MLPPrior.init(tokens.shape[-1]))
    with _timed("fidelity", seconds):
        error = reconstruction_error(tokens, merged, labels=labels)
        mass_kept = norm_mass(tokens, num_groups)
        fidelity = fidelity_loss(tokens, merged, labels=labels)

    # PSNR = -10 · log10(mean squared error), in decibels for values within 0..1
    squared_error = float(np.mean((pixels - rebuilt) ** 2))
    quality = -10 * np.log10(squared_error) if squared_error > 0 else np.inf
    print(f"picture     {picture.shape[1]} × {picture.shape[0]}, patches of {patch} px")
    shapes = f"{len(tokens)} → {num_groups}  ({tokens.shape[-1]} wide"
    print(f"tokens      {shapes}, {method}, {metric})")
    print(f"error       {error:.4f} of the squared norm, PSNR {quality:.1f} dB")
    print(f"norm mass   {mass_kept:.4f} in the {num_groups} largest tokens")
    print(f"losses      alignment {loss.total:.4f} (untrained prior), ", end="")
    print(f"fidelity {fidelity:.4f}")
    for stage, value in seconds.items():
        print(f"{stage:<11} {1e3 * value:7.1f} ms")
    print("device      CPU (NumPy)")

    arrays = {
        "tokens": merged,
        "labels": labels,
        "sizes": group_sizes(labels, num_groups),
        "positions": group_positions(labels, num_groups),
        "mass": mass,
    }
    archive, figure = output / "merged.npz", output / "merged.png"
    with atomic_write(archive) as file:
        np.savez(file, allow_pickle=False, **arrays)
    with atomic_write(figure) as file:
        _draw(
            file,
            join_patches(pixels, rows, patch),
            join_patches(rebuilt, rows, patch),
            labels.reshape(rows, -1),
            f"{len(tokens)} tokens",
            f"{num_groups} tokens, PSNR {quality:.1f} dB",
        )
    print(f"wrote       {figure}, {archive}")


def _read_picture(image: Path | None) -> NDArray[Any]:
    """Return a picture (height, width, 3) in float32 within 0..1."""
    try:
        from matplotlib import cbook
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        message = f"the demo needs matplotlib: {install_command('plot')}"
        raise ImportError(message) from error
    source: Any = image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    try:
        with Image.open(source) as opened:
            picture = np.asarray(opened.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"`{source}` is not a picture that Pillow can read") from None
    if min(picture.shape[:2]) < 2 * _MIN_PATCH:
        size = f"{picture.shape[1]} × {picture.shape[0]}"
        raise ValueError(f"the picture must have 16 × 16 pixels or more, got {size}")
    return picture.astype(np.float32) / 255


def cut_into_patches(picture: NDArray[Any], patch: int) -> tuple[NDArray[Any], int]:
    """Return the patches (N, patch·patch·3) in raster order, and how many rows of them.

    `patch` is the side of a patch in pixels.
    """
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    whole = picture[: rows * patch, : columns * patch]  # without the partial patches
    # (rows, columns, patch, patch, 3)
    patches = whole.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    return patches.reshape(rows * columns, -1), rows


def join_patches(pixels: NDArray[Any], rows: int, patch: int) -> NDArray[Any]:
    """Return the picture that `cut_into_patches` cut into these patches."""
    patches = pixels.reshape(rows, -1, patch, patch, 3).swapaxes(1, 2)
    return patches.reshape(rows * patch, -1, 3)


def _draw(
    file: BinaryIO,
    picture: NDArray[Any],
    rebuilt: NDArray[Any],
    labels: NDArray[Any],
    before: str,
    after: str,
) -> None:
    """Draw the picture, the picture with outlined groups, and the rebuilt picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..plot import plot_groups

    height, width = picture.shape[:2]
    # Make the figure without pyplot, which could open a window or change the backend.
    figure = Figure(figsize=(13.5, 4.4 * height / width + 0.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    panels[0].imshow(picture)
    plot_groups(
        labels.ravel(), grid=labels.shape, picture=picture, linewidth=0.6, ax=panels[1]
    )
    panels[2].imshow(rebuilt.clip(0, 1))
    for panel, title in zip(panels, (before, "groups", after), strict=True):
        panel.set(title=title, xticks=[], yticks=[])
    for panel in panels[::2]:
        panel.set_axis_off()
    canvas.print_figure(file, dpi=150, format="png")


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Store the duration of the ``with`` block in `seconds`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
