"""The command line: the same bits as `quickmerge`, and one line for every mistake."""

import io
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.cli import compress as command
from qm_cupy.cli import progress
from qm_cupy.cli.main import main

FORMATS = ["raw.npy", "stored.npz", "deflated.npz", "flat.safetensors"]


def save(path, **arrays):
    """Write arrays in the way that the name of the file says."""
    if path.suffix == ".npy":
        np.save(path, arrays["tokens"])
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    else:
        (np.savez_compressed if path.stem == "deflated" else np.savez)(path, **arrays)
    return path


def compress(path, *options, budget="3"):
    """Run the command; return its exit code and what it wrote."""
    output = path.with_name("out.npz")
    code = main(
        ["compress", str(path), "--budget", budget, "-o", str(output), *options]
    )
    if code:
        return code, None
    with np.load(output, allow_pickle=False) as file:
        return code, qm.Merged(**file)


def assert_same(got, wanted):
    for name in qm.Merged._fields:
        x, y = getattr(got, name), getattr(wanted, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name, strict=True)


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((7, 12, 5)).astype(np.float32)


@pytest.fixture
def mask(rng):
    return np.arange(12) < rng.integers(4, 13, 7)[:, None]


@pytest.fixture(params=[1, 2 * 12 * 5 * 4, 2**26], ids=["one", "two", "all"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(command, "_CHUNK", request.param)


@pytest.fixture
def fails(capsys):
    """Check that a command fails in one line, which holds some words."""

    def check(argv, *words):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("qm-cupy: error: ")
        assert err.count("\n") == 1
        assert out == ""
        for word in words:
            assert str(word) in err

    return check


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
        assert {p.name for p in tmp_path.iterdir()} == {name, "out.npz"}

    @pytest.mark.parametrize("name", FORMATS[1:])
    @pytest.mark.parametrize("budget", [3, 0.4])
    def test_mask(self, tmp_path, tokens, mask, name, budget):
        path = save(tmp_path / name, tokens=tokens, valid=mask)
        _, got = compress(path, "--mask", "valid", budget=str(budget))
        assert_same(got, qm.quickmerge(tokens, budget, mask=mask))

    def test_options_arrive(self, tmp_path, tokens):
        options = {
            "method": "nearest",
            "order": "first",
            "seed": 5,
            "weights": "uniform",
        }
        options |= {"temperature": 0.5, "epsilon": 0.2}
        words = [word for name, x in options.items() for word in (f"--{name}", str(x))]
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

    @pytest.mark.parametrize("kind", ["<f2", ">f2", ">f4", "<f8", ">f8"])
    @pytest.mark.parametrize("name", FORMATS[:3])
    def test_dtypes(self, tmp_path, tokens, name, kind):
        x = tokens.astype(kind)
        _, got = compress(save(tmp_path / name, tokens=x))
        assert_same(got, qm.quickmerge(x, 3))

    def test_fortran_order_in_a_mapped_file(self, tmp_path, tokens):
        x = np.asfortranarray(tokens)
        _, got = compress(save(tmp_path / "a.npy", tokens=x))
        assert_same(got, qm.quickmerge(x, 3))


def test_deflated_file_larger_than_a_chunk(tmp_path, monkeypatch, capsys):
    """60 sequences of 160 kB, worked on 13 at a time."""
    monkeypatch.setattr(command, "_CHUNK", 2**21)
    x = np.zeros((60, 20, 2000), np.float32)
    x[..., :8] = np.random.default_rng(0).standard_normal((60, 20, 8))
    path = save(tmp_path / "deflated.npz", tokens=x)
    sizes = []
    whole = command.quickmerge
    monkeypatch.setattr(
        command,
        "quickmerge",
        lambda x, *a, **k: sizes.append(x.nbytes) or whole(x, *a, **k),
    )
    _, got = compress(path, "--method", "contiguous")
    assert max(sizes) <= 2**21
    assert len(sizes) == 1 + 5  # one more, of a single token, tries the options
    assert_same(got, qm.quickmerge(x, 3, method="contiguous"))
    assert "60 x 20 x 2000 float32 -> 60 x 3 x 2000" in capsys.readouterr().out


def test_same_bytes_twice(tmp_path, tokens):
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path)
    first = path.with_name("out.npz").read_bytes()
    compress(path)
    assert path.with_name("out.npz").read_bytes() == first


def test_which_array_holds_the_tokens(tmp_path, tokens, fails):
    other = np.arange(12)
    path = save(tmp_path / "only.npz", other=other, hidden=tokens, s=tokens[0, 0])
    _, got = compress(path)
    assert_same(got, qm.quickmerge(tokens, 3))
    path = save(tmp_path / "two.npz", a=tokens, b=tokens[0], other=other)
    _, got = compress(path, "--key", "b")
    assert_same(got, qm.quickmerge(tokens[0], 3))
    rest = ["--budget", 3, "-o", tmp_path / "o.npz"]
    listing = "it holds a float32(7, 12, 5); b float32(12, 5); other int64(12,)"
    fails(["compress", path, *rest], "--key", listing)
    fails(["compress", path, *rest, "--key", "c"], "no array 'c'", listing)
    fails(["compress", path, *rest, "--key", "a", "--mask", "m"], "no array 'm'")
    path = save(tmp_path / "a.npy", tokens=tokens)
    fails(["compress", path, *rest, "--key", "a"], "--key and --mask are for")


def test_progress_on_a_terminal_only(tmp_path, tokens, monkeypatch, capsys):
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path)
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress, "_PATIENCE", 0)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(command, "_CHUNK", 1)
    compress(path)
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1] == f"[{'.' * 30}] 0 of 7 sequences"
    assert shown[-2].startswith(f"[{'#' * 30}] 7 of 7 sequences, 0 s left")
    assert shown[-1] == ""  # nothing stays on the line


