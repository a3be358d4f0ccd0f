"""Workspaces: GPU memory that is kept between calls, for CUDA graphs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arrays.libraries import is_cuda


class Workspace:
    """GPU memory for intermediate results of `quickmerge`, kept between calls.

    The first call with a workspace allocates the memory. A later call with the same
    shapes, dtypes and options uses the same memory. With `out` and an integer budget it
    allocates nothing, so that a CUDA graph can capture it. Keep the workspace as long
    as you use the graph. Use a workspace in one call at a time and in one stream. On
    the CPU it has no effect.

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
        # Buffers that no array uses now, by device and size. A captured graph contains
        # their addresses. A buffer is therefore never returned to CuPy, and it is
        # reused only for requests of its own size.
        self._free_buffers: dict[tuple[int, int], list[Any]] = {}
        # CuPy's allocator at the time of the call of `lend`. New buffers come from it.
        self._source: Any = None
        # The argument of the first call of `device_bytes_at_first_call`.
        self._device_bytes_at_first_call: int | None = None

    def __reduce__(self) -> Any:
        """Raise TypeError, because a copy would refer to the same memory."""
        raise TypeError("a Workspace cannot be copied or pickled: make a new one")

    def lend(self) -> AbstractContextManager[None]:
        """Return a context in which CuPy allocates from this memory.

        It applies to the current Python thread only.
        """
        import cupy

        self._source = cupy.cuda.get_allocator()
        scope: AbstractContextManager[None] = cupy.cuda.using_allocator(self._malloc)
        return scope

    def device_bytes_at_first_call(self, free_bytes: int) -> int:
        """Return the number of free bytes that the first call of this method received.

        The number of sequences that `linkage` computes in one launch depends on the
        free memory. The workspace keeps memory after the first call, so less is free
        later. Every call must use the same number, so that it requests buffers of the
        same sizes.
        """
        if self._device_bytes_at_first_call is None:
            self._device_bytes_at_first_call = free_bytes
        return self._device_bytes_at_first_call

    def _malloc(self, size: int) -> Any:
        """Return a free buffer of exactly this size, or allocate one.

        CuPy calls this method as its allocator.
        """
        import cupy

        if size == 0:  # there is no memory to keep
            return self._source(0)
        device = cupy.cuda.runtime.getDevice()
        # A later call with the same shapes requests the same sizes. A buffer of the
        # first call is then free for each request.
        free = self._free_buffers.setdefault((device, size), [])
        if free:
            buffer = free.pop()
        else:
            buffer = self._source(size)
            self.nbytes += size
        # CuPy keeps `loan`, the owner of the memory, as long as an array uses the
        # memory.
        loan = _Loan(free, buffer)
        memory = cupy.cuda.UnownedMemory(buffer.ptr, size, loan, device)
        return cupy.cuda.MemoryPointer(memory, 0)


class _Loan:
    """The owner of a buffer that one or more arrays use.

    Python deletes this object with the last of these arrays. The buffer is then free
    for another request.
    """

    def __init__(self, free: list[Any], buffer: Any) -> None:
        self._free, self._buffer = free, buffer

    def __del__(self) -> None:
        self._free.append(self._buffer)


def memory_of(workspace: Workspace | None, tokens: Any) -> AbstractContextManager[None]:
    """Return a context in which CuPy allocates from a workspace.

    It has no effect without a workspace, or for tokens on the CPU.
    """
    if workspace is not None and not isinstance(workspace, Workspace):
        got = "a class" if isinstance(workspace, type) else type(workspace).__name__
        raise TypeError(
            f"`workspace` must be a Workspace or None, got {got}: make one by "
            "`qm_cupy.Workspace()`"
        )
    if workspace is None or not is_cuda(tokens):
        return nullcontext()
    return workspace.lend()
