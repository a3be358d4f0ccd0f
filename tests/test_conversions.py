"""The README's table of what is shared and what is copied, measured by pointers."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import to_library, to_numpy

from qm_cupy.arrays.conversion import enter

README = Path(__file__).parent.parent / "README.md"
NAMES = {
    "numpy": "NumPy",
    "torch": "torch",
    "jax": "JAX",
    "array_api_strict": "array-api-strict",
}
DTYPES = "float16", "bfloat16", "float32", "float64"


def address(x):
    """Return where the values lie, as the library itself says if it does."""
    if hasattr(x, "unsafe_buffer_pointer"):  # JAX
        return x.unsafe_buffer_pointer()
    if hasattr(x, "data_ptr"):  # torch
        return x.data_ptr()
    return to_numpy(x).ctypes.data


def unaligned(x):
    """Copy to 16 bytes past a multiple of 64, where NumPy puts three arrays of four.

    JAX, which copies those, may share the fourth.
    """
    room = np.empty(x.nbytes + 128, np.uint8)
    start = (16 - room.ctypes.data) % 64
    found = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    found[...] = x
    return found


def shared(library, dtype):
    """Return which ways leave the values where they are: "in", "out", both, none."""
    if library == "array_api_strict" and dtype.endswith("16"):
        return "–"
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    given = to_library(library, np.ones((4, 8), kind))
    leave, inside = enter({"tokens": given})
    result = unaligned(np.ones((4, 8), kind))
    left = leave(result)
    ways = {
        "in": address(given) == inside.ctypes.data,
        "out": address(left) == result.ctypes.data,
    }
    return ", ".join(way for way, same in ways.items() if same) or "neither"


def test_readme_says_what_is_shared():
    for library in NAMES:
        pytest.importorskip(library)
    lines = ["| on the CPU | " + " | ".join(DTYPES) + " |", "|---" * 5 + "|"]
    for library, name in NAMES.items():
        cells = " | ".join(shared(library, dtype) for dtype in DTYPES)
        lines.append(f"| {name} | {cells} |")
    table = "\n".join(lines)
    assert table in README.read_text(encoding="utf-8"), f"README must say:\n{table}"
