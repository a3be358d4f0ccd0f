"""Launches, noted as they are made, whatever runs the kernels."""

from typing import Any, NamedTuple
from unittest import mock

from seam import cuda

from qm_cupy.cuda import launch as launching


class Recorded(NamedTuple):
    """A launch: the kernel that `launch` found, its grid, and its arguments."""

    file: str
    kernel: str
    dtype: str
    blocks: int
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    args: tuple[Any, ...]


def recording(note):
    """Return `cuda.launch` that also calls `note` with each launch."""
    launch = cuda.launch

    def recorded(*args, **options):
        raw_kernel = launching.raw_kernel

        def noted(file, kernel, dtype, *cooperative):
            run = raw_kernel(file, kernel, dtype, *cooperative)
            return _Noted(run, lambda *call: note(Recorded(file, kernel, dtype, *call)))

        with mock.patch.object(launching, "raw_kernel", noted):
            launch(*args, **options)

    return recorded


class _Noted:
    """A kernel with the attributes of the one behind it."""

    def __init__(self, run, note):
        vars(self).update(_run=run, _note=note)

    def __call__(self, grid, block, args, *, shared_mem=0):
        self._note(grid[0], block[0], shared_mem, args)
        self._run(grid, block, args, shared_mem=shared_mem)

    def __getattr__(self, name):
        return getattr(self._run, name)

    def __setattr__(self, name, value):
        setattr(self._run, name, value)
