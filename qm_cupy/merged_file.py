"""Files of the arrays of a `Merged`: .npz, which NumPy reads too, or .safetensors.

An array has the name of its field. NumPy's format has no bfloat16: a .npz file holds
the two bytes of each number, as `numpy.savez` writes them, and reading restores the
dtype.
"""

import io
import math
import textwrap
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .arrays.libraries import bfloat16
from .atomic_write import atomic_write
from .install_advice import import_safetensors

_SUFFIXES = ".npz", ".safetensors"
# The names of dtypes in .safetensors files. Others cannot be in a `Merged`.
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4"}


def check_suffix(path: Path) -> None:
    """Raise unless the name of the file ends in .npz or .safetensors."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"`path` must end in .npz or .safetensors, got {path}")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays to a file, completely or not at all."""
    # safetensors writes wrong values if an array is not C-contiguous.
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    if path.suffix == ".safetensors":
        module = import_safetensors(path)
        content = module.numpy.save(arrays)
        with atomic_write(path) as file:
            file.write(content)
        return
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, x in arrays.items():
            # A ZipInfo has a fixed date, so the same arrays give the same bytes. ZIP64
            # allows members larger than 4 GiB.
            member = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(member, "w", force_zip64=True) as out:
                npy.write_array(out, x.view("V2") if x.dtype.kind == "V" else x)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays with these names; raise ValueError if the file is damaged."""
    read = _read_safetensors if path.suffix == ".safetensors" else _read_npz
    # Read all bytes first, so that an OSError always comes from the operating system,
    # and not from an offset in a damaged file.
    content = path.read_bytes()
    try:
        return read(path, content, names)
    # A damaged .npz file can cause each of these.
    except (
        EOFError,
        OverflowError,
        RuntimeError,
        SyntaxError,
        ValueError,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 120)
        raise ValueError(f"{path} cannot be read as a Merged: {reason}") from error


def _read_npz(
    path: Path, content: bytes, names: Iterable[str]
) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        for name in names:
            if f"{name}.npy" not in members:
                raise ValueError(f"it has no array {name!r}")
            info = archive.getinfo(f"{name}.npy")
            # Read the header alone first: it may claim a shape whose memory the file
            # could never fill.
            with archive.open(info) as member:
                shape, dtype = _header(member)
                num_bytes = info.file_size - member.tell()
            # Objects are stored by pickle, which can run arbitrary code.
            if dtype.hasobject:
                raise ValueError(f"`{name}` holds Python objects, which are not loaded")
            if num_bytes != math.prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"`{name}` has {num_bytes} bytes, which do not fit {dtype}{shape}"
                )
            with archive.open(info) as member:
                x = npy.read_array(member, allow_pickle=False)
                member.read(1)  # zipfile compares the checksum at the end
            # `ascontiguousarray`: an array in Fortran order is read as a transpose.
            x = np.ascontiguousarray(x)
            arrays[name] = x.view(bfloat16(name)) if _has_raw_bytes(dtype) else x
    return arrays


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the dtype from the header of the .npy format."""
    version = npy.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(member)
    else:
        raise ValueError(f"version {version} of the format is not (1, 0) or (2, 0)")
    return shape, dtype


def _has_raw_bytes(dtype: np.dtype[Any]) -> bool:
    """Return whether this is the dtype as which NumPy stores bfloat16."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None


def _read_safetensors(
    path: Path, content: bytes, names: Iterable[str]
) -> dict[str, NDArray[Any]]:
    module = import_safetensors(path)
    try:
        stored = dict(module.deserialize(content))
    except module.SafetensorError as error:
        raise ValueError(str(error)) from error
    arrays = {}
    for name in names:
        if name not in stored:
            raise ValueError(f"it has no array {name!r}")
        tensor = stored[name]
        code, shape = tensor["dtype"], tuple(tensor["shape"])
        if code != "BF16" and code not in _DTYPES:
            raise ValueError(f"`{name}` is {code}, a dtype that a Merged cannot have")
        dtype = bfloat16(name) if code == "BF16" else np.dtype(_DTYPES[code])
        arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(shape)
    return arrays