class TestBadInput:
    """Each with its reason in one line, and with nothing left in the folder."""

    @pytest.fixture(autouse=True)
    def nothing_left(self, tmp_path):
        yield
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]

    @pytest.fixture
    def compress_fails(self, tmp_path, fails):
        def check(path, *words, budget="3", options=()):
            argv = ["compress", path, "--budget", budget, *options]
            fails([*argv, "-o", tmp_path / "out.npz"], *words)

        return check

    @pytest.mark.parametrize("name", FORMATS)
    def test_missing_cut_short_or_something_else(
        self, tmp_path, tokens, name, compress_fails
    ):
        path = tmp_path / name
        compress_fails(path, f"{path}: No such file or directory")
        save(path, tokens=tokens)
        whole = path.read_bytes()
        for size in (len(whole) - 100, 100, 5, 0):
            path.write_bytes(whole[:size])
            compress_fails(path, path, "cut short" if name == "raw.npy" else "damaged")
        path.write_text("not an array, whatever its name says " * 10)
        compress_fails(path, f"no {path.suffix} file")
        path.unlink()
        path.mkdir()
        compress_fails(path, f"{path}: Is a directory")

    @pytest.mark.parametrize("name", ["stored.npz", "deflated.npz"])
    def test_damage_in_the_middle(self, tmp_path, tokens, name, compress_fails):
        path = save(tmp_path / name, tokens=tokens)
        damaged = bytearray(path.read_bytes())
        damaged[1000:1004] = b"\0\1\2\3"
        path.write_bytes(damaged)
        compress_fails(path, "is damaged")

    def test_what_cannot_be_inflated(self, tmp_path, tokens, compress_fails):
        path = save(tmp_path / "deflated.npz", tokens=tokens)
        damaged = bytearray(path.read_bytes())
        name, extra = int.from_bytes(damaged[26:28], "little"), damaged[28]
        damaged[30 + name + extra] = 0xFF  # there is no such kind of block
        path.write_bytes(damaged)
        compress_fails(path, "is damaged", "invalid block type")

    def test_headers_that_lie(self, tmp_path, compress_fails):
        header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 3, 4)))
        header["shape"] = (10**9, 10**9, 10**9)
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, header)
        (tmp_path / "a.npy").write_bytes(file.getvalue())
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("tokens.npy", file.getvalue())
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
            archive.writestr("tokens.npy", b"nothing")
        (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00\x02\x00((")
        compress_fails(tmp_path / "a.npy", "cut short")
        compress_fails(tmp_path / "a.npz", "cut short")
        compress_fails(tmp_path / "b.npz", "is no array")
        compress_fails(tmp_path / "c.npy", "no .npy file")

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("shape", [(), (4,), (1, 2, 4, 3)])
    def test_wrong_ndim(self, tmp_path, name, shape, compress_fails):
        path = save(tmp_path / name, tokens=np.ones(shape, np.float32))
        compress_fails(path, "must have shape (N, D) or (B, N, D), got")

    @pytest.mark.parametrize("name", FORMATS)
    def test_empty_sequence(self, tmp_path, name, compress_fails):
        path = save(tmp_path / name, tokens=np.ones((3, 0, 2), np.float32))
        compress_fails(path, "`tokens` must not be empty")

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("kind", ["int32", "bool", "complex64"])
    def test_wrong_dtype(self, tmp_path, name, kind, compress_fails):
        path = save(tmp_path / name, tokens=np.ones((4, 3), kind))
        word = "C64" if (name, kind) == (FORMATS[3], "complex64") else kind
        compress_fails(path, word)

    @pytest.mark.parametrize("name", FORMATS[:2])
    def test_pickled_objects(self, tmp_path, name, compress_fails):
        path = save(tmp_path / name, tokens=np.full((4, 3), None))
        compress_fails(path, "pickled Python objects")

    def test_fortran_order_in_a_zip(self, tmp_path, tokens, compress_fails):
        path = save(tmp_path / "a.npz", tokens=np.asfortranarray(tokens))
        compress_fails(path, "`tokens` is in Fortran order")

    def test_bfloat16(self, tmp_path, compress_fails):
        torch = pytest.importorskip("torch")
        save_file = pytest.importorskip("safetensors.torch").save_file
        path = tmp_path / "a.safetensors"
        save_file({"x": torch.ones(4, 3, dtype=torch.bfloat16)}, path)
        compress_fails(path, "`x` is BF16")

    def test_safetensors_not_installed(
        self, tmp_path, tokens, monkeypatch, compress_fails
    ):
        path = save(tmp_path / "a.safetensors", tokens=tokens)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        compress_fails(path, 'pip install "qm-cupy[safetensors]"')

    @pytest.mark.usefixtures("chunk")
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, tmp_path, tokens, name, value, compress_fails):
        tokens[5, 8, 2] = value
        path = save(tmp_path / name, tokens=tokens)
        compress_fails(path, f"must be finite, got {value} in sequence 5, token 8")

    def test_too_large_for_the_arithmetic(self, tmp_path, tokens, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens.astype(np.float64) * 1e200)
        compress_fails(path, "sequences 0..6: the values are too large")

    @pytest.mark.parametrize(
        ("budget", "words"),
        [
            ("0", "must lie in 1..12"),
            ("13", "must lie in 1..12"),
            ("-1", "must lie in 1..12"),
            ("0.0", "must lie in (0, 1]"),
            ("1.5", "must lie in (0, 1]"),
            ("nan", "must lie in (0, 1]"),
            ("most", "'most' is neither a number K nor a share"),
        ],
    )
    def test_budget(self, tmp_path, tokens, budget, words, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens)
        compress_fails(path, words, budget=budget)

    def test_mask(self, tmp_path, tokens, mask, compress_fails):
        none, few = np.ones_like(mask), np.ones_like(mask)
        none[4], few[6, 2:] = False, False
        arrays = {"none": none, "few": few, "short": mask[:, 1:], "number": mask * 1}
        path = save(tmp_path / "a.npz", tokens=tokens, point=np.array(True), **arrays)
        compress_fails(path, "sequence (4,) has none", options=["--mask", "none"])
        compress_fails(path, "1..2 (its tokens) for seq", options=["--mask", "few"])
        compress_fails(path, "(B, N) = (7, 12), got", options=["--mask", "short"])
        compress_fails(path, "(B, N) = (7, 12), got ()", options=["--mask", "point"])
        compress_fails(path, "boolean", options=["--mask", "number"])

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("--method", "centroid", "invalid choice: 'centroid'"),
            ("--order", "middle", "invalid choice"),
            ("--weights", "none", "invalid choice"),
            ("--seed", "1.5", "invalid int value"),
            ("--seed", "-1", "`seed` must lie in 0.."),
            ("--temperature", "0", "`temperature` must lie in (0, inf)"),
            ("--epsilon", "-1", "`epsilon` must lie in [0, inf)"),
            ("--device", "tpu", "invalid choice"),
            ("--device", "cuda", "--device cuda: CuPy"),
            ("--colour", "red", "unrecognized arguments"),
        ],
    )
    def test_options(self, tmp_path, tokens, option, value, words, compress_fails):
        path = save(tmp_path / "a.npy", tokens=tokens)
        compress_fails(path, words, options=[option, value])


