"""Models of GPUs that execute nothing but check every launch against their limits.

A kernel's launch is checked as CuPy and the CUDA driver would check it. Its arguments
are checked too, which neither of them does. Registers, static shared memory, launch
bounds and parameters come from the machine code that NVRTC makes for the card.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from device_array import DeviceArray

MAX_THREADS = 1024  # per block
MAX_BLOCKS = 2**31 - 1, 65_535, 65_535  # per grid, in x, y and z
DEFAULT_SHARED = 48 << 10  # bytes of shared memory, static and dynamic, by default
REGISTERS = 65_536  # per multiprocessor


class Limits(NamedTuple):
    """The resources of a multiprocessor (SM) that its blocks divide among them."""

    threads: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications
# per Compute Capability".
LIMITS = {  # by compute capability: 75 is sm_75
    75: Limits(1024, 16, 64 << 10),
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}


class Card(NamedTuple):
    """One model of GPU."""

    name: str
    arch: int
    multiprocessors: int
    shared: int
    """Largest shared memory of one block, in bytes."""
    memory: int
    """Free memory, in bytes."""


# From sm_80 on a block can use 1 KB less than the multiprocessor has: the system takes
# 1 KB of each block. Free memory is below the nominal size.
CARDS = (
    Card("T4", 75, 40, 64 << 10, 15 << 30),
    Card("A100", 80, 108, 163 << 10, 39 << 30),
    Card("RTX 4090", 89, 128, 99 << 10, 23 << 30),
    Card("H100", 90, 132, 227 << 10, 79 << 30),
)


class LaunchError(RuntimeError):
    """A launch that a real card refuses, or whose arguments do not fit the kernel."""


def blocks_per_sm(arch: int, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks fit in an SM, by the rules of CUDA's cuda_occupancy.h."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    # Registers are allocated per warp in units of 256, in each of the SM's four parts.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    # From sm_80 on the system takes 1 KB of each block. Units are 128 or 256 bytes.
    unit, system = (256, 0) if arch < 80 else (128, 1024)
    per_block = -(-(shared + system) // unit) * unit
    by_shared = limits.shared // per_block if per_block else limits.blocks
    # Whole warps: a block of 33 threads occupies 64.
    by_threads = limits.threads // (warps * 32)
    return min(limits.blocks, by_registers, by_shared, by_threads)


class Parameter(NamedTuple):
    """A parameter of a kernel as its source declares it."""

    name: str
    dtype: str  # of the elements, if it is a pointer
    pointer: bool


class Argument(NamedTuple):
    """An argument of a launch, without its value."""

    dtype: str
    pointer: bool
    null: bool = False
    contiguous: bool = True


class Launch(NamedTuple):
    """A launch without the values that it works on, so that equal ones are cached."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[Argument, ...]
    waiting: int
    """Number of blocks that wait for each other: the argument `blocks`, or 1."""


def describe(parameters, grid, block, args, shared_mem=0):
    """Return a launch in the form that cards check."""
    # A kernel with a parameter `blocks` has a barrier over that many blocks.
    blocks = [
        int(x) for p, x in zip(parameters, args, strict=False) if p[0] == "blocks"
    ]
    arguments = tuple([_argument(x) for x in args])
    return Launch(tuple(grid), tuple(block), shared_mem, arguments, *blocks or [1])


def _argument(x):
    if isinstance(x, DeviceArray) or hasattr(type(x), "__cuda_array_interface__"):
        return _known(x.dtype, True, False, x.flags.c_contiguous)
    if isinstance(x, np.generic):
        # `launch` passes None as an unsigned zero: only that type can be a null
        # pointer.
        return _known(x.dtype, False, type(x) is np.uint64 and x == 0, True)
    # A Python number, which `launch` converts.
    return Argument(f"the host's {type(x).__name__}", False)


@functools.cache
def _known(dtype, *rest):
    return Argument(dtype.name, *rest)  # NumPy builds the name again at each access


