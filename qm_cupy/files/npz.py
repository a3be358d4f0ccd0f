"""Files of several arrays in NumPy's .npz format, a zip of .npy files."""

import math
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .npy import HEADER_ERRORS, Header, read_header
from .stored import (
    Arrays,
    DamagedFileError,
    Stored,
    fill,
    fortran_chunks_at,
    naming_temporary,
    reading,
)

MAGIC = b"PK"
# What `zipfile` raises for damaged files.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_OPEN_ERRORS = (*_ZIP_ERRORS, *HEADER_ERRORS)
_PIECE = 2**16  # numbers that are copied at a time
_IN_MEMORY = 2**26  # bytes of an array in Fortran order that are kept in memory


def open_npz(file: IO[bytes], name: str) -> Arrays:
    """Describe all arrays of a .npz file."""
    with reading(name, *_OPEN_ERRORS):
        archive = zipfile.ZipFile(file)
        arrays = {
            info.filename.removesuffix(".npy"): _member(archive, info, name)
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }
    if not arrays:
        raise DamagedFileError(
            f"{name} is a zip that holds no .npy arrays (a file of torch? save its "
            "tensors as .safetensors)"
        )
    return arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Stored:
    """Describe an array of a zip, which is read from start to end in chunks."""
    # The methods of numpy.savez and numpy.savez_compressed.
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if info.flag_bits & 1 or info.compress_type not in plain:  # bit 0: encrypted
        return Stored(
            fault="is encrypted or compressed by a method that NumPy does not use: "
            "save it with numpy.savez"
        )
    try:
        with reading("it", *_OPEN_ERRORS), archive.open(info) as file:
            header = read_header(file)
            header, fault = header.checked(info.file_size - file.tell())
    except DamagedFileError as error:
        return Stored(fault=f"is not an array: {error}")
    shape, fortran, dtype = header
    if fault:
        return Stored(shape, dtype, fault=fault)
    if fortran and len(shape) > 1:
        return Stored(shape, dtype, lambda n: _spooled(archive, info, name, header, n))
    return Stored(shape, dtype, lambda n: _chunks(archive, info, name, header, n))


def _chunks(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    name: str,
    header: Header,
    count: int,
) -> Iterator[NDArray[Any]]:
    """Yield `count` entries at a time of an array in C order."""
    shape, _, dtype = header
    with reading(name, *_ZIP_ERRORS):
        file = archive.open(info)
        read_header(file)  # the entries start after the header
    with file:
        for start in range(0, max(1, shape[0]), count):
            with reading(name, *_ZIP_ERRORS):
                chunk = np.empty((min(count, shape[0] - start), *shape[1:]), dtype)
                fill(chunk, file)
                # zipfile compares the checksum when a read reaches the end of the
                # member.
                if start + count >= shape[0]:
                    file.read(1)
            yield chunk
            del chunk  # before the next one is read


def _spooled(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    name: str,
    header: Header,
    count: int,
) -> Iterator[NDArray[Any]]:
    """Yield `count` entries at a time of an array in Fortran order.

    The bytes of an entry are spread over the whole array, and a zip can be read only
    from its start. So the array is first written to a temporary file without a name.
    """
    shape, _, dtype = header
    with naming_temporary(), tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
        flat = Header((math.prod(shape),), False, dtype)
        for piece in _chunks(archive, info, name, flat, _PIECE):
            spool.write(piece.view(np.uint8).data)
        yield from fortran_chunks_at(spool, name, 0, shape, dtype)(count)
