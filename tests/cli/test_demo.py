"""The command `demo`: it merges the patches of a picture and draws the result."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image

import qm_cupy as qm
from qm_cupy.cli.demo import cut_into_patches, join_patches, run_demo


@pytest.fixture
def options():
    return {
        "method": "ward",
        "metric": "euclidean",
        "step": None,
        "weights": "uniform",
        "noise_seed": None,
    }


def test_joined_patches_are_the_picture(rng):
    """37 × 29 pixels have 4 × 3 patches of 8 × 8; the rest is cut off."""
    picture = rng.random((37, 29, 3))
    pixels, rows = cut_into_patches(picture, 8)
    assert pixels.shape == (4 * 3, 192)  # 8 * 8 pixels of 3 colours
    np.testing.assert_array_equal(join_patches(pixels, rows, 8), picture[:32, :24])


def test_portrait(tmp_path, capsys, options):
    """Without a picture the demo uses a portrait that comes with matplotlib."""
    run_demo(None, 0.2, tmp_path, **options)
    printed = capsys.readouterr().out
    assert "4800 → 960" in printed
    for word in ("error", "norm mass", "losses", "clustering", "device", "PSNR"):
        assert word in printed
    with np.load(tmp_path / "merged.npz") as merged:
        assert merged["tokens"].shape == (960, 192)
        assert merged["sizes"].sum() == 4800
        assert set(merged) == set(qm.Merged._fields)
    with Image.open(tmp_path / "merged.png") as drawn:
        assert drawn.width > 1500  # large enough for details
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.npz", "merged.png"]


def test_picture_of_a_user(tmp_path, rng, options):
    """A grey picture is converted to colours."""
    picture = (255 * rng.random((50, 70, 3))).astype(np.uint8)
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    run_demo(tmp_path / "grey.png", 5, tmp_path / "out", **options)
    with np.load(tmp_path / "out" / "merged.npz") as merged:
        assert merged["tokens"].shape[0] == 5


@pytest.mark.parametrize(
    ("choice", "stages"),
    [
        ({"metric": "cosine"}, set()),
        ({"method": "bipartite", "step": 2}, set()),
        ({"weights": "uniform"}, set()),
        ({"weights": "saliency"}, {"saliency"}),
        ({"weights": "mass"}, {"saliency", "selection"}),
        ({"weights": "mass", "noise_seed": 3}, {"saliency", "selection"}),
    ],
)
def test_options(tmp_path, rng, capsys, options, choice, stages):
    """The demo runs the stages that the weights need; the result is `quickmerge`'s."""
    picture = (255 * rng.random((48, 64, 3))).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    run_demo(tmp_path / "picture.png", 5, tmp_path, **{**options, **choice})
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert printed & {"saliency", "selection"} == stages
    pixels, _ = cut_into_patches(picture.astype(np.float32) / 255, 8)
    tokens = pixels - pixels.mean(axis=0)
    wanted = qm.quickmerge(tokens, 5, **{**options, **choice})
    with np.load(tmp_path / "merged.npz") as merged:
        for name, x in wanted._asdict().items():
            np.testing.assert_array_equal(merged[name], x, strict=True)


def test_blank_picture(tmp_path, options):
    """All patches are equal, and their norm is 0."""
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    run_demo(tmp_path / "black.png", 0.2, tmp_path, **options)


def test_merging_beats_larger_patches():
    """A fifth of the tokens, selected by clustering, beats a coarser grid."""
    # A disc on two gradients: 256 patches of 4 × 4, merged to 51.
    y, x = np.mgrid[:64, :64] / 64
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).astype(np.float32)
    picture = np.stack([disc, x, y], axis=-1)
    pixels, _ = cut_into_patches(picture, 4)
    labels = qm.cluster_tokens(pixels, 51, method="ward", metric="euclidean")
    rebuilt = qm.unmerge_tokens(qm.merge_tokens(pixels, labels, 51), labels)
    merged_error = np.mean((rebuilt - pixels) ** 2)
    # The coarser grid: 64 patches of 8 × 8, each replaced by its mean colour.
    blocks = picture.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3), keepdims=True)
    grid = np.mean((picture.reshape(8, 8, 8, 8, 3) - blocks) ** 2)  # 64 tokens
    assert merged_error < 0.5 * grid


def test_bad_pictures(tmp_path, options):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="is not a picture"):
        run_demo(tmp_path / "text.png", 0.2, tmp_path, **options)
    Image.new("RGB", (10, 40)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="16 × 16 pixels or more, got 10 × 40"):
        run_demo(tmp_path / "small.png", 0.2, tmp_path, **options)
    with pytest.raises(FileNotFoundError):
        run_demo(tmp_path / "none.png", 0.2, tmp_path, **options)
