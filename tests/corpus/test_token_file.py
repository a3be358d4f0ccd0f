"""Which arrays of a file are the tokens, the mask, protected tokens and attention."""

import json
import subprocess
import sys
import textwrap
import weakref
import zipfile

import numpy as np
import pytest
from command_line import FORMATS, assert_same, compress, save

import qm_cupy as qm
from qm_cupy.cli.main import main
from qm_cupy.corpus import merge_file, plan
from qm_cupy.corpus.merge_options import MergeOptions
from qm_cupy.corpus.token_file import Selection, open_tokens
from qm_cupy.memory import quickmerge_bytes


@pytest.fixture(params=[1, 2 * 12 * 5 * 4, 2**26], ids=["one", "two", "all"])
def chunk(request, monkeypatch):
    """One, two or all sequences are merged at a time."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(plan, "HINT_BYTES", max(1, request.param // 30))


@pytest.fixture
def mask(rng):
    return np.arange(12) < rng.integers(4, 13, 7)[:, None]


def test_selection_of_the_token_array(tmp_path, tokens, fails):
    other = np.arange(12)
    # `hidden` is the only array of floats with two or three axes.
    path = save(tmp_path / "only.npz", other=other, hidden=tokens, s=tokens[0, 0])
    _, got = compress(path)
    assert_same(got, qm.quickmerge(tokens, 3))
    # Here two arrays could be the tokens, so --key must name one.
    path = save(tmp_path / "two.npz", a=tokens, b=tokens[0], other=other)
    _, got = compress(path, "--key", "b")
    assert_same(got, qm.quickmerge(tokens[0], 3))
    rest = ["--budget", 3, "-o", tmp_path / "o.npz"]
    listing = "it holds a float32(7, 12, 5); b float32(12, 5); other int64(12,)"
    fails(["compress", path, *rest], path, "--key", listing)
    fails(["compress", path, *rest, "--key", "c"], path, "no array 'c'", listing)
    fails(["compress", path, *rest, "--key", "a", "--mask", "m"], "no array 'm'")
    path = save(tmp_path / "a.npy", tokens=tokens)
    for option in ("--key", "--mask", "--attention"):
        words = f"a .npy file holds one array only, so {option} needs"
        fails(["compress", path, *rest, option, "a"], words)
    assert compress(path, "--mask", "none")[0] == 0


def test_a_file_of_3000_arrays(tmp_path, tokens, compress_fails):
    arrays = {f"layer_{i}_{'x' * 100}": tokens[0] for i in range(3000)}
    path = save(tmp_path / "a.npz", **arrays)
    compress_fails(path, "give the name", "and 2997 more")
    compress_fails(path, "no array 'missing'", options=["--key", "missing"])


@pytest.mark.usefixtures("chunk")
class TestMask:
    @pytest.mark.parametrize("name", FORMATS[1:])
    @pytest.mark.parametrize("key", ["mask", "attention_mask"])
    def test_a_mask_that_the_file_has_is_used(
        self, tmp_path, tokens, mask, name, key, capsys
    ):
        # A tokenizer's mask has integers.
        values = mask.astype(np.int64) if key == "attention_mask" else mask
        path = save(tmp_path / name, tokens=tokens, **{key: values})
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3, mask=mask))
        counts = f"{mask.sum()} tokens, {(~mask).sum()} padding"
        assert f"mask {key}: {counts} (--mask none" in capsys.readouterr().out
        _, got = compress(path, "--mask", "none")
        assert_same(got, qm.quickmerge(tokens, 3))
        assert "padding" not in capsys.readouterr().out

    @pytest.mark.parametrize("name", FORMATS[1:])
    def test_padding_is_not_read(self, tmp_path, tokens, mask, name):
        # With padding of NaN, reading any of it would be an error.
        tokens[~mask] = np.nan
        path = save(tmp_path / name, tokens=tokens, mask=mask)
        _, got = compress(path, budget="0.4")
        assert_same(got, qm.quickmerge(tokens, 0.4, mask=mask))

    def test_one_row_for_all_sequences(self, tmp_path, tokens, mask):
        path = save(tmp_path / "a.npz", tokens=tokens, mask=mask[2])
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3, mask=mask[2]))

    def test_one_sequence(self, tmp_path, tokens, mask):
        path = save(tmp_path / "a.npz", tokens=tokens[0], mask=mask[0])
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens[0], 3, mask=mask[0]))

    def test_booleans_of_other_bytes(self, tmp_path, tokens, mask):
        """In a file, the byte of a boolean can be any."""
        numbers = np.where(mask, np.uint8(5), np.uint8(0)).view(np.bool_)
        path = save(tmp_path / "a.npz", tokens=tokens, mask=numbers)
        _, got = compress(path, budget="0.4")
        assert_same(got, qm.quickmerge(tokens, 0.4, mask=mask))

    def test_masks_that_cannot_be_used(self, tmp_path, tokens, mask, compress_fails):
        path = tmp_path / "a.npz"
        save(path, tokens=tokens, mask=mask, attention_mask=mask)
        compress_fails(path, "`mask` and `attention_mask`", "--mask none")
        save(path, tokens=tokens, mask=mask[:, 1:])
        compress_fails(path, path, "(B, N) = (7, 12), got (7, 11)", "--mask none")
        save(path, tokens=tokens, mask=mask.astype(float))
        compress_fails(path, path, "must be boolean or contain the integers 0 and 1")
        # Wrong sequences are named before any work.
        few, none = mask.copy(), mask.copy()
        few[6, 2:] = none[4] = False
        save(path, tokens=tokens * np.nan, mask=few)
        compress_fails(path, path, "1..2 (its tokens)")
        save(path, tokens=tokens * np.nan, mask=none)
        compress_fails(path, path, "has none (True or 1 = token)")

    @pytest.mark.parametrize("name", ["offsets", "cu_seqlens", "lengths", "doclens"])
    def test_ragged_batches(self, tmp_path, tokens, name, compress_fails):
        """They are refused, instead of merging 84 tokens as one sequence."""
        path, flat = tmp_path / "a.npz", tokens.reshape(84, 5)
        bounds = np.arange(0, 85, 12, dtype=np.int32)
        values = np.diff(bounds) if name in ("lengths", "doclens") else bounds
        save(path, tokens=flat, **{name: values})
        compress_fails(path, f"`{name}` says that the 84 tokens are sequences of diff")
        save(path, tokens=flat[None], **{name: values})
        compress_fails(path, f"`{name}` says that the 1 x 84 tokens")
        _, got = compress(path, "--mask", "none")
        assert_same(got, qm.quickmerge(flat[None], 3))
        one = np.array([84]) if name in ("lengths", "doclens") else np.array([0, 84])
        _, got = compress(save(path, tokens=flat, **{name: one}))
        assert_same(got, qm.quickmerge(flat, 3))
        # An array of text, or of two axes, says nothing about sequences.
        _, got = compress(save(path, tokens=tokens, **{name: np.zeros((7, 12), int)}))
        assert_same(got, qm.quickmerge(tokens, 3))
        path.with_name("out.npz").unlink()


@pytest.mark.usefixtures("chunk")
class TestProtect:
    @pytest.mark.parametrize(
        ("option", "positions"),
        [("--protect=0", [0]), ("--protect=-1,0", [-1, 0]), ("--protect=3,5", [3, 5])],
    )
    def test_positions(self, tmp_path, tokens, mask, option, positions):
        path = save(tmp_path / "a.npy", tokens=tokens)
        _, got = compress(path, option)
        assert_same(got, qm.quickmerge(tokens, 3, protect=positions))
        path = save(tmp_path / "a.npz", tokens=tokens, mask=mask | (np.arange(12) < 6))
        _, got = compress(path, option)
        wanted = qm.quickmerge(
            tokens, 3, protect=positions, mask=mask | (np.arange(12) < 6)
        )
        assert_same(got, wanted)

    @pytest.mark.parametrize("name", FORMATS[1:])
    def test_arrays(self, tmp_path, tokens, name):
        # Another token of each sequence.
        flags = np.zeros((7, 12), np.bool_)
        flags[np.arange(7), np.arange(7)] = True
        arrays = {"flags": flags, "row": flags[3], "positions": np.array([2, 0])}
        for key, protect in arrays.items():
            path = save(tmp_path / name, tokens=tokens, keep=protect)
            _, got = compress(path, "--protect", "keep")
            assert_same(got, qm.quickmerge(tokens, 3, protect=protect)), key
            _, got = compress(path, "--protect", "keep", "--method", "nearest")
            assert_same(
                got, qm.quickmerge(tokens, 3, protect=protect, method="nearest")
            )
        path = save(tmp_path / name, tokens=tokens[0], keep=np.array([2, 0]))
        _, got = compress(path, "--protect", "keep")
        assert_same(got, qm.quickmerge(tokens[0], 3, protect=[2, 0]))

    def test_refused(self, tmp_path, tokens, mask, compress_fails):
        path = save(
            tmp_path / "a.npz", tokens=tokens * np.nan, mask=mask, flags=mask[:, 1:]
        )
        compress_fails(path, "within 0..11", options=["--protect", "12"])
        compress_fails(path, "no array 'first'", options=["--protect", "first"])
        compress_fails(path, "(B, N) = (7, 12)", options=["--protect", "flags"])
        compress_fails(path, "must be boolean", options=["--protect", "tokens"])
        compress_fails(path, "distinct", options=["--protect", "1,1"])
        # Found before any work: the tokens are NaN.
        compress_fails(
            path,
            "sequence 0: `protect` has position 11, but",
            options=["--protect", "11"],
        )
        compress_fails(path, "budget", options=["--protect", "0,1,2,3"])


@pytest.mark.usefixtures("chunk")
class TestAttention:
    @pytest.fixture
    def attention(self, rng):
        scores = np.exp(rng.standard_normal((7, 4, 12, 12)))  # (B, H, N, N)
        return scores / scores.sum(-1, keepdims=True)

    @pytest.mark.parametrize("name", FORMATS[1:])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"weights": "uniform", "method": "single"},
            {"method": "average", "weighted_linkage": False},
            {"weights": "saliency"},
        ],
    )
    def test_the_best_row_of_the_readme(
        self, tmp_path, tokens, attention, name, options
    ):
        path = save(tmp_path / name, tokens=tokens, attn=attention)
        words = [f"--{k}={x}" for k, x in options.items() if k != "weighted_linkage"]
        if "weighted_linkage" in options:
            words.append("--no-weighted-linkage")
        _, got = compress(path, "--attention", "attn", *words)
        assert_same(got, qm.quickmerge(tokens, 3, attention=attention, **options))

    def test_forms(self, tmp_path, tokens, attention, mask):
        path = tmp_path / "a.npz"
        # Each token attends to itself and to the tokens before it.
        causal = np.tril(attention) / np.tril(attention).sum(-1, keepdims=True)
        _, got = compress(save(path, tokens=tokens, a=causal), "--attention", "a")
        assert_same(got, qm.quickmerge(tokens, 3, attention=causal))
        _, got = compress(path, "--attention", "a", "--causal")
        assert_same(got, qm.quickmerge(tokens, 3, attention=causal, causal=True))
        save(path, tokens=tokens, a=attention[:, 0], mask=mask)
        _, got = compress(path, "--attention", "a")
        assert_same(got, qm.quickmerge(tokens, 3, attention=attention[:, 0], mask=mask))
        save(path, tokens=tokens[0], a=attention[0])
        _, got = compress(path, "--attention", "a")
        assert_same(got, qm.quickmerge(tokens[0], 3, attention=attention[0]))

    def test_refused(self, tmp_path, tokens, attention, compress_fails):
        options = ["--attention", "a"]
        path = tmp_path / "a.npz"
        save(path, tokens=tokens, a=attention[None])  # layers
        compress_fails(path, "(B, H, N, N) with (B, N) = (7, 12)", options=options)
        save(path, tokens=tokens[0], a=attention)
        compress_fails(path, "(H, N, N) with (N) = 12, got (7, 4, 12", options=options)
        save(path, tokens=tokens, a=attention)
        compress_fails(path, "after the diagonal", options=[*options, "--causal"])
        save(path, tokens=tokens, a=-attention)
        compress_fails(path, path, "sequence 0: `a` must be ≥ 0", options=options)


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "options"),
        [
            (["--max-error", "0.2"], {"max_error": 0.2}),
            (["--max-distance", "0.5"], {"max_distance": 0.5}),
            (
                ["--max-distance=0.5", "--method=contiguous"],
                {"max_distance": 0.5, "method": "contiguous"},
            ),
            (
                ["--budget=3", "--weights=mass", "--weighted-linkage"],
                {"budget": 3, "weights": "mass", "weighted_linkage": True},
            ),
            (
                ["--budget=3", "--method=bipartite", "--step=2", "--metric=euclidean"],
                {"budget": 3, "method": "bipartite", "step": 2, "metric": "euclidean"},
            ),
            (
                ["--budget=3", "--weights=mass", "--noise-seed=18446744073709551615"],
                {"budget": 3, "weights": "mass", "noise_seed": 2**64 - 1},
            ),
        ],
    )
    def test_reach_quickmerge(self, tmp_path, tokens, words, options):
        path, output = save(tmp_path / "a.npy", tokens=tokens), tmp_path / "out.npz"
        assert main(["compress", str(path), "-o", str(output), *words]) == 0
        assert_same(qm.Merged.load(output), qm.quickmerge(tokens, **options))

    @pytest.mark.usefixtures("chunk")
    @pytest.mark.parametrize("weights", [(), ("--weights", "mass")])
    def test_saliency(self, tmp_path, tokens, mask, weights):
        path = save(tmp_path / "a.npz", tokens=tokens, mask=mask)
        options = {"weights": "mass"} if weights else {}
        _, got = compress(path, "--saliency", "entropy", *weights)
        wanted = qm.quickmerge(tokens, 3, hidden_states=tokens, mask=mask, **options)
        assert_same(got, wanted)
        _, got = compress(path, "--saliency", "norm", *weights)
        norms = qm.norm_saliency(tokens, mask=mask)
        assert_same(got, qm.quickmerge(tokens, 3, saliency=norms, mask=mask, **options))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                ["--saliency", "norm", "--weights", "uniform"],
                "--saliency would have no",
            ),
            (["--noise-seed", "1"], "--noise-seed would have no effect: it needs the"),
            (["--causal"], "--causal would have no effect: it needs --attention"),
            (["--max-error", "0.1"], "not allowed with argument"),
            (["--step", "1"], "`step`"),
            (["--step", str(2**63), "--method", "bipartite"], None),
            (["--step", "1" + "0" * 400, "--method", "bipartite"], "more than 64 bits"),
            (["--noise-seed", "1" + "0" * 400], "more than 64 bits"),
            (["--temperature", "1e400", "--weights", "mass"], "`temperature` must"),
            (
                ["--epsilon", "-1", "--weights", "mass"],
                "`epsilon` must lie in [0, inf)",
            ),
            (["--weighted-linkage"], "--weighted-linkage would have no effect"),
            (
                ["--weighted-linkage", "--method=single", "--weights=mass"],
                "weighted_linkage",
            ),
        ],
    )
    def test_refused(self, tmp_path, tokens, options, words, compress_fails, capsys):
        path = save(tmp_path / "a.npy", tokens=tokens)
        if words is None:  # a large value that is allowed
            assert compress(path, *options)[0] == 0
            (tmp_path / "out.npz").unlink()
            capsys.readouterr()
        else:
            compress_fails(path, words, options=options)

    @pytest.mark.parametrize(
        "number", ["1" + "0" * 400, str(2**63), str(-(2**63)), "1e400"]
    )
    def test_huge_numbers(self, tmp_path, tokens, fails, number):
        path = save(tmp_path / "a.npy", tokens=tokens)
        for option in ("--budget", "--max-error", "--max-distance"):
            argv = ["compress", path, "-o", tmp_path / "o.npz", f"{option}={number}"]
            if option == "--budget" or number.startswith("-"):
                fails(argv, "qm-cupy: error: ")
        for option in ("--protect", "--key", "--mask"):
            argv = ["compress", path, "-o", tmp_path / "o.npz", "--budget=3"]
            fails([*argv, f"{option}={number}"], "qm-cupy: error: ")


def test_errors_of_a_chunk_name_its_sequences(tmp_path, tokens, monkeypatch, fails):
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    big = tokens.astype(np.float64)
    big[4] *= 1e200
    path = save(tmp_path / "a.npy", tokens=big)
    argv = ["compress", path, "--budget", 3, "-o", tmp_path / "b.npz"]
    words = f"{path}: sequence 4: the values are too large"
    fails([*argv, "--weights", "saliency"], words)


@pytest.mark.parametrize("name", [*FORMATS, "fortran"])
@pytest.mark.parametrize("limit", ["--budget=3", "--max-distance=0.5"])
def test_one_chunk_and_one_result_are_in_memory(
    tmp_path, tokens, mask, monkeypatch, name, limit
):
    """Those of earlier chunks are gone when the next chunk is merged."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    path = tmp_path / name
    if name == "fortran":
        np.savez(path := tmp_path / "a.npz", tokens=np.asfortranarray(tokens))
    else:
        save(path, tokens=tokens, mask=mask)
    chunks, results, alive = [], [], []

    def merge(arrays, *others):
        alive.append([sum(x() is not None for x in y) for y in (chunks, results)])
        merged = merge_arrays(arrays, *others)
        chunks.append(weakref.ref(arrays["tokens"]))
        results.append(weakref.ref(merged.tokens))
        return merged

    merge_arrays = merge_file.merge_arrays
    monkeypatch.setattr(merge_file, "merge_arrays", merge)
    argv = ["compress", str(path), limit, "-o", str(tmp_path / "out.npz")]
    assert main(argv) == 0
    assert alive == [[0, 0]] + [[0, 1]] * 6