class TestOutput:
    def test_refused_before_any_work(self, tmp_path, tokens, fails, monkeypatch):
        source = save(tmp_path / "a.npz", tokens=tokens)
        before = source.read_bytes()
        monkeypatch.setattr(command, "_merge_chunk", None)
        (tmp_path / "folder.npz").mkdir()
        (tmp_path / "link.npz").symlink_to(source)

        def refuses(output, words):
            fails(["compress", source, "--budget", 3, "-o", tmp_path / output], words)

        refuses("nowhere/out.npz", "does not exist")
        refuses("a.npz/out.npz", "does not exist")
        refuses("out.npy", "must end in .npz")
        refuses("out", "must end in .npz")
        refuses("folder.npz", "is a folder")
        refuses("a.npz", "is the input")
        refuses("link.npz", "is the input")
        refuses("a" * 300 + ".npz", "name too long")
        assert source.read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 3

    def test_folder_without_permission(self, tmp_path, tokens, fails):
        source = save(tmp_path / "a.npy", tokens=tokens)
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        try:
            (closed / "probe").touch()
        except OSError:
            output = closed / "out.npz"
            words = f"{output}: Permission denied"
            fails(["compress", source, "--budget", 3, "-o", output], words)
        else:
            pytest.skip("this user may write anywhere")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
    def test_stopped_half_way(self, tmp_path, tokens, monkeypatch, capsys, error):
        """The file of an earlier run stays as it was, and nothing else stays."""
        source = save(tmp_path / "a.npy", tokens=tokens)
        compress(source)
        before = (tmp_path / "out.npz").read_bytes()
        monkeypatch.setattr(command, "_CHUNK", 1)
        merge = command.quickmerge

        def stop(*arguments, sequence_offset=0, **options):
            if sequence_offset == 4:
                raise error
            return merge(*arguments, sequence_offset=sequence_offset, **options)

        monkeypatch.setattr(command, "quickmerge", stop)
        capsys.readouterr()
        code, _ = compress(source, "--seed", "9")
        assert code == (130 if error is KeyboardInterrupt else 2)
        assert capsys.readouterr().err.count("\n") == 1
        assert (tmp_path / "out.npz").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 2


