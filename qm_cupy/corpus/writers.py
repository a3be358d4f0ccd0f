"""Writers of files of merged tokens."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..results import Merged


def check_output(path: Path, source: Path) -> None:
    """Raise if the output cannot be written, or would replace the input."""
    if path.suffix != ".npz":
        raise ValueError(f"the output must end in .npz, got {path}")
    if not path.parent.is_dir():
        raise ValueError(
            f"the output's folder {path.parent} does not exist: create it first"
        )
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder: give the name of a file")
    # `samefile` also recognises links to the input.
    if path.exists() and path.samefile(source):
        raise ValueError(f"the output {path} is the input: give another name")


def write_merged(
    file: BinaryIO,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterable[Merged[Any]],
) -> None:
    """Write parts of a result to a .npz file.

    `shape` and `dtype` are those of the tokens of all parts together: (B, K, D), or
    (K, D) for one sequence. The tokens of each part are written immediately. The other
    arrays are small. They are kept in memory and written last, because the members of a
    zip can only be written one after the other.
    """
    rest: list[tuple[NDArray[Any], ...]] = []  # all fields except tokens, per part
    with zipfile.ZipFile(file, "w") as archive:
        # A ZipInfo has a fixed date, so the same input gives the same bytes. ZIP64
        # allows members larger than 4 GiB.
        with archive.open(zipfile.ZipInfo("tokens.npy"), "w", force_zip64=True) as out:
            # The header has the final shape, although not all tokens exist yet.
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(out, header)
            for part in parts:
                out.write(np.ascontiguousarray(part.tokens).data)
                rest.append(part[1:])
        columns = zip(*rest, strict=True)
        for name, column in zip(Merged._fields[1:], columns, strict=True):
            array = np.concatenate(column)  # (B, N) or (B, K)
            with archive.open(
                zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True
            ) as out:
                # For one sequence, without the axis B.
                npy.write_array(out, array[0] if len(shape) == 2 else array)