@pytest.mark.parametrize(
    ("axes", "chunk_bytes", "size", "copies"),
    [((7, 12, 5), 2**25, 7, 1), ((12, 5), 1, 1, 1), ((7, 12, 5), 1, 1, 3)],
)
def test_memory(tmp_path, monkeypatch, axes, chunk_bytes, size, copies):
    """If there are several chunks, results wait while the next chunk is read."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", chunk_bytes)
    path = save(tmp_path / "a.npy", tokens=np.ones(axes, np.float32))
    with open_tokens(path, Selection()) as file:
        needed = plan.plan(file, MergeOptions(budget=3), False).needed_bytes
    work = quickmerge_bytes((size, 12, 5), np.float32, 3)
    assert needed == plan.OTHER_BYTES + copies * size * 12 * 5 * 4 + work


def test_a_plan_is_made_after_the_import_of_scipy():
    """SciPy needs memory too: if there is none, its import may never end."""
    code = """
        import sys
        from qm_cupy.corpus.merge_options import MergeOptions, check_options
        check_options(MergeOptions(budget=3), False)
        assert {"scipy.sparse", "scipy.cluster.hierarchy"} <= {*sys.modules}
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_errors_name_a_file_with_a_short_name(tmp_path, tokens, monkeypatch, fails):
    """The name is part of every other message."""
    monkeypatch.chdir(tmp_path)
    tokens[1, 2, 3] = np.nan
    save(tmp_path / "a.npy", tokens=tokens).rename("e")
    argv = "compress", "e", "-o", "b.npz", "--budget"
    fails([*argv, 3], "error: e: sequence 1: `tokens` must be finite")
    fails([*argv, 100], "error: e: `budget` must lie in")


