"""Device memory: blocks of the CPU's, handed out by a pool as CuPy's is.

A block goes back to the pool with the last array that lies in it, and the next request
of its size from the same stream gets it, with what is in it.
"""

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupy import _card, _runtime, _streams

_UNIT = 512  # bytes that CuPy's pool rounds up to, and that CUDA aligns to
_local = threading.local()
_buffers: "weakref.WeakValueDictionary[int, np.ndarray]" = weakref.WeakValueDictionary()
_held = [0]


class OutOfMemoryError(MemoryError):
    """The card has no such amount of memory left."""


class Memory:
    """A block of its own."""

    device_id = 0

    def __init__(self, size: int) -> None:
        self.size, self._buffer = size, _new_buffer(size)
        self.ptr = _address(self._buffer) if size else 0


class UnownedMemory:
    """A block that something else owns and keeps."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = 0
        self._buffer = _buffers.get(ptr)
        if self._buffer is None:
            self._buffer = np.frombuffer(
                (ctypes.c_uint8 * size).from_address(ptr), "u1"
            )


class _Pooled:
    """A block that goes back to its pool."""

    device_id = 0

    def __init__(self, block: Memory, free: list[Memory], size: int) -> None:
        self._block, self._free, self.size = block, free, size
        self.ptr, self._buffer = block.ptr, block._buffer

    def __del__(self) -> None:
        self._free.append(self._block)


class MemoryPointer:
    """A place in a block."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class MemoryPool:
    """Blocks by stream and size; it keeps those that are free."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        if allocator is not None:
            raise NotImplementedError("the stand-in's pools have no allocator")
        self._free: dict[tuple[int, int], list[Memory]] = {}
        self._blocks: weakref.WeakSet[Memory] = weakref.WeakSet()

    def malloc(self, size: int) -> MemoryPointer:
        if size == 0:
            return MemoryPointer(Memory(0), 0)
        rounded = -(-size // _UNIT) * _UNIT
        key = _streams.get_current_stream().ptr, rounded
        free = self._free.setdefault(key, [])
        block = free.pop() if free else Memory(rounded)
        self._blocks.add(block)
        return MemoryPointer(_Pooled(block, free, size), 0)

    def free_all_blocks(self, stream: Any = None) -> None:
        for blocks in self._free.values():
            blocks.clear()

    def free_bytes(self) -> int:
        return sum(block.size for blocks in self._free.values() for block in blocks)

    def total_bytes(self) -> int:
        return sum(block.size for block in self._blocks)

    def used_bytes(self) -> int:
        return self.total_bytes() - self.free_bytes()


_default_pool = MemoryPool()
_process: list[Callable[[int], MemoryPointer]] = [_default_pool.malloc]


def get_default_memory_pool() -> MemoryPool:
    return _default_pool


def get_allocator() -> Callable[[int], MemoryPointer]:
    return getattr(_local, "allocator", None) or _process[0]


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    if getattr(_local, "allocator", None) is not None:
        raise ValueError("Can't change the global allocator inside `using_allocator`")
    _process[0] = _malloc if allocator is None else allocator


@contextlib.contextmanager
def using_allocator(
    allocator: Callable[[int], MemoryPointer] | None = None,
) -> Iterator[None]:
    before = getattr(_local, "allocator", None)
    _local.allocator = _malloc if allocator is None else allocator
    try:
        yield
    finally:
        _local.allocator = before


def alloc(size: int) -> MemoryPointer:
    """Allocate by the current allocator."""
    _runtime.check()
    return get_allocator()(size)


def held_bytes() -> int:
    """Return how much of the card's memory is taken."""
    return _held[0]


def as_numpy(pointer: MemoryPointer, size: int) -> np.ndarray:
    """Return the bytes at a pointer."""
    first = pointer.ptr - pointer.mem.ptr
    return pointer.mem._buffer[first : first + size]


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


def _new_buffer(size: int) -> np.ndarray:
    """Take memory from the card, which a capturing stream cannot do here.

    CUDA allows it in the relaxed mode of CuPy's default and in no other.
    """
    _runtime.check()
    if size == 0:
        return np.empty(0, np.uint8)
    _streams.refuse_in_capture()
    if _held[0] + size > _card.MEMORY_BYTES:
        raise OutOfMemoryError(
            f"Out of memory allocating {size:,} bytes "
            f"(allocated so far: {_held[0]:,} bytes)."
        )
    room = np.empty(size + _UNIT, np.uint8)
    first = -_address(room) % _UNIT
    buffer = room[first : first + size]
    _buffers[_address(buffer)] = buffer
    _held[0] += size
    weakref.finalize(buffer, _give_back, size)
    return buffer


def _give_back(size: int) -> None:
    _held[0] -= size


def _address(buffer: np.ndarray) -> int:
    return int(buffer.__array_interface__["data"][0])


for _name in (Memory, UnownedMemory, MemoryPointer, MemoryPool):
    _name.__module__ = "cupy.cuda"
