"""Files of tokens in each format, as the command line reads them.

If a file cannot be read, the error is one line with the reason, and no file is left in
the folder.
"""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
from command_line import FORMATS, assert_same, compress, save

import qm_cupy as qm
from qm_cupy.cli.main import main
from qm_cupy.corpus import plan
from qm_cupy.files import stored
from qm_cupy.files.inputs import open_arrays


def written(path, arrays):
    """Write safetensors by hand: {name: (code, shape, bytes)}."""
    # The format is the length of the header, the header in JSON, and the numbers.
    header, data = {}, b""
    for name, (code, shape, content) in arrays.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_missing_cut_short_or_something_else(tmp_path, tokens, name, compress_fails):
    path = tmp_path / name
    compress_fails(path, f"{path}: No such file or directory")
    save(path, tokens=tokens)
    whole = path.read_bytes()
    # Cut in the data, in the header, in the magic bytes, and an empty file.
    for size in (len(whole) - 100, 100, 5, 0):
        path.write_bytes(whole[:size])
        compress_fails(path, path)
    path.write_text("not an array, whatever its name says " * 10)
    compress_fails(path, f"{path} is damaged")
    path.unlink()
    path.mkdir()
    compress_fails(path, f"{path} is a folder")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_every_array_in_chunks_of_any_size(tmp_path, rng, name, count):
    # A .npy file has only the tokens; the other formats have five arrays.
    arrays = {"tokens": rng.standard_normal((7, 4, 5)).astype("<f4")}
    if name != FORMATS[0]:
        arrays |= {
            "flags": rng.random((7, 4)) < 0.5,
            "numbers": rng.integers(-5, 5, 7),
            "empty": np.zeros((0, 3)),
            "narrow": np.zeros((3, 0), np.int8),
        }
    with open_arrays(save(tmp_path / name, **arrays)) as source:
        assert set(source.arrays) == set(arrays)
        for key, x in arrays.items():
            assert source.arrays[key].fault == ""
            # An array without entries has one chunk, which is empty.
            chunks = list(source.arrays[key].chunks(count))
            assert max(len(chunk) for chunk in chunks) <= count
            got = np.concatenate(chunks)
            np.testing.assert_array_equal(got, x, strict=True)


def test_arrays_are_read_side_by_side(tmp_path, rng):
    """Each array has its own position in the file."""
    arrays = {name: rng.standard_normal((9, 40)) for name in "abc"}
    for name in FORMATS[1:]:
        with open_arrays(save(tmp_path / name, **arrays)) as source:
            chunks = [x.chunks(2) for x in source.arrays.values()]
            rows = zip(*chunks, strict=True)
            for got, x in zip(zip(*rows, strict=True), arrays.values(), strict=True):
                np.testing.assert_array_equal(np.concatenate(got), x)


