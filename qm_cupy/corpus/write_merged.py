"""Write the results of a merge, one chunk after the other."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files.outputs import Output
from ..files.stored import file_size
from ..files.write import Layout, write_arrays
from ..results import Merged
from .plan import Plan


class Written(NamedTuple):
    """What has been written."""

    max_groups: int  # the largest K
    num_groups: int  # of all sequences together
    num_bytes: int


def write_merged(plan: Plan, output: Output, parts: Iterator[Merged[Any]]) -> Written:
    """Write the results of all chunks.

    A .npy file holds the merged tokens only.
    """
    folder: Path | None = output.folder()
    with output.open() as file, tempfile.TemporaryFile(dir=folder) as spool:
        max_groups = plan.max_groups
        if max_groups is None:
            # The header of the output contains K, so all results are needed first.
            max_groups = _spool(spool, parts)
            parts = _spooled(spool)
        first = next(parts)
        layout = _layout(plan, max_groups, first)
        is_single = len(plan.file.tokens.shape) == 2
        num_groups: list[int] = []
        counted = _counted(first, parts, num_groups)
        del first  # so that only one part is in memory
        rows = (_fields(x, max_groups, is_single) for x in counted)
        write_arrays(file, output.format, layout, rows, folder)
        num_bytes = file_size(file)
    return Written(max_groups, sum(num_groups), num_bytes)


def _counted(
    first: Merged[Any], parts: Iterator[Merged[Any]], num_groups: list[int]
) -> Iterator[Merged[Any]]:
    """Yield all parts, and append the number of groups of each to `num_groups`."""
    num_groups.append(int(np.count_nonzero(first.sizes)))
    yield first
    del first
    for part in parts:
        num_groups.append(int(np.count_nonzero(part.sizes)))
        yield part
        del part


def _layout(plan: Plan, max_groups: int, first: Merged[Any]) -> Layout:
    """Return the shapes and dtypes of the result; `first` is the first part of it."""
    *batch, _, dim = plan.shape_with(max_groups)
    num_tokens = plan.file.tokens.shape[-2]
    per_group, per_token = (*batch, max_groups), (*batch, num_tokens)
    shapes = Merged((*per_group, dim), per_token, per_group, per_group, per_token)
    return {
        name: (shape, x.dtype)
        for name, shape, x in zip(Merged._fields, shapes, first, strict=True)
    }


def _fields(
    merged: Merged[Any], max_groups: int, is_single: bool
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a chunk, with its groups padded to the K of the file."""
    missing = max_groups - merged.sizes.shape[-1]
    if missing:
        extra = ((0, 0), (0, missing))  # axes B and K
        merged = merged._replace(
            tokens=np.pad(merged.tokens, (*extra, (0, 0))),
            sizes=np.pad(merged.sizes, extra),
            positions=np.pad(merged.positions, extra, constant_values=-1),
        )
    return {name: x[0] if is_single else x for name, x in merged._asdict().items()}


def _spool(file: Any, parts: Iterator[Merged[Any]]) -> int:
    """Write results to a temporary file, and return the largest K."""
    max_groups = 0
    for part in parts:
        max_groups = max(max_groups, part.sizes.shape[-1])
        np.save(file, np.array([x.dtype.name for x in part]))
        for x in part:
            np.save(file, x, allow_pickle=False)
    return max_groups


def _spooled(file: Any) -> Iterator[Merged[Any]]:
    """Yield the results that `_spool` has written."""
    size = file.tell()
    file.seek(0)
    while file.tell() < size:
        dtypes = np.load(file)
        # NumPy's format has no bfloat16, so the dtype is restored.
        yield Merged(*(np.load(file).view(str(dtype)) for dtype in dtypes))
