"""Files of token arrays, read a few sequences at a time."""

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

from ..arrays.checks import check_mask, check_shape, check_tokens
from ..settings import check_finite

_PIECE = 2**20  # bytes asked of a zip member at a time
_PICKLED = "holds pickled Python objects, which are not loaded"


def _no_blocks(count: int) -> Iterator[NDArray[Any]]:
    yield from ()


class Stored(NamedTuple):
    """An array of a file: what its header says, and how to read it in blocks."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = np.dtype("V2")  # as NumPy calls what it has no name for
    blocks: Callable[[int], Iterator[NDArray[Any]]] = _no_blocks  # by the first axis
    fault: str = ""  # why it cannot be read


Arrays = dict[str, Stored]
Mask = NDArray[np.bool_] | None


@contextmanager
def open_tokens(
    path: Path, key: str | None, mask: str | None
) -> Iterator[tuple[Stored, Mask]]:
    """Give the tokens of a file, checked but for their values, and their mask."""
    read = _READERS.get(path.suffix)
    if read is None:
        raise ValueError(f"{path} must end in .npy, .npz or .safetensors")
    if path.suffix == ".npy" and (key is not None or mask is not None):
        raise ValueError("--key and --mask are for .npz and .safetensors files")
    with path.open("rb"):  # missing, a folder, not readable: the system says which
        pass
    with read(path) as arrays:
        name = _choose(path, arrays) if key is None else key
        tokens = _get(path, arrays, name)
        with check_finite(False):  # one value stands for all: none is read yet
            check_tokens(_stand_in(tokens), name)
        if mask is None:
            yield tokens, None
            return
        stored = _get(path, arrays, mask)
        check_shape("mask", _stand_in(stored), "BN", tokens.shape[:-1])
        valid = next(stored.blocks(max(1, stored.shape[0])))
        check_mask(valid, tokens.shape[:-1])
        yield tokens, valid


def _stand_in(array: Stored) -> NDArray[Any]:
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _choose(path: Path, arrays: Arrays) -> str:
    if "tokens" in arrays:
        return "tokens"
    names = [
        name
        for name, x in arrays.items()
        if len(arrays) == 1 or (len(x.shape) in (2, 3) and x.dtype.kind in "fV")
    ]
    if len(names) != 1:
        raise ValueError(f"{path}: name the tokens with --key; {_listing(arrays)}")
    return names[0]


def _get(path: Path, arrays: Arrays, name: str) -> Stored:
    if name not in arrays:
        raise ValueError(f"{path} has no array {name!r}; {_listing(arrays)}")
    if arrays[name].fault:
        raise ValueError(f"{path}: `{name}` {arrays[name].fault}")
    return arrays[name]


def _listing(arrays: Arrays) -> str:
    held = [f"{name} {x.dtype}{x.shape}" for name, x in arrays.items()]
    return f"it holds {'; '.join(held) or 'no arrays'}"


@contextmanager
def _open_npy(path: Path) -> Iterator[Arrays]:
    try:
        with path.open("rb") as file:
            shape, _, dtype = _header(file)
            missing = path.stat().st_size - file.tell() < _num_bytes(shape, dtype)
        if dtype.hasobject:
            tokens = Stored(shape, dtype, fault=_PICKLED)
        elif missing:
            raise ValueError(f"{dtype}{shape} takes more bytes")
        else:
            array = npy.open_memmap(path, mode="r")
            tokens = Stored(shape, dtype, lambda count: _slices(array, count))
    except ValueError as error:
        raise ValueError(f"{path} is cut short or no .npy file: {error}") from error
    yield {"tokens": tokens}


def _slices(array: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    for start in range(0, max(1, len(array)), count):  # an empty batch: an empty block
        yield array[start : start + count]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    try:
        if version == (1, 0):
            return npy.read_array_header_1_0(file)
        if version == (2, 0):
            return npy.read_array_header_2_0(file)
    except tokenize.TokenError as error:  # NumPy's second try, as if from Python 2
        raise ValueError("its header cannot be parsed") from error
    raise ValueError(f"version {version} of the format is for structured arrays")


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


@contextmanager
def _open_npz(path: Path) -> Iterator[Arrays]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield {
                info.filename.removesuffix(".npy"): _member(archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or no .npz file: {error}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
    """Describe an array of a zip: it comes in order, and never all at once."""
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if info.flag_bits & 1 or info.compress_type not in plain:
        return Stored(fault="is encrypted, or compressed in another way than NumPy's")
    try:
        with archive.open(info) as file:
            shape, fortran, dtype = _header(file)
            missing = info.file_size - file.tell() < _num_bytes(shape, dtype)
    except ValueError as error:
        return Stored(fault=f"is no array: {error}")
    if dtype.hasobject:
        return Stored(shape, dtype, fault=_PICKLED)
    if missing:
        return Stored(shape, dtype, fault=f"is cut short: {dtype}{shape} takes more")
    if fortran and len(shape) > 1:
        fault = "is in Fortran order, which cannot be read in parts: save it in C order"
        return Stored(shape, dtype, fault=fault)

    def blocks(count: int) -> Iterator[NDArray[Any]]:
        with archive.open(info) as file:
            _header(file)
            for start in range(0, max(1, shape[0]), count):
                block = np.empty((min(count, shape[0] - start), *shape[1:]), dtype)
                _fill(block, file)
                yield block
            file.read(1)  # the end, where the checksum is compared

    return Stored(shape, dtype, blocks)


def _fill(block: NDArray[Any], file: IO[bytes]) -> None:
    rest = block.reshape(-1).view(np.uint8).data
    while rest:
        piece = file.read(min(_PIECE, len(rest)))
        if not piece:
            raise EOFError("it ends too soon")
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Arrays]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        command = 'pip install "qm-cupy[safetensors]"'
        raise ImportError(f"{path} needs the safetensors package: {command}") from error
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            yield {name: _tensor(file.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no .safetensors file: {error}"
        ) from error


def _tensor(tensor: Any) -> Stored:
    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    name = {"F": "float", "I": "int", "U": "uint"}.get(kind[0], "")
    if kind != "BOOL" and not (name and kind[1:].isdigit()):
        return Stored(shape, fault=f"is {kind}, which NumPy has not: save it as F32")
    dtype = np.dtype("bool" if kind == "BOOL" else name + kind[1:])

    def blocks(count: int) -> Iterator[NDArray[Any]]:
        if not math.prod(shape):  # which safetensors will not slice
            yield np.empty(shape, dtype)
            return
        for start in range(0, shape[0], count):
            yield tensor[start : min(start + count, shape[0])]

    return Stored(shape, dtype, blocks)


_READERS: dict[str, Callable[[Path], AbstractContextManager[Arrays]]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
}