class TestDoctor:
    @pytest.fixture
    def report(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))

        def run(cupy):
            monkeypatch.setitem(sys.modules, "cupy", cupy)
            assert main(["doctor"]) == 0
            return capsys.readouterr().out

        return run

    def test_without_cupy(self, tmp_path, report):
        text = report(None)
        for name in ("Python", "qm-cupy", "numpy", "scipy"):
            assert f"\n{name} " in f"\n{text}"
        assert np.__version__ in text
        assert f"{tmp_path / 'cache'}, not made yet" in text
        assert "on a GPU run the CUDA kernels, all others NumPy" in text

    def test_with_a_gpu(self, tmp_path, report):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "kernel.cubin").write_bytes(bytes(2_000_000))
        device = {"name": b"NVIDIA H200", "totalGlobalMem": 139 * 2**30}
        runtime = types.SimpleNamespace(
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda index: device | {"major": 9, "minor": 0},
            driverGetVersion=lambda: 13010,
            runtimeGetVersion=lambda: 12090,
        )
        text = report(
            types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
        )
        assert "NVIDIA H200, 139.0 GiB, sm 9.0" in text
        assert "CUDA 13.1 by the driver, 12.9 by the runtime" in text
        assert "1 files, 2.0 MB" in text

    def test_cupy_that_fails(self, report):
        def fail():
            raise RuntimeError("cudaErrorInsufficientDriver:\n too old")

        runtime = types.SimpleNamespace(getDeviceCount=fail)
        text = report(
            types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
        )
        assert "RuntimeError: cudaErrorInsufficientDriver: too old" in text

    def test_cupy_that_cannot_be_imported(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "cupy.py").write_text("import libcuda_that_is_not_there")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        assert main(["doctor"]) == 0
        assert "No module named 'libcuda_that_is_not_there'" in capsys.readouterr().out


def test_no_command_and_help(fails, capsys):
    fails([], "required: COMMAND")
    fails(["compress"], "required: INPUT, --budget")
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    assert "--budget K" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sysconfig.get_path("scripts")) / "qm-cupy")],
        [sys.executable, "-m", "qm_cupy"],
    ],
    ids=["script", "module"],
)
def test_as_a_program(tmp_path, tokens, command):
    save(tmp_path / "a.npy", tokens=tokens)

    def run(*options):
        words = ["compress", "a.npy", "-o", "b.npz", *options]
        return subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--budget", "0.25")
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 x 12 x 5 float32 -> 7 x 3 x 5 in" in done.stdout
    done = run("--budget", "99")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qm-cupy: error: `budget` must lie in 1..12 (its tokens), got 99\n"
    )
