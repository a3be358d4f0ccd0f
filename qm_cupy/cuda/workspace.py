"""Workspaces: GPU memory that is kept between calls, for CUDA graphs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arrays.libraries import is_cuda


class Workspace:
    """GPU memory for intermediate results of `quickmerge`, kept between calls.

    The first call with a workspace allocates the memory. A later call with the same
    shapes, dtypes and options uses the same memory and allocates nothing, so that a
    CUDA graph can capture it. Keep the workspace as long as such a graph. Use it in one
    call at a time and in one stream. On the CPU it has no effect.

    Attributes
    ----------
    nbytes : int
        Size of the memory in bytes.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> workspace, tokens = qm.Workspace(), np.ones((2, 9, 4))
    >>> merged = qm.quickmerge(tokens, 3, workspace=workspace)  # allocates
    >>> tokens += 1
    >>> again = qm.quickmerge(tokens, 3, out=merged, workspace=workspace)
    >>> again is merged, workspace.nbytes
    (True, 0)
    """

    def __init__(self) -> None:
        self.nbytes = 0
        # Free blocks by device and size. A captured graph contains the addresses, so a
        # block is reused for the same size only and never freed.
        self._blocks: dict[tuple[int, int], list[Any]] = {}
        self._source: Any = None  # CuPy's allocator from before `lend`
        self._free: int | None = None  # free bytes of the device in the first call

    def __reduce__(self) -> Any:
        """Raise TypeError: a copy would refer to the same memory."""
        raise TypeError("a Workspace cannot be copied or pickled: make a new one")

    def lend(self) -> AbstractContextManager[None]:
        """Return a context in which CuPy allocates from this memory, in this thread."""
        import cupy

        self._source = cupy.cuda.get_allocator()
        scope: AbstractContextManager[None] = cupy.cuda.using_allocator(self._malloc)
        return scope

    def free_memory(self, now: int) -> int:
        """Return the free bytes that the first call of this method received.

        A launcher may choose its algorithm by the free memory. It must choose the same
        in every call, although the workspace itself has used memory since then.
        """
        if self._free is None:
            self._free = now
        return self._free

    def _malloc(self, size: int) -> Any:
        """Return a free block of exactly this size, or allocate one.

        CuPy calls this as its allocator.
        """
        import cupy

        if size == 0:  # no memory, so there is nothing to keep
            return self._source(0)
        device = cupy.cuda.runtime.getDevice()
        # A later call with the same shapes asks for the same sizes, so that it finds a
        # free block for each request.
        blocks = self._blocks.setdefault((device, size), [])
        if blocks:
            block = blocks.pop()
        else:
            block = self._source(size)
            self.nbytes += size
        # CuPy keeps `loan` as the owner of the memory as long as an array uses it.
        loan = _Loan(blocks, block)
        memory = cupy.cuda.UnownedMemory(block.ptr, size, loan, device)
        return cupy.cuda.MemoryPointer(memory, 0)


class _Loan:
    """The owner of a block in use. Its end puts the block back into the free list."""

    def __init__(self, blocks: list[Any], block: Any) -> None:
        self._blocks, self._block = blocks, block

    def __del__(self) -> None:
        self._blocks.append(self._block)


def memory_of(workspace: Workspace | None, tokens: Any) -> AbstractContextManager[None]:
    """Return a context that allocates from a workspace, if there is one and a GPU."""
    if workspace is None or not is_cuda(tokens):
        return nullcontext()
    return workspace.lend()
