"""Files of a `Merged`: what `save` writes, and what `load` refuses."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from command_line import compress, save
from conftest import to_library

import qm_cupy as qm

SUFFIXES = ".npz", ".safetensors"


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"plan{request.param}"


@pytest.fixture
def merged(rng):
    tokens = rng.standard_normal((2, 9, 6)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [6]])
    return qm.quickmerge(tokens, np.array([4, 2]), mask=mask)


def assert_same(got, wanted):
    assert type(got) is qm.Merged
    for x, y in zip(got, wanted, strict=True):
        assert type(x) is np.ndarray
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, strict=True)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("single", [False, True])
    def test_dtypes_and_shapes(self, path, rng, dtype, single):
        if dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        tokens = rng.standard_normal((2, 9, 6)).astype(dtype)
        merged = qm.quickmerge(tokens[0] if single else tokens, 4)
        merged.save(path)
        assert_same(qm.Merged.load(path), merged)

    def test_padding_and_an_empty_batch(self, path, merged):
        for wanted in (merged, qm.Merged(*(x[:0] for x in merged))):
            wanted.save(str(path))
            assert_same(qm.Merged.load(str(path)), wanted)

    def test_any_library(self, path, library, merged):
        qm.Merged(*(to_library(library, x) for x in merged)).save(path)
        assert_same(qm.Merged.load(path), merged)

    def test_a_tensor_that_requires_grad(self, path, merged):
        torch = pytest.importorskip("torch")
        tensors = qm.Merged(*map(torch.tensor, merged))
        tensors._replace(tokens=tensors.tokens.requires_grad_()).save(path)
        assert_same(qm.Merged.load(path), merged)

    # safetensors writes wrong values of arrays that are not C-contiguous.
    def test_strided_arrays(self, path, merged):
        strided = qm.Merged(*(np.repeat(x, 2, axis=-1)[..., ::2] for x in merged))
        fortran = qm.Merged(*map(np.asfortranarray, merged))
        for same in (strided, fortran):
            same.save(path)
            assert_same(qm.Merged.load(path), merged)

    def test_same_bytes_twice(self, path, merged):
        merged.save(path)
        first = path.read_bytes()
        merged.save(path)
        assert path.read_bytes() == first

    def test_other_programs_read_the_file(self, path, merged):
        merged.save(path)
        if path.suffix == ".npz":
            arrays = np.load(path, allow_pickle=False)
        else:
            arrays = pytest.importorskip("safetensors.numpy").load_file(path)
        assert_same(qm.Merged(**arrays), merged)

    @pytest.mark.parametrize("options", [(), ("--weights", "mass")])
    @pytest.mark.parametrize("single", [False, True])
    def test_a_file_of_the_command_line(self, tmp_path, rng, options, single):
        tokens = rng.standard_normal((3, 9, 6)).astype(np.float32)
        source = save(tmp_path / "a.npy", tokens=tokens[0] if single else tokens)
        _, wanted = compress(source, *options)
        assert_same(qm.Merged.load(tmp_path / "out.npz"), wanted)

    # `numpy.savez` of a file that was read; `compressed` and Fortran order are valid.
    def test_a_file_of_numpy(self, tmp_path, merged):
        path = tmp_path / "a.npz"
        for write in (np.savez, np.savez_compressed):
            write(
                path, **{k: np.asfortranarray(x) for k, x in merged._asdict().items()}
            )
            assert_same(qm.Merged.load(path), merged)
        np.savez(path, **merged._asdict(), note=np.array(["more"]))
        assert_same(qm.Merged.load(path), merged)


class TestSave:
    def test_an_unknown_ending(self, tmp_path, merged):
        for call in (merged.save, qm.Merged.load):
            with pytest.raises(ValueError, match=r"must end in \.npz or \.safetensors"):
                call(tmp_path / "plan.npy")
        assert not [*tmp_path.iterdir()]

    def test_no_folder(self, path, merged):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            merged.save(path.parent / "nowhere" / path.name)

    def test_a_failed_write_leaves_the_old_file(self, path, merged, monkeypatch):
        merged.save(path)
        before = path.read_bytes()

        def fail(descriptor):
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            merged._replace(tokens=2 * merged.tokens).save(path)
        assert path.read_bytes() == before
        assert [*path.parent.iterdir()] == [path]

    def test_fields_that_do_not_fit_are_not_written(self, path, merged):
        with pytest.raises(ValueError, match="`sizes` must be"):
            merged._replace(sizes=merged.sizes + 1).save(path)
        assert not path.exists()

    def test_a_tracer(self, path, merged):
        jax = pytest.importorskip("jax")
        with pytest.raises(TypeError, match="is a JAX tracer"):
            jax.jit(lambda merged: merged.save(path))(merged)


def changed(merged, **fields):
    return {**merged._asdict(), **fields}


FAULTS = {
    "labels above": (lambda m: {"labels": m.labels + 1}, "`labels` must lie in -1..3"),
    "labels below": (lambda m: {"labels": m.labels - 9}, "`labels` must lie in -1..3"),
    "labels int64": (lambda m: {"labels": m.labels.astype(np.int64)}, "labels"),
    "labels (N,)": (lambda m: {"labels": m.labels[0]}, r"`labels` must have shape"),
    "labels ()": (lambda m: {"labels": m.labels[0, 0]}, r"`labels` must have shape"),
    "sizes": (lambda m: {"sizes": m.sizes + 1}, "`sizes` must be the numbers"),
    "sizes shape": (lambda m: {"sizes": m.sizes[:, :2]}, "`sizes` must have shape"),
    "positions": (lambda m: {"positions": m.positions * 0}, "`positions` must be"),
    "mass shape": (lambda m: {"mass": m.mass[:, :5]}, "`mass` must have shape"),
    "mass < 0": (lambda m: {"mass": -m.mass}, "`mass` must be ≥ 0"),
    "mass nan": (lambda m: {"mass": m.mass * np.float32(np.nan)}, "`mass` must be"),
    "mass int": (lambda m: {"mass": m.labels}, "`mass` must be float16"),
    "tokens int": (lambda m: {"tokens": m.tokens.astype(np.int32)}, "`tokens` must be"),
    "tokens 4-D": (lambda m: {"tokens": m.tokens[None]}, "`tokens` must have shape"),
    "tokens K": (lambda m: {"tokens": m.tokens[:, :2]}, "must"),
    "tokens B": (lambda m: {"tokens": m.tokens[:1]}, "`labels` must have shape"),
}


class TestLoad:
    @pytest.mark.parametrize("name", FAULTS)
    def test_arrays_that_do_not_fit(self, path, merged, name):
        change, message = FAULTS[name]
        arrays = changed(merged, **change(merged))
        save(path, **{k: np.ascontiguousarray(x) for k, x in arrays.items()})
        with pytest.raises(ValueError, match=message) as error:
            qm.Merged.load(path)
        self.check(error, path)

    def test_a_missing_array(self, path, merged):
        arrays = merged._asdict()
        del arrays["sizes"]
        save(path, **arrays)
        with pytest.raises(ValueError, match="no array 'sizes'") as error:
            qm.Merged.load(path)
        self.check(error, path)

    def test_no_file(self, path):
        with pytest.raises(FileNotFoundError, match=path.name):
            qm.Merged.load(path)

    def test_objects_are_not_unpickled(self, tmp_path, merged):
        path = tmp_path / "a.npz"

        class Harmful:
            def __reduce__(self):
                return pytest.fail, ("the object was loaded",)

        objects = np.array([Harmful()], dtype=object)
        np.savez(path, **changed(merged, mass=objects))
        with pytest.raises(ValueError, match="holds pickled Python objects") as error:
            qm.Merged.load(path)
        self.check(error, path)
        with zipfile.ZipFile(path, "w") as archive:  # a pickle instead of an array
            archive.writestr("tokens.npy", pickle.dumps(1))
        with pytest.raises(ValueError, match="`tokens` is not an array") as error:
            qm.Merged.load(path)
        self.check(error, path)

    def test_a_shape_beyond_the_file(self, tmp_path, merged):
        """No memory is allocated for it: here, 4 EB."""
        path = tmp_path / "a.npz"
        merged.save(path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        header = io.BytesIO()
        claim = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20, 2**20)}
        np.lib.format.write_array_header_1_0(header, claim)
        members["tokens.npy"] = header.getvalue()
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match="is cut short") as error:
            qm.Merged.load(path)
        self.check(error, path)

    def test_another_format(self, path):
        for content in (
            b"",
            b"text",
            b"PK\x03\x04",
            b"\x93NUMPY\x01\x00",
            b"\xff" * 64,
        ):
            path.write_bytes(content)
            with pytest.raises(
                ValueError, match=r"is damaged|has the content|is empty"
            ) as error:
                qm.Merged.load(path)
            self.check(error, path)

    def test_damaged_bytes(self, path, merged, rng):
        """A damaged file is refused by ValueError, unless its values are possible."""
        merged.save(path)
        content, errors = np.frombuffer(path.read_bytes(), np.uint8), []
        for _ in range(300):
            damaged = content.copy()
            first = rng.integers(len(content))
            damaged[first : first + rng.integers(1, 8)] = rng.integers(256)
            cut = len(content) if rng.integers(2) else rng.integers(len(content))
            path.write_bytes(damaged[:cut].tobytes())
            try:
                got = qm.Merged.load(path)
            except ValueError as refusal:
                errors.append(str(refusal))
            else:
                assert got.labels.max() < got.sizes.shape[-1]
        assert len(errors) > 100
        assert all(str(path) in error for error in errors)

    @staticmethod
    def check(error, path):
        message = str(error.value)
        assert str(path) in message
        assert "\n" not in message
        assert len(message.replace(str(path), "")) < 300
