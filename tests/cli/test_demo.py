import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image

import qm_cupy as qm
from qm_cupy.cli.demo import cut_into_patches, embed_patches, join_patches, run_demo


@pytest.fixture
def options():
    return {"method": "ward", "seed": 0}


def test_patches_come_back(rng):
    picture = rng.random((37, 29, 3))
    pixels, rows = cut_into_patches(picture, 8)
    assert pixels.shape == (4 * 3, 192)
    np.testing.assert_array_equal(join_patches(pixels, rows, 8), picture[:32, :24])


def test_portrait(tmp_path, capsys, options):
    run_demo(None, 0.2, tmp_path, **options)
    printed = capsys.readouterr().out
    assert "4800 → 960" in printed
    for word in ("error", "norm mass", "losses", "clustering", "device", "PSNR"):
        assert word in printed
    with np.load(tmp_path / "merged.npz") as merged:
        assert merged["tokens"].shape == (960, 195)
        assert merged["sizes"].sum() == 4800
    with Image.open(tmp_path / "merged.png") as drawn:
        assert drawn.width > 1500
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.npz", "merged.png"]


def test_picture_of_ones_own(tmp_path, rng, options):
    picture = (255 * rng.random((50, 70, 3))).astype(np.uint8)
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    run_demo(tmp_path / "grey.png", 5, tmp_path / "out", **options)
    with np.load(tmp_path / "out" / "merged.npz") as merged:
        assert merged["tokens"].shape[0] == 5


def test_blank_picture(tmp_path, options):
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    run_demo(tmp_path / "black.png", 0.2, tmp_path, **options)


def test_merging_beats_larger_patches():
    """The picture's promise: a fifth of the tokens, chosen, beats a coarser grid."""
    y, x = np.mgrid[:64, :64] / 64
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).astype(np.float32)
    picture = np.stack([disc, x, y], axis=-1)
    pixels, rows = cut_into_patches(picture, 4)
    labels = qm.cluster_tokens(embed_patches(pixels, rows), 51, method="ward")
    rebuilt = qm.unmerge_tokens(qm.merge_tokens(pixels, labels, 51), labels)
    chosen = np.mean((rebuilt - pixels) ** 2)
    blocks = picture.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3), keepdims=True)
    grid = np.mean((picture.reshape(8, 8, 8, 8, 3) - blocks) ** 2)  # 64 tokens
    assert chosen < 0.5 * grid


def test_bad_pictures(tmp_path, options):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="is not a picture"):
        run_demo(tmp_path / "text.png", 0.2, tmp_path, **options)
    Image.new("RGB", (10, 40)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="16 × 16 pixels or more, got 10 × 40"):
        run_demo(tmp_path / "small.png", 0.2, tmp_path, **options)
    with pytest.raises(FileNotFoundError):
        run_demo(tmp_path / "none.png", 0.2, tmp_path, **options)
