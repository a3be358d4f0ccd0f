"""The card that the stand-in claims to be, and the check of each launch against it."""

from typing import Any

NAME = b"rehearsal"
CAPABILITY = "90"
MULTIPROCESSORS = 132
SHARED_BYTES = 227 << 10  # that a block may ask for
MEMORY_BYTES = 8 << 30

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


def check(
    source: str,
    options: tuple[str, ...],
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Any, ...],
    shared_mem: int,
    cooperative: bool,
) -> None:
    """Refuse a launch that the card could not run.

    Every launch of a kernel passes here before it is put into its stream. Replace this
    function to hold launches against a real card's limits; it accepts all of them.
    """