class Kernel:
    """One kernel on one card, with the part of ``cupy.RawKernel`` in use."""

    def __init__(self, name, facts, parameters, card, cooperative=False):
        self.name, self.facts, self.card = name, facts, card
        self.parameters, self.cooperative = parameters, cooperative
        self._allowed = DEFAULT_SHARED  # static and dynamic, in bytes
        # Tests repeat the same launch for many values; one check is enough.
        self._check = functools.cache(self._check)

    @property
    def shared_size_bytes(self):
        """Return the static shared memory in bytes."""
        return self.facts.shared

    @property
    def max_dynamic_shared_size_bytes(self):
        """Dynamic shared memory that a launch may use, in bytes; it can be set."""
        return self._allowed - self.facts.shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        wanted = self.facts.shared + size
        self._check_limit("bytes of shared memory asked for", wanted, self.card.shared)
        self._allowed = wanted

    def __call__(self, grid, block, args, *, shared_mem=0):
        self.check(describe(self.parameters, grid, block, args, shared_mem))

    def check(self, launch):
        """Raise ``LaunchError`` if the card refuses the launch."""
        # The limit is part of the cache key: it may change between two launches.
        self._check(launch, self._allowed)

    def _check(self, launch, allowed):
        self._check_arguments(launch.arguments)
        # Blocks of a normal launch may not all run at once, so a barrier can wait
        # forever.
        if launch.waiting > 1 and not self.cooperative:
            raise self._error(
                f"{launch.waiting} blocks wait for each other, but the launch is not "
                "cooperative"
            )
        # Missing axes are 1.
        grid, block = ((*size, 1, 1)[:3] for size in (launch.grid, launch.block))
        if min(*grid, *block) < 1:
            raise self._error(f"grid {grid} of blocks {block} is empty")
        for axis, blocks, limit in zip("xyz", grid, MAX_BLOCKS, strict=True):
            self._check_limit(f"blocks in {axis}", blocks, limit)
        threads, shared = math.prod(block), self.facts.shared + launch.shared
        # __launch_bounds__ of the kernel, if it has them: a larger block cannot start.
        bound = min(self.facts.bound or MAX_THREADS, MAX_THREADS)
        self._check_limit("threads of a block", threads, bound)
        self._check_limit("bytes of shared memory", shared, allowed)
        per_warp = -(-self.facts.registers * 32 // 256) * 256  # allocated by 256
        self._check_limit(
            "registers of a block", per_warp * -(-threads // 32), REGISTERS
        )
        fit = blocks_per_sm(self.card.arch, threads, self.facts.registers, shared)
        if fit == 0:
            raise self._error(f"no block of {threads} threads, {shared} bytes fits")
        # All blocks must be resident at once.
        if self.cooperative:
            resident = fit * self.card.multiprocessors
            self._check_limit(
                "blocks of a cooperative launch", math.prod(grid), resident
            )

    def _check_arguments(self, arguments):
        """Raise if an argument differs from what the PTX and the source declare."""
        wanted = len(self.facts.parameters)
        if not wanted == len(self.parameters) == len(arguments):
            raise self._error(f"takes {wanted} arguments, got {len(arguments)}")
        declared = zip(self.parameters, self.facts.parameters, arguments, strict=True)
        for i, (parameter, ptx, argument) in enumerate(declared):
            # A null pointer fits a pointer of any type: an optional argument that
            # is missing.
            fits = argument[:2] == parameter[1:] or (
                parameter.pointer and argument.null
            )
            # Everything but a double is 8 bytes of integer or pointer, which PTX
            # calls u64.
            real = not argument.pointer and argument.dtype == "float64"
            if not fits or ptx != ("f64" if real else "u64"):
                raise self._error(
                    f"argument {i} is {_spelled(parameter)} {parameter.name} "
                    f"(.{ptx}), got {_spelled(argument)}"
                )
            if not argument.contiguous:
                raise self._error(f"argument {i}, {parameter.name}, is strided")

    def _check_limit(self, resource, wanted, limit):
        if wanted > limit:
            raise self._error(f"{resource}: wanted {wanted}, limit {limit}")

    def _error(self, message):
        return LaunchError(f"{self.name} on {self.card.name}: {message}")


def _spelled(x):
    """Return the type of a parameter or argument as C spells it."""
    return f"{x.dtype}*" if x.pointer else x.dtype
