"""Arrays in the .npy format, as files or as members of a .npz file."""

import tokenize
import warnings
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from .stored import (
    Arrays,
    DamagedFileError,
    Stored,
    bfloat16_or_fault,
    chunks_at,
    file_size,
    fortran_chunks_at,
    impossible,
    reading,
)

MAGIC = b"\x93NUMPY"
# What NumPy and `ast.literal_eval` raise for headers that they cannot read.
HEADER_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
)


class Header(NamedTuple):
    """The header of an array in the .npy format."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def checked(self, num_bytes: int) -> "tuple[Header, str]":
        """Return the header with bfloat16, and why it cannot be read, or "".

        `num_bytes` is the number of bytes after the header.
        """
        shape, fortran, dtype = self
        if dtype.hasobject:
            # Pickled objects are not loaded, because loading can run arbitrary code.
            return self, "holds pickled Python objects, which are not loaded"
        if impossible(shape, dtype):
            promise = f"{dtype}{shape}"[:80]  # the numbers may be long
            return self, f"is damaged: its header promises {promise}"
        wanted = Stored(shape, dtype).num_bytes
        if num_bytes < wanted:
            rest = f"needs {wanted - num_bytes} more bytes"
            return self, f"is cut short: {dtype}{shape} {rest}"
        if not is_raw_bfloat16(dtype):
            return self, ""
        dtype, fault = bfloat16_or_fault()
        return Header(shape, fortran, dtype), fault


def open_npy(file: IO[bytes], name: str) -> Arrays:
    """Describe the array of a .npy file, in C or Fortran order, as "tokens"."""
    with reading(name, *HEADER_ERRORS):
        header = read_header(file)
        start = file.tell()
        header, fault = header.checked(file_size(file) - start)
    if fault.startswith(("is cut", "is damaged")):
        raise DamagedFileError(f"{name} {fault}")
    shape, fortran, dtype = header
    if fault:
        return {"tokens": Stored(shape, dtype, fault=fault)}
    read = fortran_chunks_at if fortran and len(shape) > 1 else chunks_at
    return {"tokens": Stored(shape, dtype, read(file, name, start, shape, dtype))}


def read_header(file: IO[bytes]) -> Header:
    """Read the header of the .npy format, of version 1.0, 2.0 or 3.0.

    Errors of several types are raised if it is damaged: `HEADER_ERRORS`, and those that
    `reading` always converts.
    """
    version = npy.read_magic(file)
    with warnings.catch_warnings():
        # NumPy warns that it takes longer to read a header that Python 2 wrote.
        warnings.simplefilter("ignore", UserWarning)
        return _read_header(file, version)


def _read_header(file: IO[bytes], version: tuple[int, int]) -> Header:
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    elif version in ((2, 0), (3, 0)):
        # Version 3.0 differs from 2.0 only in the encoding of the names of fields.
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the .npy format is not known")
    return Header(shape, fortran, dtype)


def is_raw_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether this is the dtype as which NumPy stores bfloat16."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype as which NumPy's format stores an array."""
    return np.dtype("V2") if dtype.kind == "V" else dtype