def test_json_is_all_that_is_printed(tmp_path, tokens, capsys):
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path, "--json")
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["merged_shape"] == [7, 3, 5]


@pytest.mark.usefixtures("chunk")
class TestClip:
    """`--clip`: short sequences keep their tokens, and do not refuse the whole file."""

    @pytest.fixture
    def mask(self):
        return np.arange(12) < np.array([[12], [1], [2], [3], [4], [9], [12]])

    # K of each sequence of 12, 1, 2, 3, 4, 9 and 12 tokens.
    @pytest.mark.parametrize(
        ("options", "counts"),
        [
            (["--budget=3"], [3, 1, 2, 3, 3, 3, 3]),
            (["--budget=0.25"], [3, 1, 1, 1, 1, 2, 3]),
            # The first and the last token are protected, and the others need a group.
            (["--budget=2", "--protect=keep"], [3, 1, 2, 3, 3, 3, 3]),
            (["--budget=0.25", "--protect=keep"], [3, 1, 2, 3, 3, 3, 3]),
        ],
    )
    @pytest.mark.parametrize("method", ["average", "nearest"])
    def test_budgets(self, tmp_path, tokens, mask, options, counts, method, fails):
        rows, last = np.arange(7), mask.sum(-1) - 1
        keep = np.zeros_like(mask)
        keep[:, 0] = keep[rows, last] = True
        path = save(tmp_path / "a.npz", tokens=tokens, mask=mask, keep=keep)
        output = tmp_path / "out.npz"
        argv = ["compress", str(path), "-o", str(output), *options]
        argv += ["--method", method]
        if options != ["--budget=0.25"]:
            fails(argv, f"{path}: sequence ")
        assert main([*argv, "--clip"]) == 0
        protect = keep if "--protect=keep" in options else None
        wanted = qm.quickmerge(
            tokens, np.array(counts), mask=mask, protect=protect, method=method
        )
        assert_same(qm.Merged.load(output), wanted)

    def test_one_sequence(self, tmp_path, tokens):
        path = save(tmp_path / "a.npy", tokens=tokens[0])
        _, got = compress(path, "--clip", budget="99")
        assert_same(got, qm.quickmerge(tokens[0], 12))
        _, got = compress(path, "--clip", "--protect=0,5,-1", budget="1")
        assert_same(got, qm.quickmerge(tokens[0], 4, protect=[0, 5, -1]))

    def test_refused(self, tmp_path, tokens, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens)
        compress_fails(path, "at least 1, got 0", budget="0", options=["--clip"])
        compress_fails(path, "(0, 1]", budget="1.5", options=["--clip"])


def test_files_of_other_programs(tmp_path, tokens, compress_fails):
    """What is in them is said, instead of a fault that the user cannot understand."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:  # as torch.save writes it
        archive.writestr("model/data.pkl", b"text")
    compress_fails(path, "is a zip that holds no .npy arrays (a file of torch?")
    (tmp_path / "a.npy").write_bytes(b"")
    compress_fails(tmp_path / "a.npy", "a.npy is empty")
    (tmp_path / "a.npy").write_bytes(b"text, not an array")
    compress_fails(tmp_path / "a.npy", "does not start like a .npy file")


def test_a_header_of_python_2(tmp_path, tokens, capsys):
    """NumPy warns of it, which would be a second line on the terminal."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    content = path.read_bytes().replace(b"(7, 12, 5)", b"(7L,12,5) ")
    path.write_bytes(content)
    _, got = compress(path)
    assert_same(got, qm.quickmerge(tokens, 3))
    assert capsys.readouterr().err == ""
