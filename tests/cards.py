"""GPUs that execute nothing, and the limits that each holds a launch against.

A kernel is checked as CuPy and the CUDA driver would check it, and its arguments as
neither does: registers, static shared memory, launch bounds and parameters are those of
the machine code that NVRTC makes for the card's architecture.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from device_array import DeviceArray

MOST_THREADS = 1024  # of a block
MOST_BLOCKS = 2**31 - 1, 65_535, 65_535  # of a grid, in x, y and z
SHARED_UNASKED = 48 << 10  # bytes of shared memory, static and dynamic, without asking
REGISTERS = 65_536  # of a multiprocessor


class Limits(NamedTuple):
    """What a multiprocessor (SM) holds at once."""

    threads: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications
# per Compute Capability".
LIMITS = {
    75: Limits(1024, 16, 64 << 10),
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}


class Card(NamedTuple):
    """A model of GPU."""

    name: str
    arch: int
    multiprocessors: int
    shared: int
    """Bytes of shared memory that a block can ask for, at most."""
    memory: int
    """Bytes free."""


CARDS = (
    Card("T4", 75, 40, 64 << 10, 15 << 30),
    Card("A100", 80, 108, 163 << 10, 39 << 30),
    Card("RTX 4090", 89, 128, 99 << 10, 23 << 30),
    Card("H100", 90, 132, 227 << 10, 79 << 30),
)


class LaunchError(RuntimeError):
    """A launch that a real card refuses, or whose arguments are not the kernel's."""


def blocks_per_sm(arch: int, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks fit, by the rules of CUDA's own cuda_occupancy.h."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    # Registers are given out per warp, 256 at a time, by four parts of the SM.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    # From sm_80 on the system takes 1 KB of each block; bytes go by the 128 (or 256).
    unit, system = (256, 0) if arch < 80 else (128, 1024)
    per_block = -(-(shared + system) // unit) * unit
    by_shared = limits.shared // per_block if per_block else limits.blocks
    by_threads = limits.threads // (warps * 32)
    return min(limits.blocks, by_registers, by_shared, by_threads)


class Parameter(NamedTuple):
    """A parameter of a kernel as its source declares it."""

    name: str
    dtype: str  # of a pointer, what it points to
    pointer: bool


class Argument(NamedTuple):
    """What a launch gives for a parameter."""

    dtype: str
    pointer: bool
    null: bool = False
    contiguous: bool = True


class Launch(NamedTuple):
    """A launch without the values it works on."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[Argument, ...]
    waiting: int
    """Blocks that wait for each other: the argument `blocks`, if there is one."""


def describe(parameters, grid, block, args, shared_mem=0):
    """Return a launch as cards see it."""
    blocks = [
        int(x) for p, x in zip(parameters, args, strict=False) if p[0] == "blocks"
    ]
    arguments = tuple([_argument(x) for x in args])
    return Launch(tuple(grid), tuple(block), shared_mem, arguments, *blocks or [1])


def _argument(x):
    if isinstance(x, DeviceArray) or hasattr(type(x), "__cuda_array_interface__"):
        return _known(x.dtype, True, False, x.flags.c_contiguous)
    if isinstance(x, np.generic):
        return _known(x.dtype, False, type(x) is np.uint64 and x == 0, True)
    return Argument(f"the host's {type(x).__name__}", False)


@functools.cache
def _known(dtype, *rest):
    return Argument(dtype.name, *rest)  # NumPy composes a name anew each time


class Kernel:
    """One kernel on one card, with what `launch` uses of a ``cupy.RawKernel``."""

    def __init__(self, name, facts, parameters, card, cooperative=False):
        self.name, self.facts, self.card = name, facts, card
        self.parameters, self.cooperative = parameters, cooperative
        self._allowed = SHARED_UNASKED  # static and dynamic
        self._check = functools.cache(self._check)

    @property
    def shared_size_bytes(self):
        """Bytes of static shared memory."""
        return self.facts.shared

    @property
    def max_dynamic_shared_size_bytes(self):
        """Bytes of dynamic shared memory that a launch may take; can be set."""
        return self._allowed - self.facts.shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        wanted = self.facts.shared + size
        self._hold("bytes of shared memory asked for", wanted, self.card.shared)
        self._allowed = wanted

    def __call__(self, grid, block, args, *, shared_mem=0):
        self.hold(describe(self.parameters, grid, block, args, shared_mem))

    def hold(self, launch):
        """Raise ``LaunchError`` if the card refuses the launch."""
        self._check(launch, self._allowed)

    def _check(self, launch, allowed):
        self._check_arguments(launch.arguments)
        if launch.waiting > 1 and not self.cooperative:
            raise self._error(
                f"{launch.waiting} blocks wait for each other, but the launch is not "
                "cooperative"
            )
        grid, block = ((*size, 1, 1)[:3] for size in (launch.grid, launch.block))
        if min(*grid, *block) < 1:
            raise self._error(f"grid {grid} of blocks {block} is empty")
        for axis, blocks, limit in zip("xyz", grid, MOST_BLOCKS, strict=True):
            self._hold(f"blocks in {axis}", blocks, limit)
        threads, shared = math.prod(block), self.facts.shared + launch.shared
        bound = min(self.facts.bound or MOST_THREADS, MOST_THREADS)
        self._hold("threads of a block", threads, bound)
        self._hold("bytes of shared memory", shared, allowed)
        per_warp = -(-self.facts.registers * 32 // 256) * 256
        self._hold("registers of a block", per_warp * -(-threads // 32), REGISTERS)
        fit = blocks_per_sm(self.card.arch, threads, self.facts.registers, shared)
        if fit == 0:
            raise self._error(f"no block of {threads} threads, {shared} bytes fits")
        if self.cooperative:
            resident = fit * self.card.multiprocessors
            self._hold("blocks of a cooperative launch", math.prod(grid), resident)

    def _check_arguments(self, arguments):
        """Refuse what the PTX or the source declares otherwise."""
        wanted = len(self.facts.parameters)
        if not wanted == len(self.parameters) == len(arguments):
            raise self._error(f"takes {wanted} arguments, got {len(arguments)}")
        declared = zip(self.parameters, self.facts.parameters, arguments, strict=True)
        for i, (parameter, ptx, x) in enumerate(declared):
            fits = x[:2] == parameter[1:] or (parameter.pointer and x.null)
            real = not x.pointer and x.dtype == "float64"
            if not fits or ptx != ("f64" if real else "u64"):
                raise self._error(
                    f"argument {i} is {_spelled(parameter)} {parameter.name} "
                    f"(.{ptx}), got {_spelled(x)}"
                )
            if not x.contiguous:
                raise self._error(f"argument {i}, {parameter.name}, is strided")

    def _hold(self, what, wanted, limit):
        if wanted > limit:
            raise self._error(f"{what}: wanted {wanted}, limit {limit}")

    def _error(self, what):
        return LaunchError(f"{self.name} on {self.card.name}: {what}")


def _spelled(x):
    return f"{x.dtype}*" if x.pointer else x.dtype
