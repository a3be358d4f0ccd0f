"""CuPy's interface to CUDA: devices, streams, events, memory."""

from typing import Any

from cupy import _card, _runtime
from cupy._memory import (
    Memory,
    MemoryPointer,
    MemoryPool,
    UnownedMemory,
    alloc,
    get_allocator,
    set_allocator,
    using_allocator,
)
from cupy._streams import Event, Graph, Stream, get_current_stream, get_elapsed_time

from . import compiler, runtime

# names.py compares this list with CuPy's names.
__all__ = [
    "Device",
    "Event",
    "Graph",
    "Memory",
    "MemoryPointer",
    "MemoryPool",
    "Stream",
    "UnownedMemory",
    "alloc",
    "compiler",
    "get_allocator",
    "get_current_stream",
    "get_elapsed_time",
    "is_available",
    "runtime",
    "set_allocator",
    "using_allocator",
]


class Device:
    """The only device."""

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)
        _runtime.check_number(self.id)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    # `with Device(0):` makes it the current device, which it always is.
    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *exception: object) -> None:
        """Return to the device before, which is the same one."""

    def use(self) -> "Device":
        return self

    def synchronize(self) -> None:
        runtime.deviceSynchronize()

    @property
    def attributes(self) -> dict[str, int]:
        _runtime.check()
        return dict(_card.ATTRIBUTES)  # a copy, which callers may change

    @property
    def compute_capability(self) -> str:
        return _card.CAPABILITY  # "90" for 9.0

    @property
    def mem_info(self) -> tuple[int, int]:
        return runtime.memGetInfo()


def is_available() -> bool:
    return True  # tests for a GPU run on the stand-in as well
