"""Runs the very same CUDA kernels on the CPU: g++ and a header that stands for CUDA.

``raw_kernel`` and ``empty`` are the twins of those in ``qm_cupy._cuda``, and `install`
puts them there: a kernel is called as a ``cupy.RawKernel`` is, on NumPy arrays, and
every argument is held against its parameter, type for type, which a real launch does
not do.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from qm_cupy import _cuda

_HERE = Path(__file__).resolve().parent
_CACHE = Path(
    os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "qm_cupy-emulator"
)
_COMPILER = os.environ.get("CXX", "g++")
_FLAGS = (
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra",
    "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable",
    "-Wno-unused-parameter",
    "-include", "emulator.h", f"-I{_HERE}",
)  # fmt: skip
SANITIZERS = {
    "": (),
    "thread": ("-fsanitize=thread", "-g"),
    "address": (
        "-fsanitize=address,undefined",
        "-fsanitize-sections=qm_shared",
        "-fno-sanitize-recover=all",
        "-g",
    ),
}
_RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}


class EmulationError(RuntimeError):
    """What a real GPU would do silently: a wrong argument, a barrier not all reach."""


class Kernel:
    """One kernel of a compiled library, called as a ``cupy.RawKernel`` is."""

    def __init__(self, library, name):
        self.library = library
        self._name = name
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        signature = getattr(library, f"signature_{name}")
        signature.restype = ctypes.c_char_p
        self._parameters = signature().decode().split()

    def __call__(self, grid, block, args, *, shared_mem=0, cooperative=False):
        if len(args) != len(self._parameters):
            raise EmulationError(
                f"{self._name} takes {len(self._parameters)} arguments, got {len(args)}"
            )
        values = [
            self._value(i, parameter, x)
            for i, (parameter, x) in enumerate(zip(self._parameters, args, strict=True))
        ]
        addresses = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        error = self._launch(
            _dim3(grid),
            _dim3(block),
            ctypes.c_size_t(shared_mem),
            ctypes.c_bool(cooperative),
            addresses,
        )
        if error is not None:
            raise EmulationError(f"{self._name}: {error.decode()}")

    def _value(self, i, parameter, x):
        """Return the bytes of an argument as an array of one."""
        if isinstance(x, np.ndarray) and parameter == f"{x.dtype.name}*":
            return np.array([x.ctypes.data], dtype=np.uint64)
        if isinstance(x, np.generic):
            null = parameter.endswith("*") and x.dtype == np.uint64 and x == 0
            if null or parameter == x.dtype.name:
                return np.array([x])
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else repr(x)
        raise EmulationError(f"{self._name}: argument {i} is {parameter}, got {kind}")


def install(monkeypatch, arch=900):
    """Run the public functions' kernels on NumPy arrays until the test ends.

    `_cuda` holds the whole seam: kernels, fresh arrays, and what counts as CUDA's. The
    checks then leave the values of arrays alone, as they do on a GPU.
    """
    monkeypatch.setattr(_cuda, "raw_kernel", functools.partial(raw_kernel, arch=arch))
    monkeypatch.setattr(_cuda, "empty", empty)
    monkeypatch.setattr(_cuda, "to_device", np.asarray)
    monkeypatch.setattr(_cuda, "device", lambda: _cuda.Device(3, 48 << 10))
    monkeypatch.setattr(_cuda, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(_cuda, "is_cuda", lambda x: True)


def _dim3(size):
    size = tuple(size) + (1,) * (3 - len(size))
    if min(size) < 1 or max(size[1:]) > 65_535 or size[0] >= 2**31:
        raise EmulationError(f"no grid or block has the size {size}")
    return (ctypes.c_uint * 3)(*size)


def raw_kernel(file, kernel, dtype, cooperative=False, *, arch=900, sanitizer=None):
    """Return a kernel of ``kernels/<file>.cu``; `arch` is its ``__CUDA_ARCH__``."""
    found = _kernel(_cuda.source(file), kernel, dtype, arch, sanitizer)
    run = functools.partial(found, cooperative=cooperative)
    run.shared_size_bytes = 0  # static shared memory, which has no limit here
    return run


@functools.cache
def _kernel(source, kernel, dtype, arch, sanitizer):
    return Kernel(compile_source(source, dtype, arch=arch, sanitizer=sanitizer), kernel)


@functools.cache
def compile_source(source, dtype, *, arch=900, sanitizer=None):
    """Compile a spliced text and load it; libraries are kept by the hash of it all."""
    if sanitizer is None:
        sanitizer = os.environ.get("QM_CUPY_SANITIZER", "")
    names = _cuda._KERNEL.findall(source)
    text = source + "".join(f"\nEMULATE({name})" for name in names) + "\n"
    macros = [x for x in _cuda.options(dtype) if x.startswith("-D")]
    flags = [*_FLAGS, *SANITIZERS[sanitizer], *macros, f"-D__CUDA_ARCH__={arch}"]
    headers = [path.read_text() for path in sorted(_HERE.glob("*.h"))]
    key = hashlib.sha256("\0".join([_COMPILER, text, *flags, *headers]).encode())
    library = _CACHE / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            built = Path(folder) / library.name
            command = [_COMPILER, *flags, "-", "-o", str(built)]
            done = subprocess.run(command, input=text, text=True, capture_output=True)
            if done.returncode:
                raise EmulationError(f"{' '.join(command)}\n{done.stderr}")
            built.replace(library)  # at once, for tests that run side by side
    return ctypes.CDLL(str(library))


def empty(shape, dtype):
    """Return bytes that are NaN in every floating type: a gap in a result shows."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.full(size, 0xFF, dtype=np.uint8).view(dtype).reshape(shape)


def sanitized(sanitizer, *command):
    """Return `command` with a sanitizer's runtime in front of it, as it must be."""
    find = [_COMPILER, f"-print-file-name={_RUNTIMES[sanitizer]}"]
    runtime = subprocess.run(find, capture_output=True, text=True, check=True).stdout
    # GCC 12's ThreadSanitizer cannot bear addresses that are very random.
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    return [
        *still,
        "env",
        f"LD_PRELOAD={runtime.strip()}",
        f"QM_CUPY_SANITIZER={sanitizer}",
        "OPENBLAS_NUM_THREADS=1",  # whose barriers ThreadSanitizer does not see
        "ASAN_OPTIONS=detect_leaks=0",
        "TSAN_OPTIONS=halt_on_error=1 report_signal_unsafe=0",
        *command,
    ]