class TestNpy:
    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    @pytest.mark.parametrize("name", ["a.npy", "a.npz"])
    def test_versions(self, tmp_path, tokens, name, version):
        file = io.BytesIO()
        np.lib.format.write_array(file, tokens, version)
        (tmp_path / "a.npy").write_bytes(file.getvalue())
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("tokens.npy", file.getvalue())
        _, got = compress(tmp_path / name)
        assert_same(got, qm.quickmerge(tokens, 3))

    def test_an_unknown_version(self, tmp_path, compress_fails):
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x04\x00" + bytes(200))
        compress_fails(tmp_path / "a.npy", "version (4, 0) of the .npy format")

    # 2 ** 14 bytes: below this length, columns are read completely.
    @pytest.mark.parametrize("bytes_per_call", [1, stored.BYTES_PER_CALL])
    @pytest.mark.parametrize("chunk_bytes", [1, 2 * 12 * 5 * 4, 2**26])
    @pytest.mark.parametrize("name", FORMATS[:3])
    def test_fortran_order(
        self, tmp_path, tokens, monkeypatch, name, chunk_bytes, bytes_per_call
    ):
        monkeypatch.setattr(plan, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(stored, "BYTES_PER_CALL", bytes_per_call)
        monkeypatch.setattr(stored, "_PIECE", 64)  # two columns of 7 numbers
        path = save(tmp_path / name, tokens=np.asfortranarray(tokens))
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))
        path = save(tmp_path / name, tokens=np.asfortranarray(tokens[0]))
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens[0], 3))
        # Without sequences: the header still says Fortran order.
        save(path, tokens=np.asfortranarray(tokens)[:0])
        assert compress(path)[0] == 0

    # To load a pickle can run any code, so pickles are refused.
    @pytest.mark.parametrize("name", FORMATS[:2])
    def test_pickled_objects(self, tmp_path, name, compress_fails):
        path = save(tmp_path / name, tokens=np.full((4, 3), None))
        compress_fails(path, "pickled Python objects")

    @pytest.mark.parametrize(
        "shape",
        [
            (10**9, 10**9, 10**9),
            (-1, 3, 4),
            (2, -3, 4),
            (-2, -3, 4),
            (0, 2**62, 2**62),
            (2**64, 2, 2),
            (10**400, 2),
        ],
    )
    def test_impossible_shapes(self, tmp_path, compress_fails, shape):
        """A header that promises 10^27 numbers must not lead to a huge allocation."""
        file = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        content = file.getvalue() + bytes(1000)
        (tmp_path / "a.npy").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("tokens.npy", content)
        compress_fails(tmp_path / "a.npy", tmp_path / "a.npy")
        compress_fails(tmp_path / "a.npz", tmp_path / "a.npz")
        # The same shape in the JSON of a .safetensors file.
        if len(str(shape)) < 100:
            item = {"dtype": "F32", "shape": shape, "data_offsets": [0, 1000]}
            text = json.dumps({"tokens": item}).encode()
            content = len(text).to_bytes(8, "little") + text + bytes(1000)
            (tmp_path / "a.safetensors").write_bytes(content)
            compress_fails(tmp_path / "a.safetensors", tmp_path / "a.safetensors")

    def test_a_header_that_is_not_python(self, tmp_path, compress_fails):
        # The magic bytes, version 1.0 and a header of 2 bytes.
        (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00\x02\x00((")
        compress_fails(tmp_path / "c.npy", "c.npy is damaged")


class TestNpz:
    @pytest.mark.parametrize("name", ["stored.npz", "deflated.npz"])
    def test_damage_in_the_middle(self, tmp_path, tokens, name, compress_fails):
        """The header is correct, but the checksum of the zip is not."""
        path = save(tmp_path / name, tokens=tokens)
        damaged = bytearray(path.read_bytes())
        damaged[1000:1004] = b"\0\1\2\3"
        path.write_bytes(damaged)
        compress_fails(path, path, "is damaged: Bad CRC-32")

    def test_data_that_cannot_be_inflated(self, tmp_path, tokens, compress_fails):
        """zlib fails before the checksum is read."""
        path = save(tmp_path / "deflated.npz", tokens=tokens)
        damaged = bytearray(path.read_bytes())
        name, extra = int.from_bytes(damaged[26:28], "little"), damaged[28]
        # A zip's local header has 30 bytes, then the name and an extra field, whose
        # lengths are at 26 and 28. Deflate has no block of the type that 0xFF starts.
        damaged[30 + name + extra] = 0xFF
        path.write_bytes(damaged)
        compress_fails(path, "is damaged", "invalid block type")

    def test_members_that_are_no_arrays(self, tmp_path, tokens, compress_fails):
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
            archive.writestr("tokens.npy", b"nothing")
        compress_fails(tmp_path / "b.npz", "`tokens` is not an array")
        path = save(tmp_path / "a.npz", tokens=tokens)
        with zipfile.ZipFile(path, "a") as archive:  # others do not matter
            archive.writestr("other.npy", b"nothing")
            archive.writestr("README", b"text")
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))
        path.with_name("out.npz").unlink()

    def test_fortran_order_larger_than_memory_allows(self, tmp_path, rng, monkeypatch):
        """The array goes to a file, and the rest is the same."""
        monkeypatch.setattr("qm_cupy.files.npz._IN_MEMORY", 100)
        tokens = rng.standard_normal((5, 8, 3))
        path = save(tmp_path / "deflated.npz", tokens=np.asfortranarray(tokens))
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))


