"""The card that the stand-in represents, an H100, and the check of its launches."""

import importlib
import sys
from pathlib import Path
from typing import Any

NAME = b"rehearsal"
CAPABILITY = "90"
MULTIPROCESSORS = 132
SHARED_BYTES = 227 << 10  # a block may request so much
# Little, because it is the CPU's memory, and benchmarks use a fraction of it.
MEMORY_BYTES = 1 << 30

# The attributes and properties of an H100, under CuPy's names. Clock rates are in kHz.
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
    """Accept every launch. It is for kernels that do not belong to the library."""

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
    """Return a function that raises if the card cannot run a launch of a kernel.

    This is called once for each kernel. The result has the two attributes of
    `Accepting`, which ``cupy.RawKernel`` shows as its own.
    """
    # The limits come from tests/cards.py, the registers from real machine code.
    cards, card_device, nvrtc = map(of_tests, ("cards", "card_device", "nvrtc"))
    card = cards.CARDS[-1]  # the H100
    facts = nvrtc.kernel_facts(source, (*options, f"-arch=sm_{card.arch}"))[name]
    parameters = card_device.parameters_of(source, name, dtype)
    return cards.Kernel(name, facts, parameters, card, cooperative)


def of_tests(name: str) -> Any:
    """Return a module of the folder tests/, two levels above this package."""
    # The folder may be missing from the import path.
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        sys.path.append(str(Path(__file__).resolve().parents[2]))  # tests/
        return importlib.import_module(name)
