"""The README's table of conversions that share memory, measured by addresses."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import to_library, to_numpy

from qm_cupy.arrays.conversion import convert_inputs

README = Path(__file__).parent.parent / "README.md"
NAMES = {
    "numpy": "NumPy",
    "torch": "torch",
    "jax": "JAX",
    "array_api_strict": "array-api-strict",
}
DTYPES = "float16", "bfloat16", "float32", "float64"


def address(x):
    """Return the address of the values, from the library itself if it gives one."""
    if hasattr(x, "unsafe_buffer_pointer"):  # JAX
        return x.unsafe_buffer_pointer()
    if hasattr(x, "data_ptr"):  # torch
        return x.data_ptr()
    return to_numpy(x).ctypes.data


def unaligned(x):
    """Copy an array to an address that is 16 bytes above a multiple of 64.

    A library may share memory that is 64-byte aligned, and copy other memory. NumPy
    aligns to 16 bytes, so without this function the table could change from run to run.
    """
    buffer = np.empty(x.nbytes + 128, np.uint8)
    start = (16 - buffer.ctypes.data) % 64
    result = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    result[...] = x
    return result


def shared(library, dtype):
    """Return the directions that share memory: "in", "out", "in, out" or "neither"."""
    # array-api-strict has no 16-bit dtypes.
    if library == "array_api_strict" and dtype.endswith("16"):
        return "–"
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    argument = to_library(library, np.ones((4, 8), storage))
    convert_back, inside = convert_inputs({"tokens": argument})
    result = unaligned(np.ones((4, 8), storage))
    left = convert_back(result)
    directions = {
        "in": address(argument) == inside.ctypes.data,
        "out": address(left) == result.ctypes.data,
    }
    return ", ".join(way for way, same in directions.items() if same) or "neither"


# A new version of a library may copy more or less; then the README must change.
def test_the_readme_table_of_shared_memory():
    for library in NAMES:
        pytest.importorskip(library)
    lines = ["| on the CPU | " + " | ".join(DTYPES) + " |", "|---" * 5 + "|"]
    for library, name in NAMES.items():
        cells = " | ".join(shared(library, dtype) for dtype in DTYPES)
        lines.append(f"| {name} | {cells} |")
    table = "\n".join(lines)
    assert table in README.read_text(encoding="utf-8"), f"README must say:\n{table}"
