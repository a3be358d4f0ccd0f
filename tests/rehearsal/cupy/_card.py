"""The card that the stand-in claims to be, an H100, and the check of its launches."""

import importlib
import sys
from pathlib import Path
from typing import Any

NAME = b"rehearsal"
CAPABILITY = "90"
MULTIPROCESSORS = 132
SHARED_BYTES = 227 << 10  # that a block may ask for
MEMORY_BYTES = 1 << 30  # little: it is the CPU's, and benchmarks take a part of it

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
    """Accepts every launch: of kernels that are not the library's."""

    shared_size_bytes = 0
    max_dynamic_shared_size_bytes = 48 << 10

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Accept a launch."""


def checker(
    source: str, options: tuple[str, ...], dtype: str, name: str, cooperative: bool
) -> Any:
    """Return what refuses each launch of a kernel that the card cannot run.

    It is asked for once for each kernel. Its two attributes, those of `Accepting`, are
    what ``cupy.RawKernel`` shows as its own.
    """
    cards, card_device, nvrtc = map(of_tests, ("cards", "card_device", "nvrtc"))
    card = cards.CARDS[-1]
    facts = nvrtc.kernel_facts(source, (*options, f"-arch=sm_{card.arch}"))[name]
    parameters = card_device.parameters_of(source, name, dtype)
    return cards.Kernel(name, facts, parameters, card, cooperative)


def of_tests(name: str) -> Any:
    """Return a module of the folder that this package is below."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        sys.path.append(str(Path(__file__).resolve().parents[2]))  # tests/
        return importlib.import_module(name)
