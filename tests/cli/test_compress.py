"""The command `compress`: results of `quickmerge` bit for bit, errors of one line."""

import numpy as np
import pytest
from command_line import FORMATS, assert_same, compress, save

import qm_cupy as qm
from qm_cupy.corpus import merge_options, plan


# 7 sequences of 4 to 12 tokens.
@pytest.fixture
def mask(rng):
    return np.arange(12) < rng.integers(4, 13, 7)[:, None]


# A sequence has 12 tokens of 5 floats of 4 bytes: one, two or all sequences at a time.
@pytest.fixture(params=[1, 2 * 12 * 5 * 4, 2**26], ids=["one", "two", "all"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk")
class TestCompress:
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize(("text", "budget"), [("3", 3), ("0.4", 0.4), ("1.0", 1.0)])
    def test_chunks_give_the_bits_of_the_whole(
        self, tmp_path, tokens, name, text, budget
    ):
        path = save(tmp_path / name, tokens=tokens)
        code, got = compress(path, budget=text)
        assert code == 0
        assert_same(got, qm.quickmerge(tokens, budget))
        # No temporary file stays in the folder.
        assert {p.name for p in tmp_path.iterdir()} == {name, "out.npz"}

    # A .npy file holds one array, so it cannot have a mask.
    @pytest.mark.parametrize("name", FORMATS[1:])
    @pytest.mark.parametrize("budget", [3, 0.4])
    def test_mask(self, tmp_path, tokens, mask, name, budget):
        path = save(tmp_path / name, tokens=tokens, valid=mask)
        _, got = compress(path, "--mask", "valid", budget=str(budget))
        assert_same(got, qm.quickmerge(tokens, budget, mask=mask))

    @pytest.mark.parametrize("name", FORMATS[1:])
    def test_masks_of_integers_and_of_one_axis(self, tmp_path, tokens, mask, name):
        arrays = {"numbers": mask.astype(np.int64), "row": mask[2]}
        path = save(tmp_path / name, tokens=tokens, **arrays)
        _, got = compress(path, "--mask", "numbers")
        assert_same(got, qm.quickmerge(tokens, 3, mask=mask))
        _, got = compress(path, "--mask", "row")
        assert_same(got, qm.quickmerge(tokens, 3, mask=mask[2]))

    def test_options_reach_quickmerge(self, tmp_path, tokens):
        # None of these is a default.
        options = {
            "method": "nearest",
            "order": "first",
            "noise_seed": 5,
            "weights": "mass",
        }
        options |= {"temperature": 0.5, "epsilon": 0.2}
        words = []
        for name, x in options.items():
            words += [f"--{name.replace('_', '-')}", str(x)]
        _, got = compress(save(tmp_path / "a.npy", tokens=tokens), *words)
        assert_same(got, qm.quickmerge(tokens, 3, **options))

    @pytest.mark.parametrize("name", FORMATS)
    def test_one_sequence(self, tmp_path, tokens, name):
        _, got = compress(save(tmp_path / name, tokens=tokens[0]))
        assert_same(got, qm.quickmerge(tokens[0], 3))

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("budget", [3, 0.4])
    def test_empty_batch(self, tmp_path, tokens, name, budget):
        _, got = compress(save(tmp_path / name, tokens=tokens[:0]), budget=str(budget))
        assert_same(got, qm.quickmerge(tokens[:0], budget))

    # Big-endian files (">") give results in the byte order of the machine.
    @pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", "<f8", ">f8"])
    @pytest.mark.parametrize("name", FORMATS[:3])
    def test_dtypes(self, tmp_path, tokens, name, dtype):
        x = tokens.astype(dtype)
        _, got = compress(save(tmp_path / name, tokens=x))
        assert_same(got, qm.quickmerge(x, 3))

    def test_fortran_order_in_a_mapped_file(self, tmp_path, tokens):
        x = np.asfortranarray(tokens)
        _, got = compress(save(tmp_path / "a.npy", tokens=x))
        assert_same(got, qm.quickmerge(x, 3))


def test_deflated_file_larger_than_a_chunk(tmp_path, monkeypatch, capsys):
    """60 sequences of 160 kB, of which 13 are merged at a time."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 2**21)  # 13 * 160,000 bytes fit
    x = np.zeros((60, 20, 2000), np.float32)
    x[..., :8] = np.random.default_rng(0).standard_normal((60, 20, 8))
    path = save(tmp_path / "deflated.npz", tokens=x)
    sizes = []
    whole = merge_options.quickmerge
    monkeypatch.setattr(
        merge_options,
        "quickmerge",
        lambda x, *a, **k: sizes.append(x.nbytes) or whole(x, *a, **k),
    )
    _, got = compress(path, "--method", "contiguous")
    assert max(sizes) <= 2**21
    # Five chunks: 60 / 13, rounded up. The call before them merges a single token, to
    # check the options.
    assert len(sizes) == 1 + 5
    assert_same(got, qm.quickmerge(x, 3, method="contiguous"))
    assert "60 x 20 x 2000 float32 -> 60 x 3 x 2000" in capsys.readouterr().out


class TestBadInput:
    """An error has its reason in one line, and no file is left in the folder."""

    @pytest.mark.usefixtures("chunk")
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, tmp_path, tokens, name, value, compress_fails):
        # The message counts sequences of the file, not of the chunk.
        tokens[5, 8, 2] = value
        path = save(tmp_path / name, tokens=tokens)
        compress_fails(
            path, f"sequence 5: `tokens` must be finite, got {value} at index (8, 2)"
        )

    def test_too_large_for_the_arithmetic(self, tmp_path, tokens, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens.astype(np.float64) * 1e200)
        words = "sequence 0: the values are too large"
        compress_fails(path, words, options=["--weights", "saliency"])

    @pytest.mark.parametrize(
        ("budget", "words"),
        [
            ("0", "must lie in 1..12"),
            ("13", "must lie in 1..12"),
            ("-1", "must lie in 1..12"),
            ("0.0", "must lie in (0, 1]"),
            ("1.5", "must lie in (0, 1]"),
            ("nan", "must lie in (0, 1]"),
            ("most", "'most' is neither a number of tokens"),
        ],
    )
    def test_budget(self, tmp_path, tokens, budget, words, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens)
        compress_fails(path, words, budget=budget)

    def test_mask(self, tmp_path, tokens, mask, compress_fails):
        # Sequence 4 without tokens; sequence 6 with 2 tokens, fewer than K = 3; a mask
        # of 11 columns; a mask with the number 2; a mask without axes.
        empty, few = np.ones_like(mask), np.ones_like(mask)
        empty[4], few[6, 2:] = False, False
        arrays = {"empty": empty, "few": few, "short": mask[:, 1:], "number": mask * 2}
        path = save(tmp_path / "a.npz", tokens=tokens, point=np.array(True), **arrays)
        compress_fails(
            path, "sequence 4: `empty` must leave", options=["--mask", "empty"]
        )
        compress_fails(
            path, "sequence 6: `budget` must lie in 1..2", options=["--mask", "few"]
        )
        compress_fails(path, "(B, N) = (7, 12), got", options=["--mask", "short"])
        compress_fails(path, "(B, N) = (7, 12), got ()", options=["--mask", "point"])
        compress_fails(path, "only 0 and 1", options=["--mask", "number"])

    # argparse refuses some values, and `quickmerge` the others: both in one line.
    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("--method", "centroid", "invalid choice: 'centroid'"),
            ("--order", "middle", "invalid choice"),
            ("--weights", "none", "invalid choice"),
            (
                "--weights",
                "attention",
                "--weights attention needs the attention",
            ),
            ("--noise-seed", "1.5", "is not an integer"),
            ("--noise-seed", "-1", "--noise-seed would have no effect"),
            ("--seed", "1", "unrecognized arguments"),
            ("--temperature", "0", "--temperature would have no effect"),
            ("--epsilon", "-1", "--epsilon would have no effect"),
            ("--device", "tpu", "invalid choice"),
            ("--device", "cuda", "--device cuda: CuPy"),
            ("--colour", "red", "unrecognized arguments"),
        ],
    )
    def test_options(self, tmp_path, tokens, option, value, words, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens)
        compress_fails(path, words, options=[option, value])
