"""Readers of files of token arrays, which read a few sequences at a time.

A reader yields the arrays of a file as a dictionary of `Stored`, one for each array. It
reads only headers at first. The axes of tokens are B sequences, N tokens and width D.
"""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..arrays.checks import check_batch_shape, check_mask, check_tokens
from ..install_advice import import_safetensors
from ..settings import check_finite

_PIECE = 2**20  # bytes that are read from a member of a zip at a time
# Pickled objects are not loaded, because loading can run arbitrary code.
_PICKLED = "holds pickled Python objects, which are not loaded: save it as floats"


def _no_chunks(count: int) -> Iterator[NDArray[Any]]:
    """Yield no array, for an array that cannot be read."""
    yield from ()


class Stored(NamedTuple):
    """An array of a file: its header, and a function that reads it in chunks.

    A chunk is a few entries along the first axis.
    """

    shape: tuple[int, ...] = ()
    # The default, two raw bytes, is for an array with a fault whose dtype is unknown or
    # does not exist in NumPy.
    dtype: np.dtype[Any] = np.dtype("V2")
    chunks: Callable[[int], Iterator[NDArray[Any]]] = _no_chunks  # of n entries each
    # The reason why the array cannot be read, or "". It becomes an error only if the
    # array is needed: other arrays of the file can still be used.
    fault: str = ""


Arrays = dict[str, Stored]
Mask = NDArray[np.bool_] | None


@contextmanager
def open_tokens(
    path: Path, key: str | None, mask: str | None
) -> Iterator[tuple[Stored, Mask]]:
    """Open the tokens and the mask of a file; `key` and `mask` are names of arrays.

    Dtypes and shapes are checked here. The values of the tokens are not read yet. The
    mask is read completely.
    """
    read = _READERS.get(path.suffix)
    if read is None:
        raise ValueError(
            f"the input must end in .npy, .npz or .safetensors, got {path}"
        )
    if path.suffix == ".npy" and (key is not None or mask is not None):
        raise ValueError(
            "--key and --mask are for .npz and .safetensors files; a .npy file holds "
            "one array only"
        )
    # If the file is missing, is a folder or may not be read, this raises the error of
    # the operating system.
    with path.open("rb"):
        pass
    with read(path) as arrays:
        name = _choose(path, arrays) if key is None else key
        tokens = _get(path, arrays, name)
        # Check dtype and shape with zeros of the same shape. They contain no NaN, so a
        # search for NaN would only cost time.
        with check_finite(False):
            check_tokens(_stand_in(tokens), name)
        if mask is None:
            yield tokens, None
            return
        stored = _get(path, arrays, mask)
        check_batch_shape("mask", _stand_in(stored), tokens.shape[:-1])
        valid = next(stored.chunks(max(1, stored.shape[0])))  # the whole mask
        yield tokens, check_mask(valid, tokens.shape[:-1])


def _stand_in(array: Stored) -> NDArray[Any]:
    """Return zeros of the same shape and dtype: a view of one number."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _choose(path: Path, arrays: Arrays) -> str:
    """Return the name of the only array that can be the tokens, or raise."""
    if "tokens" in arrays:
        return "tokens"
    # Tokens are floating and have two or three axes. The kind "V" is a dtype that NumPy
    # does not have, such as bfloat16: if it is selected, a clear error follows later.
    # The only array of a file is always selected, so that its own error is shown.
    names = [
        name
        for name, x in arrays.items()
        if len(arrays) == 1 or (len(x.shape) in (2, 3) and x.dtype.kind in "fV")
    ]
    if len(names) != 1:
        raise ValueError(
            f"{path}: give the name of the token array with --key; {_listing(arrays)}"
        )
    return names[0]


def _get(path: Path, arrays: Arrays, name: str) -> Stored:
    """Return the array of a name; raise if it is missing or cannot be read."""
    if name not in arrays:
        raise ValueError(f"{path} has no array {name!r}; {_listing(arrays)}")
    if arrays[name].fault:
        raise ValueError(f"{path}: `{name}` {arrays[name].fault}")
    return arrays[name]


def _listing(arrays: Arrays) -> str:
    """Return a list of all arrays of a file for error messages."""
    descriptions = [f"{name} {x.dtype}{x.shape}" for name, x in arrays.items()]
    return f"it holds {'; '.join(descriptions) or 'no arrays'}"


@contextmanager
def _open_npy(path: Path) -> Iterator[Arrays]:
    """Map the array of a .npy file, in C or Fortran order, into memory."""
    try:
        with path.open("rb") as file:
            shape, _, dtype = _header(file)
            # If the file is too short, fail now with a message that names the dtype and
            # the shape. The memory map would also fail, but its message has neither.
            too_short = path.stat().st_size - file.tell() < _num_bytes(shape, dtype)
        if dtype.hasobject:
            tokens = Stored(shape, dtype, fault=_PICKLED)
        elif too_short:
            raise ValueError(f"{dtype}{shape} needs more bytes than the file has")
        else:
            array = npy.open_memmap(path, mode="r")
            tokens = Stored(shape, dtype, lambda count: _slices(array, count))
    except ValueError as error:
        raise ValueError(f"{path} is cut short or not a .npy file: {error}") from error
    yield {"tokens": tokens}


def _slices(array: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    """Yield `count` entries at a time; an empty array yields one empty chunk."""
    for start in range(0, max(1, len(array)), count):
        yield array[start : start + count]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, Fortran order and dtype from the header of the .npy format."""
    version = npy.read_magic(file)
    try:
        if version == (1, 0):
            return npy.read_array_header_1_0(file)
        if version == (2, 0):
            return npy.read_array_header_2_0(file)
    except tokenize.TokenError as error:
        # If Python cannot parse the header, NumPy assumes that Python 2 wrote it and
        # reads it with `tokenize`, which fails for some damaged headers.
        raise ValueError("its header cannot be parsed") from error
    raise ValueError(f"version {version} of the format is not (1, 0) or (2, 0)")


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


