from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arrays.libraries import is_cuda


class Workspace:
    """GPU memory for what `quickmerge` holds while it works, kept between calls.

    The first call that is given it allocates; another of the same shapes, dtypes and
    options then finds all it needs and allocates nothing, so that a CUDA graph can
    capture it. Keep it for as long as such a graph, and let one call at a time, of one
    stream, have it. The CPU makes no use of it.

    Attributes
    ----------
    nbytes : int
        Bytes it holds.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> workspace, tokens = qm.Workspace(), np.ones((2, 9, 4))
    >>> merged = qm.quickmerge(tokens, 3, workspace=workspace)  # all is allocated here
    >>> tokens += 1
    >>> again = qm.quickmerge(tokens, 3, out=merged, workspace=workspace)
    >>> again is merged, workspace.nbytes
    (True, 0)
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._blocks: dict[tuple[int, int], list[Any]] = {}  # by device and size
        self._source: Any = None  # the allocator of CuPy's that was there before
        self._free: int | None = None

    def __reduce__(self) -> Any:
        """Refuse to be copied: memory is held once."""
        raise TypeError("a Workspace cannot be copied or pickled: make another")

    def lend(self) -> AbstractContextManager[None]:
        """Return a context in which CuPy allocates from this memory, in this thread."""
        import cupy

        self._source = cupy.cuda.get_allocator()
        scope: AbstractContextManager[None] = cupy.cuda.using_allocator(self._malloc)
        return scope

    def free_memory(self, now: int) -> int:
        """Return the free bytes of the first time this was asked.

        What goes by them must do the same in every call, though the memory has gone
        into this workspace since.
        """
        if self._free is None:
            self._free = now
        return self._free

    def _malloc(self, size: int) -> Any:
        """Lend a block of just this size, or else allocate it: CuPy's allocator."""
        import cupy

        if size == 0:
            return self._source(0)
        device = cupy.cuda.runtime.getDevice()
        blocks = self._blocks.setdefault((device, size), [])
        if blocks:
            block = blocks.pop()
        else:
            block = self._source(size)
            self.nbytes += size
        loan = _Loan(blocks, block)
        memory = cupy.cuda.UnownedMemory(block.ptr, size, loan, device)
        return cupy.cuda.MemoryPointer(memory, 0)


class _Loan:
    """Holds a block for as long as an array lives, and gives it back then."""

    def __init__(self, blocks: list[Any], block: Any) -> None:
        self._blocks, self._block = blocks, block

    def __del__(self) -> None:
        self._blocks.append(self._block)


def memory_of(workspace: Workspace | None, tokens: Any) -> AbstractContextManager[None]:
    """Return a context that allocates from a workspace, if that is of use here."""
    if workspace is None or not is_cuda(tokens):
        return nullcontext()
    return workspace.lend()