class TestSafetensors:
    def test_the_package_is_not_needed(self, tmp_path, tokens, monkeypatch):
        path = save(tmp_path / "a.safetensors", tokens=tokens)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))

    def test_bfloat16(self, tmp_path, tokens):
        torch = pytest.importorskip("torch")
        ml_dtypes = pytest.importorskip("ml_dtypes")
        module = pytest.importorskip("safetensors.torch")
        x = torch.tensor(tokens).bfloat16()
        module.save_file({"x": x}, tmp_path / "a.safetensors")
        output = tmp_path / "out.safetensors"
        argv = ["compress", str(tmp_path / "a.safetensors"), "--budget", "3"]
        assert main([*argv, "-o", str(output)]) == 0
        wanted = qm.quickmerge(x, 3)
        got = module.load_file(output)  # by the package, as a user of torch
        assert got["tokens"].dtype == torch.bfloat16
        assert torch.equal(got["tokens"], wanted.tokens)
        # NumPy's formats hold the two bytes of each number.
        for name in ("out.npz", "out.npy"):
            assert main([*argv, "-o", str(tmp_path / name)]) == 0
        merged = qm.Merged.load(tmp_path / "out.npz")
        assert merged.tokens.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            merged.tokens.view(np.int16), wanted.tokens.view(torch.int16).numpy()
        )
        # And such a file can be merged again.
        again = tmp_path / "again.npz"
        argv = ["compress", str(tmp_path / "out.npy"), "--budget", "2", "-o"]
        assert main([*argv, str(again)]) == 0
        assert_same(qm.Merged.load(again), qm.quickmerge(merged.tokens, 2))

    def test_bfloat16_without_ml_dtypes(self, tmp_path, monkeypatch, compress_fails):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        path = tmp_path / "a.safetensors"
        written(path, {"x": ("BF16", [4, 3], bytes(24))})
        compress_fails(path, "`x` is bfloat16, which needs ml_dtypes: pip install")

    def test_other_dtypes_do_not_matter(self, tmp_path, tokens, compress_fails):
        """NumPy has neither float4 nor float8."""
        path = tmp_path / "a.safetensors"
        arrays = {
            "scales": ("F8_E8M0", [3], bytes(3)),
            "weights": ("F4", [4, 3], bytes(6)),
            "tokens": ("F32", list(tokens.shape), tokens.tobytes()),
        }
        _, got = compress(written(path, arrays))
        assert_same(got, qm.quickmerge(tokens, 3))
        path.with_name("out.npz").unlink()
        compress_fails(
            path, "`weights` is F4, a dtype that", options=["--key", "weights"]
        )

    def test_a_header_whose_length_begins_like_a_zip(self, tmp_path, tokens):
        path = tmp_path / "a.safetensors"
        written(path, {"x": ("F32", list(tokens.shape), tokens.tobytes())})
        whole = path.read_bytes()
        header = whole[8 : -tokens.nbytes].ljust(int.from_bytes(b"PK", "little"))
        length = len(header).to_bytes(8, "little")
        path.write_bytes(length + header + tokens.tobytes())
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))

    def test_metadata_does_not_matter(self, tmp_path, tokens):
        path = tmp_path / "a.safetensors"
        save_file = pytest.importorskip("safetensors.numpy").save_file
        save_file({"tokens": tokens}, path, metadata={"format": "pt"})
        _, got = compress(path)
        assert_same(got, qm.quickmerge(tokens, 3))

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            (b"[]", "not a JSON object"),
            (b"{", "is damaged"),
            (b'{"x": 1}', "does not describe 'x'"),
            (b'{"x": {"dtype": "F32", "shape": [1]}}', "does not describe"),
            (
                b'{"x": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
                "impossible values",
            ),
            (
                b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
                "impossible values",
            ),
            (
                b'{"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
                "impossible values",
            ),
            (
                b'{"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}}',
                "4 bytes do not fit F32(2, 2)",
            ),
            (
                b'{"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
                "cut short: 12 bytes are missing",
            ),
            (b"[" * 100_000, "is damaged"),
        ],
    )
    def test_headers(self, tmp_path, header, words, compress_fails):
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        compress_fails(path, words)


@pytest.mark.slow("runs the command once for each byte of a header")
@pytest.mark.parametrize("name", FORMATS)
def test_one_wrong_byte(tmp_path, name, capsys):
    """Whatever byte of a header is wrong: a result, or one short line."""
    tokens = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    path, output = save(tmp_path / name, tokens=tokens), tmp_path / "out.npz"
    whole = path.read_bytes()
    statuses = []
    # All bytes, the tokens too: a checksum may cover them.
    for index in range(len(whole)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[index] ^= change
            path.write_bytes(damaged)
            output.unlink(missing_ok=True)
            statuses.append(
                main(["compress", str(path), "--budget", "2", "-o", str(output)])
            )
            error = capsys.readouterr().err
            # Either an error or an output, never both or none.
            assert (statuses[-1] == 2) == (error != "") != output.exists()
            assert error.count("\n") <= 1
            assert len(error) < 300
            assert not error or "a.npy" in error or str(path) in error
    assert 0 in statuses  # in the tokens, many values are possible
    assert 2 in statuses
