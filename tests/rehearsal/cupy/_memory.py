"""Device memory: blocks of CPU memory, which a pool like CuPy's allocates.

When the last array in a block is deleted, the block returns to the pool. The next
request of the same size from the same stream gets this block, with its old contents.
"""

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupy import _card, _runtime, _streams

_UNIT = 512  # bytes: CuPy's pool rounds sizes up to it, and CUDA aligns to it
_local = threading.local()
# The buffers in use, by address, so that `UnownedMemory` finds a buffer again.
_buffers: "weakref.WeakValueDictionary[int, np.ndarray]" = weakref.WeakValueDictionary()
_held = [0]  # bytes of the card's memory in use


class OutOfMemoryError(MemoryError):
    """The card has less free memory than requested."""


class Memory:
    """A block of memory that this object owns."""

    device_id = 0

    def __init__(self, size: int) -> None:
        self.size, self._buffer = size, _new_buffer(size)
        self.ptr = _address(self._buffer) if size else 0


class UnownedMemory:
    """A block that another object owns and keeps."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = 0
        # Memory at any other address is used as it is.
        self._buffer = _buffers.get(ptr)
        if self._buffer is None:
            self._buffer = np.frombuffer(
                (ctypes.c_uint8 * size).from_address(ptr), "u1"
            )


class _Pooled:
    """A block that returns to its pool when it is deleted."""

    device_id = 0

    def __init__(self, block: Memory, free: list[Memory], size: int) -> None:
        self._block, self._free, self.size = block, free, size
        self.ptr, self._buffer = block.ptr, block._buffer

    def __del__(self) -> None:
        self._free.append(self._block)


class MemoryPointer:
    """An address in a block."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class MemoryPool:
    """A pool that keeps free blocks, by stream and size."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        if allocator is not None:
            raise NotImplementedError("the stand-in's pools have no allocator")
        self._free: dict[tuple[int, int], list[Memory]] = {}
        self._blocks: weakref.WeakSet[Memory] = weakref.WeakSet()

    def malloc(self, size: int) -> MemoryPointer:
        if size == 0:
            return MemoryPointer(Memory(0), 0)
        rounded = -(-size // _UNIT) * _UNIT
        # Work in another stream may still use a block, so each stream has its own.
        key = _streams.get_current_stream().ptr, rounded
        free = self._free.setdefault(key, [])
        block = free.pop() if free else Memory(rounded)
        self._blocks.add(block)  # a weak set: a freed block leaves it
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
    # `using_allocator` sets it for a thread, `set_allocator` for the process.
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
        _local.allocator = before  # contexts may be nested


def alloc(size: int) -> MemoryPointer:
    """Allocate memory with the current allocator."""
    _runtime.check()
    return get_allocator()(size)


def held_bytes() -> int:
    """Return how many bytes of the card's memory are in use."""
    return _held[0]


def as_numpy(pointer: MemoryPointer, size: int) -> np.ndarray:
    """Return the bytes at a pointer, as an array."""
    first = pointer.ptr - pointer.mem.ptr
    return pointer.mem._buffer[first : first + size]


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


def _new_buffer(size: int) -> np.ndarray:
    """Allocate memory of the card. Here a capturing stream cannot do this.

    CUDA allows it in the relaxed mode, which is CuPy's default, and in no other mode.
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
    # Reserve more, and start at a multiple of the unit.
    room = np.empty(size + _UNIT, np.uint8)
    first = -_address(room) % _UNIT
    buffer = room[first : first + size]
    _buffers[_address(buffer)] = buffer
    _held[0] += size
    weakref.finalize(buffer, _give_back, size)  # when the buffer is deleted
    return buffer


def _give_back(size: int) -> None:
    _held[0] -= size


def _address(buffer: np.ndarray) -> int:
    return int(buffer.__array_interface__["data"][0])


for _name in (Memory, UnownedMemory, MemoryPointer, MemoryPool):
    _name.__module__ = "cupy.cuda"