@contextmanager
def _open_npz(path: Path) -> Iterator[Arrays]:
    """Describe all arrays of a .npz file, which is a zip of .npy files."""
    # The caller's `with` statement runs while this function waits at `yield`. If the
    # caller reads a damaged part of the file, the exception is raised here and gets the
    # same message.
    try:
        with zipfile.ZipFile(path) as archive:
            yield {
                info.filename.removesuffix(".npy"): _member(archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or not a .npz file: {error}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
    """Describe an array of a zip, which is read from start to end in chunks."""
    # The methods of numpy.savez and numpy.savez_compressed.
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if info.flag_bits & 1 or info.compress_type not in plain:  # bit 0: encrypted
        return Stored(
            fault="is encrypted or compressed by a method that NumPy does not use: "
            "save it with numpy.savez"
        )
    try:
        with archive.open(info) as file:
            shape, fortran, dtype = _header(file)
            too_short = info.file_size - file.tell() < _num_bytes(shape, dtype)
    except ValueError as error:
        return Stored(fault=f"is not an array: {error}")
    if dtype.hasobject:
        return Stored(shape, dtype, fault=_PICKLED)
    if too_short:
        return Stored(
            shape, dtype, fault=f"is cut short: {dtype}{shape} needs more bytes"
        )
    # In Fortran order the bytes of one sequence are spread over the whole array.
    if fortran and len(shape) > 1:
        fault = "is in Fortran order, which cannot be read in parts: save it in C order"
        return Stored(shape, dtype, fault=fault)

    def chunks(count: int) -> Iterator[NDArray[Any]]:
        with archive.open(info) as file:
            _header(file)  # the values start after the header
            for start in range(0, max(1, shape[0]), count):
                chunk = np.empty((min(count, shape[0] - start), *shape[1:]), dtype)
                _fill(chunk, file)
                yield chunk
            # zipfile compares the checksum when a read reaches the end of the member.
            file.read(1)

    return Stored(shape, dtype, chunks)


def _fill(chunk: NDArray[Any], file: IO[bytes]) -> None:
    """Fill an array with the next bytes of a file, in pieces of at most `_PIECE` bytes.

    A single read would hold a second copy of the whole array in memory.
    """
    rest = chunk.reshape(-1).view(np.uint8).data  # the part that is not filled yet
    while rest:
        piece = file.read(min(_PIECE, len(rest)))  # may return fewer bytes
        if not piece:
            raise EOFError("it ends too soon")
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Arrays]:
    """Describe all arrays of a .safetensors file."""
    module = import_safetensors(path)
    try:
        with module.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            yield {name: _tensor(file.get_slice(name)) for name in names}
    except module.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a .safetensors file: {error}"
        ) from error


def _tensor(tensor: Any) -> Stored:
    """Describe a tensor of a .safetensors file."""
    shape, code = tuple(tensor.get_shape()), tensor.get_dtype()
    # The code of a dtype that can be read is "BOOL", or one of the letters F, I and U
    # and the number of bits, such as "F32".
    name = {"F": "float", "I": "int", "U": "uint"}.get(code[0], "")
    if code != "BOOL" and not (name and code[1:].isdigit()):  # BF16, F8_E4M3, ...
        return Stored(
            shape, fault=f"is {code}, a dtype that cannot be read: save it as F32"
        )
    dtype = np.dtype("bool" if code == "BOOL" else name + code[1:])

    def chunks(count: int) -> Iterator[NDArray[Any]]:
        if not math.prod(shape):  # safetensors cannot slice an empty tensor
            yield np.empty(shape, dtype)
            return
        for start in range(0, shape[0], count):
            yield tensor[start : min(start + count, shape[0])]

    return Stored(shape, dtype, chunks)


_READERS: dict[str, Callable[[Path], AbstractContextManager[Arrays]]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
}
