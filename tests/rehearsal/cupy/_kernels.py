"""Kernels: those of the library are interpreted, those that only take time are not."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupy import _card, _runtime, _streams
from cupy._array import ndarray
from cupy.cuda import compiler

Execute = Callable[..., None]

_CLOCK = 2e9  # cycles per second


def _nothing(*args: Any) -> None:
    """Stand for a kernel that warms the card up or lets the CPU run ahead."""


def _wait(cycles: Any) -> None:
    _streams.sleep(int(cycles) / _CLOCK)


# Kernels of the benchmarks and tests whose results are not read.
_FOREIGN = {"spin": _nothing, "exponentials": _nothing, "wait": _wait}


def executor(source: str, options: tuple[str, ...], name: str) -> Execute:
    """Return a function that runs a kernel on NumPy arrays, with tests/ptx.

    Its arguments are ``(grid, block, values, shared_mem, cooperative)``.
    """
    # Errors become those of CuPy and of the CUDA driver.
    ptx = _card.of_tests("ptx")
    dtype = _dtype_of(options)
    # NVRTC compiles here, as CuPy compiles when a kernel is first requested.
    try:
        module = ptx.module(source, dtype, int(_card.CAPABILITY))
    except RuntimeError as error:
        raise compiler.CompileException(str(error), source, name, options) from error
    try:
        kernel = module.kernel(name)
    except ptx.LaunchError as error:
        raise RuntimeError(
            "CUDA_ERROR_NOT_FOUND: named symbol not found: " + name
        ) from error

    def execute(
        grid: Any, block: Any, values: Any, shared_mem: int, cooperative: bool
    ) -> None:
        try:
            kernel(
                grid,
                block,
                values,
                shared_mem=shared_mem,
                cooperative=cooperative,
                dynamic_limit=shared_mem,  # the card has checked it already
            )
        except ptx.LaunchError as error:  # 719: cudaErrorLaunchFailure
            raise _runtime.CUDARuntimeError(719, str(error)) from error

    return execute


class _Kernel:
    """A kernel that can be launched."""

    def __init__(
        self,
        source: str,
        options: tuple[str, ...],
        name: str,
        cooperative: bool,
        execute: Execute | None,
    ) -> None:
        self.name, self.options, self.code = name, options, source
        self.enable_cooperative_groups = cooperative
        self._execute = execute
        # Launches of foreign kernels are not checked: the library does not make them.
        self._check = _card.Accepting()
        if execute is not None:
            dtype = _dtype_of(options)
            self._check = _card.checker(source, options, dtype, name, cooperative)

    @property
    def shared_size_bytes(self) -> int:
        return self._check.shared_size_bytes

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._check.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self._check.max_dynamic_shared_size_bytes = size

    def __call__(
        self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0
    ) -> None:
        _runtime.check()
        # Only CuPy's arrays and NumPy's scalars. A Python number has no width.
        for x in args:
            if not isinstance(x, ndarray | np.generic):
                raise TypeError(f"Unsupported type {type(x)}")
        self._check(grid, block, args, shared_mem=shared_mem)
        if self._execute is None:  # a foreign kernel
            _FOREIGN[self.name](*args)
            return
        values = tuple([x._numpy if isinstance(x, ndarray) else x for x in args])
        work = (self._run, grid, block, values, shared_mem)
        _streams.submit(functools.partial(*work))

    def _run(self, grid: Any, block: Any, values: Any, shared_mem: int) -> None:
        # The faults that an environment variable plants in this kernel.
        if _runtime.planted("ILLEGAL", self.name):
            _runtime.break_()
            return
        if _runtime.planted("HANG", self.name):
            _runtime.hang()
        self._execute(grid, block, values, shared_mem, self.enable_cooperative_groups)
        if _runtime.planted("WRONG", self.name):
            # The last array is an output.
            _spoil([x for x in values if isinstance(x, np.ndarray)][-1])


class RawModule:
    """Kernels of one of the library's sources."""

    def __init__(
        self,
        code: str | None = None,
        *,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        enable_cooperative_groups: bool = False,
    ) -> None:
        if code is None or code not in _own_sources():
            raise NotImplementedError(
                "the stand-in's cupy.RawModule compiles the library's sources alone"
            )
        self.code, self.options, self.backend = code, options, backend
        self.enable_cooperative_groups = enable_cooperative_groups

    def get_function(self, name: str) -> _Kernel:
        execute = executor(self.code, self.options, name)
        cooperative = self.enable_cooperative_groups
        return _Kernel(self.code, self.options, name, cooperative, execute)


class RawKernel(_Kernel):
    """A single kernel: one of the library, or one that only takes time."""

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        *,
        enable_cooperative_groups: bool = False,
    ) -> None:
        cooperative, execute = enable_cooperative_groups, None
        if code in _own_sources():
            execute = executor(code, options, name)
        elif name not in _FOREIGN:
            raise NotImplementedError(f"the stand-in cannot run the kernel {name!r}")
        super().__init__(code, options, name, cooperative, execute)


def _spoil(x: np.ndarray) -> None:
    """Change one element."""
    if x.size:
        last = np.unravel_index(x.size - 1, x.shape)  # seldom padding
        old = x[last]
        # Adding 1 may not change a large or infinite number, so that becomes 0.
        near = np.isfinite(old.astype(np.float64)) and abs(float(old)) < 100
        x[last] = not old if x.dtype == np.bool_ else old + 1 if near else 0


@functools.cache
def _own_sources() -> frozenset[str]:
    from seam import cuda

    return frozenset(cuda.source(file) for file in cuda.kernel_files())


def _dtype_of(options: tuple[str, ...]) -> str:
    """Return the dtype for which the library has these options."""
    from seam import cuda

    for dtype in (*cuda._STORAGE, cuda.TF32):
        if tuple(cuda.options(dtype)) == tuple(options):
            return dtype
    raise NotImplementedError(f"the stand-in knows no dtype of the options {options}")


RawModule.__module__ = RawKernel.__module__ = "cupy"
