"""Files of the arrays of a `Merged`: .npz, which NumPy reads too, or .safetensors.

An array has the name of its field. NumPy's format has no bfloat16: a .npz file holds
the two bytes of each number, as `numpy.savez` writes them, and reading restores the
dtype.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .atomic_write import atomic_write
from .files.inputs import open_arrays
from .files.stored import Stored
from .files.write import write_arrays

_SUFFIXES = ".npz", ".safetensors"


def check_suffix(path: Path) -> None:
    """Raise unless the name of the file ends in .npz or .safetensors."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"`path` must end in .npz or .safetensors, got {path}")


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays to a file, completely or not at all."""
    layout = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    with atomic_write(path) as file:
        write_arrays(file, path.suffix, layout, [arrays])


def load_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays with these names; raise ValueError if the file is damaged."""
    with open_arrays(path) as source:
        return {name: _load(path, name, source.arrays.get(name)) for name in names}


def _load(path: Path, name: str, array: Stored | None) -> NDArray[Any]:
    """Return an array; raise if it is missing, cannot be read or is a number."""
    if array is None:
        raise ValueError(f"{path} does not hold a Merged: it has no array {name!r}")
    if array.fault:
        raise ValueError(f"{path} cannot be read: `{name}` {array.fault}")
    if not array.shape:
        raise ValueError(f"{path} does not hold a Merged: `{name}` is one number")
    return array.whole()
