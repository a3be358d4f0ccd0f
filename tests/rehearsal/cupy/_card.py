"""The card that the stand-in claims to be, and what holds each launch against it.

`checker` is the hook: replace it by a function whose result knows a real card's limits.
"""

from typing import Any

NAME = b"rehearsal"
CAPABILITY = "90"
MULTIPROCESSORS = 132
SHARED_BYTES = 227 << 10  # that a block may ask for
MEMORY_BYTES = 1 << 30  # little, as who asks for a share of it gets it from the CPU

ATTRIBUTES = {
    "MultiProcessorCount": MULTIPROCESSORS,
    "MaxSharedMemoryPerBlock": 48 << 10,
    "MaxSharedMemoryPerBlockOptin": SHARED_BYTES,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxRegistersPerBlock": 65536,
    "WarpSize": 32,
    "ComputeCapabilityMajor": int(CAPABILITY[:-1]),
    "ComputeCapabilityMinor": int(CAPABILITY[-1]),
    "CooperativeLaunch": 1,
    "ClockRate": 1_980_000,
}

PROPERTIES = {
    "name": NAME,
    "totalGlobalMem": MEMORY_BYTES,
    "sharedMemPerBlock": 48 << 10,
    "sharedMemPerBlockOptin": SHARED_BYTES,
    "regsPerBlock": 65536,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "major": int(CAPABILITY[:-1]),
    "minor": int(CAPABILITY[-1]),
    "multiProcessorCount": MULTIPROCESSORS,
    "l2CacheSize": 50 << 20,
    "clockRate": 1_980_000,
    "memoryClockRate": 2_619_000,
    "memoryBusWidth": 5120,
}


class Accepting:
    """Accepts every launch: the emulator counts no registers and no shared memory."""

    def __init__(self) -> None:
        self.shared_size_bytes = 0  # static shared memory, which nobody has counted
        self.max_dynamic_shared_size_bytes = 48 << 10  # set by who needs more

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Refuse a launch that the card cannot run; `args` are CuPy's arrays."""


def checker(
    source: str, options: tuple[str, ...], name: str, cooperative: bool
) -> Accepting:
    """Return what checks each launch of a kernel before it goes into its stream.

    It is asked once for each kernel, and has the two attributes of `Accepting`, which
    ``cupy.RawKernel`` shows as its own.
    """
    return Accepting()
