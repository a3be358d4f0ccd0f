"""Files of several arrays in the safetensors format.

The format is 8 bytes with the length of a header, the header in JSON, and the bytes of
the arrays. The package safetensors maps files into memory and writes only arrays that
are completely in memory, so it is not used here.
"""

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from .stored import (
    Arrays,
    DamagedFileError,
    Stored,
    bfloat16_or_fault,
    chunks_at,
    file_size,
    impossible,
    reading,
)

# The dtypes of the format that NumPy has. All numbers are little-endian.
_DTYPES = {
    "BOOL": "?",
    **{
        f"{letter}{8 * n}": f"<{letter.lower()}{n}"
        for letter in "IU"
        for n in (1, 2, 4, 8)
    },
    **{f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)},
}
_MAX_HEADER = 100_000_000  # bytes; the package has the same limit


def open_safetensors(file: IO[bytes], name: str) -> Arrays:
    """Describe all arrays of a .safetensors file."""
    size = file_size(file)
    with reading(name, RecursionError):
        length = int.from_bytes(file.read(8), "little")  # of the header
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError("it has no header of the safetensors format")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    return {
        key: _tensor(file, name, key, entry, 8 + length, size)
        for key, entry in header.items()
    }


def _tensor(
    file: IO[bytes], name: str, key: str, entry: Any, start: int, size: int
) -> Stored:
    """Describe a tensor; `start` is the first byte of all tensors."""
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise DamagedFileError(
            f"{name} is damaged: its header does not describe {key!r}"
        ) from None
    numbers = (*shape, first, last)
    if (
        not isinstance(code, str)
        or not all(type(x) is int and x >= 0 for x in numbers)
        or first > last
    ):
        raise DamagedFileError(
            f"{name} is damaged: its header has impossible values for {key!r}"
        )
    fault = ""
    if code == "BF16":
        dtype, fault = bfloat16_or_fault()
    elif code in _DTYPES:
        dtype = np.dtype(_DTYPES[code])
    else:  # F8_E4M3, F4, C64, ...
        fault = f"is {code}, a dtype that cannot be read: save it as F32"
        return Stored(shape, fault=fault)
    if impossible(shape, dtype) or last - first != math.prod(shape) * dtype.itemsize:
        fault = f"is damaged: {last - first} bytes do not fit {code}{shape}"
    elif start + last > size:
        fault = f"is cut short: {start + last - size} bytes are missing"
    if fault:
        return Stored(shape, dtype, fault=fault)
    return Stored(shape, dtype, chunks_at(file, name, start + first, shape, dtype))


def header_and_offsets(
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the byte at which each array starts.

    `arrays` holds the shape and the dtype of each array.
    """
    codes = {np.dtype(text): code for code, text in _DTYPES.items()}
    # Wide numbers first, as the package writes them: every array is then aligned, which
    # torch requires.
    names = sorted(arrays, key=lambda name: -arrays[name][1].itemsize)
    entries, position, starts = {}, 0, {}
    for name in names:
        shape, dtype = arrays[name]
        stop = position + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": "BF16" if dtype.name == "bfloat16" else codes[dtype],
            "shape": shape,
            "data_offsets": [position, stop],
        }
        starts[name], position = position, stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
