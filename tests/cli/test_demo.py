"""The command `demo`: it merges the patches of a picture and draws the result."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from command_line import assert_same
from PIL import Image

import qm_cupy as qm
from qm_cupy.cli import demo
from qm_cupy.cli.demo import run_demo
from qm_cupy.cli.main import main
from qm_cupy.cli.pictures import cut_into_patches


@pytest.fixture
def options():
    return {
        "method": "ward",
        "metric": "euclidean",
        "step": None,
        "weights": "uniform",
        "noise_seed": None,
    }


def test_portrait(tmp_path, capsys, options):
    """Without a picture the demo uses a portrait that comes with matplotlib."""
    run_demo(None, 0.2, tmp_path, **options)
    printed = capsys.readouterr().out
    assert "512 x 600, patches of 8 px\ntokens      4800 -> 960 " in printed
    assert printed.isascii()  # so that every terminal can print it
    for word in ("error", "norm mass", "losses", "clustering", "device", "PSNR"):
        assert word in printed
    merged = qm.Merged.load(tmp_path / "merged.npz")
    assert merged.tokens.shape == (960, 192)
    assert merged.sizes.sum() == 4800
    assert merged.unmerge().shape == (4800, 192)  # `load` has checked that all fits
    with Image.open(tmp_path / "merged.png") as drawn:
        assert drawn.width > 1500  # large enough for details
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.npz", "merged.png"]


def test_picture_of_a_user(tmp_path, rng, options):
    """A grey picture is converted to colours."""
    picture = (255 * rng.random((50, 70, 3))).astype(np.uint8)
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    run_demo(tmp_path / "grey.png", 5, tmp_path / "out", **options)
    merged = qm.Merged.load(tmp_path / "out" / "merged.npz")
    assert merged.tokens.shape == (5, 192)


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
    # Patches of different contrast, so that they have different weights.
    noise = rng.random((48, 64, 3)) * np.linspace(0, 1, 64)[:, None]
    picture = (255 * noise).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    run_demo(tmp_path / "picture.png", 5, tmp_path, **{**options, **choice})
    printed = capsys.readouterr().out
    words = {line.split()[0] for line in printed.splitlines()}
    assert words & {"saliency", "selection"} == stages
    pixels, _ = cut_into_patches(picture.astype(np.float32) / 255, 8)
    tokens = pixels - pixels.mean(axis=0)
    wanted = qm.quickmerge(tokens, 5, **{**options, **choice})
    assert_same(qm.Merged.load(tmp_path / "merged.npz"), wanted)
    # The picture is merged with the same weights.
    rebuilt = qm.unmerge_tokens(wanted.apply(pixels), wanted.labels)
    quality = -10 * np.log10(np.mean((rebuilt - pixels) ** 2))
    assert f"PSNR {quality:.1f} dB" in printed


def test_blank_picture(tmp_path, capsys, options):
    """All patches are equal, and their norm is 0."""
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    run_demo(tmp_path / "black.png", 1, tmp_path, **options)
    printed = capsys.readouterr().out
    assert "error       0.0000 of the squared norm, PSNR inf dB" in printed
    assert "in the largest 1 token\n" in printed


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


@pytest.mark.parametrize(
    ("width", "height", "panels"),
    [
        (64, 64, (3, 1)),
        (80, 40, (3, 1)),
        (160, 40, (1, 3)),  # wide pictures are below each other
        (40, 160, (3, 1)),
        (16_000, 16, (1, 3)),
        (16, 16_000, (3, 1)),
    ],
)
def test_the_size_of_the_drawing(tmp_path, options, rng, width, height, panels):
    """Every panel is large enough to see it, and no drawing is huge."""
    picture = rng.integers(0, 256, (height, width), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    run_demo(tmp_path / "picture.png", 0.5, tmp_path, **options)
    with Image.open(tmp_path / "merged.png") as drawn:
        columns, rows = panels
        # In pixels: half an inch is 75 of them; the longest panel has 9 or 13.2 inches.
        assert drawn.width > 75 * columns
        assert drawn.height > 75 * rows
        assert max(drawn.size) < 2200


def test_errors_come_before_the_work(tmp_path, fails, monkeypatch):
    """They leave no file and no new folder."""

    def work(*arguments, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(demo, "cluster_tokens", work)
    Image.new("L", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not a picture")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    # A folder that has the name of a result.
    (tmp_path / "full" / "merged.npz").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for image, output, words in [
        ("bad.png", "new", "bad.png is not a picture"),
        ("none.png", "new", "none.png: No such file or directory"),
        ("good.png", "bad.png", "--output must be a folder"),
        ("good.png", "link", "--output must be a folder"),
        ("good.png", "bad.png/a", "bad.png/a: Not a directory"),
        ("good.png", "full", "merged.npz is not a regular file: remove it"),
    ]:
        argv = ["demo", "--image", tmp_path / image, "--output", tmp_path / output]
        fails(argv, words)
    # The budget can be checked only when the number of tokens is known.
    argv = ["demo", "--image", tmp_path / "good.png", "--output", tmp_path / "new"]
    fails([*argv, "--budget", "1.5"], "budget")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_input_is_not_replaced(tmp_path, fails):
    Image.new("L", (20, 20)).save(tmp_path / "merged.png")
    content = (tmp_path / "merged.png").read_bytes()
    argv = ["demo", "--image", tmp_path / "merged.png", "--output", tmp_path]
    fails(argv, "merged.png is the input: rename it")
    assert (tmp_path / "merged.png").read_bytes() == content


@pytest.mark.parametrize("stage", ["cluster_tokens", "fidelity_loss", "plot", "save"])
def test_an_error_in_the_work_leaves_nothing(tmp_path, fails, monkeypatch, stage):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    # The stages in the order of the demo: the files are written last.
    if stage == "plot":
        monkeypatch.setattr("qm_cupy.plot.plot_groups", fail)
    elif stage == "save":
        monkeypatch.setattr(demo.np, "savez", fail)
    else:
        monkeypatch.setattr(demo, stage, fail)
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    argv = ["demo", "--image", tmp_path / "a.png", "--output", tmp_path / "b" / "c"]
    fails(argv, "No space left on device")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]  # not even the folder "b"


def test_a_terminal_without_unicode(tmp_path):
    """Python refuses to print a character that the encoding does not have."""
    # In a new process, because Python reads the encoding at its start.
    command = [sys.executable, "-m", "qm_cupy", "demo", "--output", "out"]
    Image.new("L", (20, 20), 9).save(tmp_path / "a.png")
    done = subprocess.run(
        [*command, "--image", "a.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"20 x 20, patches of 8 px" in done.stdout


def test_help_states_the_rules_of_numbers(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())  # lines depend on the terminal
    assert "65535 in 16 bits" in text
    assert "Floats within 0..1 stay as they are" in text
    assert text.isascii()
