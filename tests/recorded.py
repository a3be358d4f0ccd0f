"""Records kernel launches as they are made, on a GPU, an interpreter or a model."""

from typing import Any, NamedTuple
from unittest import mock

from seam import cuda

from qm_cupy.cuda import launch as launching


class Recorded(NamedTuple):
    """One launch: the kernel, its grid, and its arguments."""

    file: str
    kernel: str
    dtype: str
    blocks: int
    threads: int  # per block
    shared: int  # bytes of dynamic shared memory
    args: tuple[Any, ...]


def recording(note):
    """Return a `cuda.launch` that also calls `note` with each launch."""
    launch = cuda.launch

    def recorded(*args, **options):
        # The original is looked up at each call: a test may have replaced it since.
        raw_kernel = launching.raw_kernel

        def noted(file, kernel, dtype, *cooperative):
            run = raw_kernel(file, kernel, dtype, *cooperative)
            # The grid is known only when the kernel is called, so the note is made
            # there.
            return _Noted(run, lambda *call: note(Recorded(file, kernel, dtype, *call)))

        with mock.patch.object(launching, "raw_kernel", noted):
            launch(*args, **options)

    return recorded


class _Noted:
    """A kernel that notes its calls and has the attributes of the original."""

    def __init__(self, run, note):
        # `self._run = run` would go to the kernel itself.
        vars(self).update(_run=run, _note=note)

    def __call__(self, grid, block, args, *, shared_mem=0):
        self._note(grid[0], block[0], shared_mem, args)
        self._run(grid, block, args, shared_mem=shared_mem)

    def __getattr__(self, name):
        return getattr(self._run, name)

    def __setattr__(self, name, value):
        setattr(self._run, name, value)
