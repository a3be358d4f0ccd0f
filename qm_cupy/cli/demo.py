"""The command `demo`: merge the patches of a picture, by default to a fifth of them."""

import argparse
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_seed
from ..atomic_write import atomic_write
from ..install_advice import install_command
from ..priors.mlp_prior import MLPPrior
from ..results import Merged
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
from .output import print_summary
from .output_folder import output_folder
from .pictures import cut_into_patches, join_patches, patch_side, read_picture


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
        help="picture to merge (default: a portrait that comes with matplotlib). Of "
        "several pictures in a file, the first one is read. Transparent pixels become "
        "white. White is 255 in 8 bits and 65535 in 16 bits. Floats within 0..1 stay "
        "as they are; for other floats, and for 32-bit integers, the smallest value "
        "becomes black and the largest one white",
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
    """Merge the patches of a picture, write the results, and print the measurements."""
    if noise_seed is not None:
        check_seed(noise_seed, "noise_seed")
        if weights != "mass":
            raise ValueError(
                "--noise-seed would have no effect: it needs the weights mass"
            )
    source = _source(image)
    picture = read_picture(source)  # (height, width, 3) within 0..1
    patch = patch_side(*picture.shape[:2])
    pixels, rows = cut_into_patches(picture, patch)  # (N, patch·patch·3)
    tokens = pixels - pixels.mean(axis=0)  # cosines of positive numbers are all alike
    num_groups = token_budget(budget, len(tokens))
    drawing, archive = output / "merged.png", output / "merged.npz"
    with output_folder(output, source, drawing, archive):
        seconds: dict[str, float] = {}  # of each stage
        merged = _merge(
            tokens, num_groups, method, metric, step, weights, noise_seed, seconds
        )
        # Merge the pixels in the same way, to draw the merged picture.
        few_pixels = merge_tokens(pixels, merged.labels, num_groups, mass=merged.mass)
        rebuilt = unmerge_tokens(few_pixels, merged.labels)  # (N, patch·patch·3)
        quality = _psnr(pixels, rebuilt)
        measures = _measure(tokens, merged, quality, seconds)
        content = _draw(
            join_patches(pixels, rows, patch),
            join_patches(rebuilt, rows, patch),
            merged.labels.reshape(rows, -1),
            _tokens(len(tokens)),
            f"{_tokens(num_groups)}, PSNR {quality:.1f} dB",
        )
        # Both files or none: after an error, both temporary files are deleted.
        with atomic_write(archive) as file, atomic_write(drawing) as other:
            np.savez(file, allow_pickle=False, **merged._asdict())
            file.flush()  # a full disk is an error now, before a file is renamed
            other.write(content)
    size = f"{picture.shape[1]} x {picture.shape[0]}"
    shapes = f"{len(tokens)} -> {num_groups}  ({tokens.shape[-1]} wide"
    lines = [
        f"picture     {size}, patches of {patch} px",
        f"tokens      {shapes}, {method}, {metric})",
        *measures,
        f"wrote       {drawing}, {archive}",
    ]
    print_summary("\n".join(lines))


def _source(image: Path | None) -> Path:
    """Return the path of the picture, which is matplotlib's portrait for None."""
    try:
        from matplotlib import cbook
    except ImportError as error:
        message = f"the demo needs matplotlib: {install_command('plot')}"
        raise ImportError(message) from error
    return image or Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def _merge(
    tokens: NDArray[Any],
    num_groups: int,
    method: Method,
    metric: Metric,
    step: int | None,
    weights: str,
    noise_seed: int | None,
    seconds: dict[str, float],
) -> Merged[NDArray[Any]]:
    """Call the stages of `quickmerge` one by one, to time each of them."""
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
    sizes, positions = (
        group_sizes(labels, num_groups),
        group_positions(labels, num_groups),
    )
    return Merged(merged, labels, sizes, positions, mass)


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _psnr(pixels: NDArray[Any], rebuilt: NDArray[Any]) -> float:
    """Return -10 · log10(mean squared error), in decibels for values within 0..1."""
    squared_error = float(np.mean((pixels - rebuilt) ** 2))
    return -10 * float(np.log10(squared_error)) if squared_error > 0 else np.inf


def _measure(
    tokens: NDArray[Any],
    merged: Merged[NDArray[Any]],
    quality: float,
    seconds: dict[str, float],
) -> list[str]:
    """Return one line for each measurement and stage."""
    num_groups = len(merged.tokens)
    with _timed("alignment", seconds):
        loss = alignment_loss(merged.tokens, MLPPrior.init(tokens.shape[-1]))
    with _timed("fidelity", seconds):
        error = reconstruction_error(tokens, merged.tokens, labels=merged.labels)
        mass_kept = norm_mass(tokens, num_groups)
        fidelity = fidelity_loss(tokens, merged.tokens, labels=merged.labels)
    return [
        f"error       {error:.4f} of the squared norm, PSNR {quality:.1f} dB",
        f"norm mass   {mass_kept:.4f} in the largest {_tokens(num_groups)}",
        f"losses      alignment {loss.total:.4f} (untrained prior), "
        f"fidelity {fidelity:.4f}",
        *(f"{stage:<11} {1e3 * value:7.1f} ms" for stage, value in seconds.items()),
        "device      CPU (NumPy)",
    ]


def _draw(
    picture: NDArray[Any],
    rebuilt: NDArray[Any],
    labels: NDArray[Any],
    before: str,
    after: str,
) -> bytes:
    """Draw the picture, the picture with outlined groups, and the rebuilt picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..plot import plot_groups

    height, width = picture.shape[:2]
    # Wide pictures are drawn below each other, others side by side.
    columns = 1 if width > 2.5 * height else 3
    # Inches of a panel. A very long picture is stretched, so that its short side has
    # half an inch.
    scale = min(13.2 / columns / width, 9 / height)
    panel = max(scale * width, 0.5), max(scale * height, 0.5)
    aspect: Literal["equal", "auto"] = "auto" if 0.5 in panel else "equal"
    # The width has room for the titles.
    size = max(columns * panel[0], 7.5) + 0.3, 3 // columns * (panel[1] + 0.4)
    # Make the figure without pyplot, which could open a window or change the backend.
    figure = Figure(figsize=size, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(3 // columns, columns)
    panels[0].imshow(picture)
    # Thin lines on small patches; a point is 1/72 of an inch.
    points = 72 * min(panel[0] / labels.shape[1], panel[1] / labels.shape[0])
    plot_groups(
        labels.ravel(),
        grid=labels.shape,
        picture=picture,
        linewidth=min(0.6, 0.12 * points),
        ax=panels[1],
    )
    panels[2].imshow(rebuilt.clip(0, 1))
    middle = "groups" if aspect == "equal" else "groups (not to scale)"
    for axes, title in zip(panels, (before, middle, after), strict=True):
        axes.set(title=title, xticks=[], yticks=[], aspect=aspect)
    for axes in panels[::2]:
        axes.set_axis_off()
    content = io.BytesIO()
    canvas.print_figure(content, dpi=150, format="png")
    return content.getvalue()


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Store the duration of the ``with`` block in `seconds`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
