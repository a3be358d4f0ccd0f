"""Task 3 of quality.py: photographs rebuilt from merged patches, as PSNR in dB.

The tokens of a tile are its 8 x 8 patches, minus the mean patch of the tile. A token
that pruning drops is rebuilt as the most similar of the tokens that are kept.
"""

import numpy as np
import packages
from contenders import Contender, Inside, ours
from matplotlib import cbook
from peers import (
    at_random,
    keep_best,
    kmeans,
    norms,
    tome,
    uniform_chunks,
)
from PIL import Image
from quality_tables import Report, table
from sklearn.datasets import load_sample_images

import qm_cupy as qm
from qm_cupy.cli.progress import progress

FRACTIONS = 0.5, 0.25, 0.1
TILE, PATCH = 256, 8  # pixels
STEP = 64  # tokens that ToMe merges in a step: the same fraction as 16 of 256 tokens


def tokens(inside: Inside) -> np.ndarray:
    return inside.tokens


CONTENDERS: dict[str, Contender] = {
    **{name: ours(name) for name in ("average", "ward", "complete", "single")},
    **{name: ours(name) for name in ("bipartite", "contiguous")},
    "average, Euclidean": ours(metric="euclidean"),
    "ward, Euclidean": ours("ward", metric="euclidean"),
    f"bipartite in steps of {STEP}, Euclidean": ours(
        "bipartite", metric="euclidean", step=STEP
    ),
    "k-means": kmeans(),
    "k-means, unit vectors": kmeans(unit=True),
    "ToMe in large steps, tokens": tome(tokens),
    f"ToMe in steps of {STEP}, tokens": tome(tokens, STEP),
    "uniform chunks": uniform_chunks,
    "pruned at random": keep_best(at_random),
    "pruned by norm": keep_best(norms),
}
QUICK = "ward, Euclidean", "k-means"
PEER = "k-means"  # the contender that all others are compared with


def pictures(quick: bool) -> tuple[Report, dict[str, str]]:
    """Print and return the PSNR by contender and fraction, and who did not run."""
    patches = tiles()[: 1 if quick else None, : 128 if quick else None]
    # The mean patch of each tile is subtracted. The errors do not change: adding the
    # mean back would change the tile and the rebuilt tile by the same amount.
    x = patches - patches.mean(axis=1, keepdims=True)
    # Tokens of pictures come without attention, and weigh the same.
    ones = np.ones(x.shape[:2], np.float32)
    inside = Inside(x, x, ones, ones, ones, ones)
    present, missing = packages.installed({} if quick else {"tomesd": packages.tomesd})
    names = QUICK if quick else CONTENDERS
    contenders = {name: CONTENDERS[name] for name in names} | present
    psnr = np.full((len(contenders), len(FRACTIONS), len(x)), np.nan)
    with progress(len(contenders), "contenders") as shown:
        for n, (name, contender) in enumerate(contenders.items()):
            for s, fraction in enumerate(FRACTIONS):
                # tomesd keeps at least a quarter of the tokens.
                if name == "tomesd" and fraction < 0.25:
                    continue
                psnr[n, s] = rebuilt(inside, contender, int(x.shape[1] * fraction))
            shown(n + 1)
    title = f"PSNR in dB of {len(x)} rebuilt tiles of {x.shape[1]} patches"
    columns = [f"{s:.0%}" for s in FRACTIONS]
    report = table(title, list(contenders), columns, psnr, PEER, decibels=True)
    return report, missing


def rebuilt(inside: Inside, contender: Contender, num_groups: int) -> np.ndarray:
    """Return the PSNR (B,) of tiles rebuilt from K tokens."""
    x = inside.tokens
    labels, weights = contender(inside, num_groups)
    kept = qm.merge_tokens(x, labels, num_groups, mass=weights)
    if (labels < 0).any():
        scores = qm.cosine_similarity(np.concatenate([x, kept], axis=1))
        best = scores[:, : x.shape[1], x.shape[1] :].argmax(axis=-1)
        labels = np.where(labels >= 0, labels, best)
    error = ((qm.unmerge_tokens(kept, labels) - x) ** 2).mean(axis=(1, 2))
    return -10 * np.log10(error)


def tiles() -> np.ndarray:
    """Return patches (B, N, D) of tiles of matplotlib's and scikit-learn's photos."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        photos = [np.asarray(file.convert("RGB")), *load_sample_images().images]
    # A tile is a sequence of side² patches; an edge that fills no tile is cut off.
    side, patches_by_photo = TILE // PATCH, []
    for photo in photos:
        rows, columns = (size // TILE for size in photo.shape[:2])
        cropped = photo[: rows * TILE, : columns * TILE].astype(np.float32) / 255
        patches = cropped.reshape(rows, side, PATCH, columns, side, PATCH, 3)
        patches_by_photo.append(
            patches.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, side**2, 192)
        )
    return np.concatenate(patches_by_photo)
