"""Write a file of arrays whose entries come in parts, in one of three formats."""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .safetensors import header_and_offsets

# The shape and the dtype of each array of a file.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
Part = Mapping[str, NDArray[Any]]

_IN_MEMORY = 2**22  # bytes of an array that wait in memory; more wait in a file


def write_arrays(
    file: IO[bytes],
    format: str,
    layout: Layout,
    parts: Iterable[Part],
    folder: Path | None = None,
) -> None:
    """Write arrays to an empty file in which every position can be written.

    Each part holds the next entries of every array, along the first axis. The parts are
    written one by one. `format` is ".npz" or ".safetensors", or ".npy" for the first
    array alone. Temporary files are in `folder`, or where `tempfile` puts them.
    """
    if format == ".safetensors":
        _write_safetensors(file, layout, parts)
    elif format == ".npz":
        _write_npz(file, layout, parts, folder)
    else:
        name = next(iter(layout))
        _write_header(file, *layout[name])
        for part in parts:
            file.write(_bytes(part[name]))


def _write_safetensors(file: IO[bytes], layout: Layout, parts: Iterable[Part]) -> None:
    header, position = header_and_offsets(layout)
    file.write(header)
    for part in parts:
        for name, x in part.items():
            file.seek(position[name])
            position[name] += file.write(_bytes(x))


def _write_npz(
    file: IO[bytes], layout: Layout, parts: Iterable[Part], folder: Path | None
) -> None:
    """Write a zip of .npy files.

    The members of a zip can only be written one after the other. So the entries of the
    first array, which is the largest one, are written directly. Those of the others
    wait in temporary files without names.
    """
    first, *others = layout
    with ExitStack() as stack, zipfile.ZipFile(file, "w") as archive:
        waiting = {
            name: stack.enter_context(
                tempfile.SpooledTemporaryFile(
                    _IN_MEMORY, dir=str(folder) if folder else None
                )
            )
            for name in others
        }
        with _member(archive, first) as out:
            _write_header(out, *layout[first])
            for part in parts:
                out.write(_bytes(part[first]))
                for name in others:
                    waiting[name].write(_bytes(part[name]))
        for name in others:
            with _member(archive, name) as out:
                _write_header(out, *layout[name])
                waiting[name].seek(0)
                shutil.copyfileobj(waiting[name], out, 2**20)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A ZipInfo has a fixed date, so the same arrays give the same bytes. ZIP64 allows
    # members larger than 4 GiB.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _write_header(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Write the header of the .npy format."""
    # NumPy's format has no bfloat16: it stores the two bytes of each number.
    descr = "<V2" if dtype.kind == "V" else dtype.str
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)


def _bytes(x: NDArray[Any]) -> memoryview:
    """Return the bytes of an array in C order."""
    return np.ascontiguousarray(x).reshape(math.prod(x.shape)).view(np.uint8).data
