"""Files of merged tokens, written in one piece."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..results import Merged


def check_output(path: Path, source: Path) -> None:
    """Refuse a place that cannot be written to, or that would destroy the input."""
    if path.suffix != ".npz":
        raise ValueError(f"the output must end in .npz, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"the output's folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder")
    if path.exists() and path.samefile(source):
        raise ValueError(f"the output {path} is the input")


def write_merged(
    file: BinaryIO,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterable[Merged[Any]],
) -> None:
    """Write an .npz: tokens (B, K, D) or (K, D) as they come, the small arrays last."""
    rest: list[tuple[NDArray[Any], ...]] = []
    with zipfile.ZipFile(file, "w") as archive:
        # A ZipInfo carries no time of writing: the same input gives the same bytes.
        with archive.open(zipfile.ZipInfo("tokens.npy"), "w", force_zip64=True) as out:
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
                npy.write_array(out, array[0] if len(shape) == 2 else array)
