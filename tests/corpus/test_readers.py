"""Files of tokens, as the command line reads them.

If a file cannot be read, the error is one line with the reason, and no file is left in
the folder.
"""

import io
import sys
import zipfile

import numpy as np
import pytest
from command_line import FORMATS, assert_same, compress, save

import qm_cupy as qm


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
    fails(["compress", path, *rest], "--key", listing)
    fails(["compress", path, *rest, "--key", "c"], "no array 'c'", listing)
    fails(["compress", path, *rest, "--key", "a", "--mask", "m"], "no array 'm'")
    path = save(tmp_path / "a.npy", tokens=tokens)
    fails(["compress", path, *rest, "--key", "a"], "--key and --mask are for")


@pytest.mark.parametrize("name", FORMATS)
def test_missing_cut_short_or_something_else(tmp_path, tokens, name, compress_fails):
    path = tmp_path / name
    compress_fails(path, f"{path}: No such file or directory")
    save(path, tokens=tokens)
    whole = path.read_bytes()
    # Cut in the data, in the header, in the magic bytes, and an empty file.
    for size in (len(whole) - 100, 100, 5, 0):
        path.write_bytes(whole[:size])
        compress_fails(path, path, "cut short" if name == "raw.npy" else "damaged")
    path.write_text("not an array, whatever its name says " * 10)
    compress_fails(path, f"not a {path.suffix} file")
    path.unlink()
    path.mkdir()
    compress_fails(path, f"{path}: Is a directory")


@pytest.mark.parametrize("name", ["stored.npz", "deflated.npz"])
def test_damage_in_the_middle(tmp_path, tokens, name, compress_fails):
    """The header is correct, but the checksum of the zip is not."""
    path = save(tmp_path / name, tokens=tokens)
    damaged = bytearray(path.read_bytes())
    damaged[1000:1004] = b"\0\1\2\3"
    path.write_bytes(damaged)
    compress_fails(path, "is damaged")


def test_data_that_cannot_be_inflated(tmp_path, tokens, compress_fails):
    """zlib fails before the checksum is read."""
    path = save(tmp_path / "deflated.npz", tokens=tokens)
    damaged = bytearray(path.read_bytes())
    name, extra = int.from_bytes(damaged[26:28], "little"), damaged[28]
    # A zip's local header has 30 bytes, then the name and an extra field, whose lengths
    # are at 26 and 28. Deflate has no block of the type that 0xFF starts.
    damaged[30 + name + extra] = 0xFF
    path.write_bytes(damaged)
    compress_fails(path, "is damaged", "invalid block type")


def test_wrong_headers(tmp_path, compress_fails):
    """A header that promises 10^27 numbers must not lead to a huge allocation."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 3, 4)))
    header["shape"] = (10**9, 10**9, 10**9)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "a.npy").write_bytes(file.getvalue())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("tokens.npy", file.getvalue())
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("tokens.npy", b"nothing")
    # The magic bytes, version 1.0 and a header of 2 bytes that Python cannot parse.
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00\x02\x00((")
    compress_fails(tmp_path / "a.npy", "cut short")
    compress_fails(tmp_path / "a.npz", "cut short")
    compress_fails(tmp_path / "b.npz", "is not an array")
    compress_fails(tmp_path / "c.npy", "not a .npy file")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 4, 3)])
def test_wrong_ndim(tmp_path, name, shape, compress_fails):
    path = save(tmp_path / name, tokens=np.ones(shape, np.float32))
    compress_fails(path, "must have shape (N, D) or (B, N, D), got")


@pytest.mark.parametrize("name", FORMATS)
def test_empty_sequence(tmp_path, name, compress_fails):
    path = save(tmp_path / name, tokens=np.ones((3, 0, 2), np.float32))
    compress_fails(path, "`tokens` must not be empty")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_wrong_dtype(tmp_path, name, dtype, compress_fails):
    path = save(tmp_path / name, tokens=np.ones((4, 3), dtype))
    # safetensors calls complex64 C64, a dtype that the reader does not know.
    word = "C64" if (name, dtype) == (FORMATS[3], "complex64") else dtype
    compress_fails(path, word)


# To load a pickle can run any code, so pickles are refused.
@pytest.mark.parametrize("name", FORMATS[:2])
def test_pickled_objects(tmp_path, name, compress_fails):
    path = save(tmp_path / name, tokens=np.full((4, 3), None))
    compress_fails(path, "pickled Python objects")


def test_fortran_order_in_a_zip(tmp_path, tokens, compress_fails):
    """A zip is read from its start, and no sequence is contiguous in this order."""
    path = save(tmp_path / "a.npz", tokens=np.asfortranarray(tokens))
    compress_fails(path, "`tokens` is in Fortran order")


def test_bfloat16(tmp_path, compress_fails):
    """NumPy has no bfloat16; only torch can write such a file here."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4, 3, dtype=torch.bfloat16)}, path)
    compress_fails(path, "`x` is BF16")  # the name of the dtype in the file


def test_safetensors_not_installed(tmp_path, tokens, monkeypatch, compress_fails):
    path = save(tmp_path / "a.safetensors", tokens=tokens)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    compress_fails(path, 'pip install "safetensors>=')
