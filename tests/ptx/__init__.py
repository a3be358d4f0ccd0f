"""Runs compiled kernels on the CPU: an interpreter of the PTX that NVRTC makes of them.

``raw_kernel`` and ``empty`` are the twins of those in the `seam`, and `install`
puts them there: a kernel is called as a ``cupy.RawKernel`` is, on NumPy arrays. The
interpreter (the C++ files beside this one) checks every access to memory and stops at
the first fault; here launches and arguments are checked, as no GPU does.
"""

import ctypes
import functools
import math
import re
import weakref

import numpy as np
import nvrtc
from seam import cuda

from .build import library

_UNASKED = 48 << 10  # bytes of shared memory without asking for more
_MESSAGE = 4096  # bytes, at most
_TYPES = {
    "long long": "int64",
    "unsigned long long": "uint64",
    "int": "int32",
    "unsigned": "uint32",
    "float": "float32",
    "double": "float64",
    "bool": "bool",
    "unsigned char": "uint8",
}
_RANGE = np.dtype(
    [
        ("low", "u8"),
        ("high", "u8"),
        ("written", "u8"),
        ("constant", "u4"),
        ("grain", "u4"),
        ("cells", "u8"),
    ]
)


class LaunchError(RuntimeError):
    """What a real GPU would do silently, or refuse, or never return from."""


class Module:
    """The kernels of one source, compiled for one architecture."""

    def __init__(self, source, dtype, arch=90):
        self.source, self.dtype = source, dtype
        options = (*cuda.options(dtype), f"-arch=compute_{arch}")
        text = nvrtc.ptx(source, options).encode()
        message = ctypes.create_string_buffer(_MESSAGE)
        self.address = library().ptx_module(text, len(text), message, _MESSAGE)
        if not self.address:
            raise LaunchError(message.value.decode())

        self._kernels = {}

    def kernel(self, name):
        """Return a kernel by its name, decoded once."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]


class Kernel:
    """One kernel, called as a ``cupy.RawKernel`` is."""

    def __init__(self, module, name):
        self.name = name
        message = ctypes.create_string_buffer(_MESSAGE)
        self._program = library().ptx_kernel(
            module.address, name.encode(), message, _MESSAGE
        )
        if not self._program:
            raise LaunchError(f"{name}: {message.value.decode()}")
        numbers = [ctypes.c_uint32() for _ in range(3)]
        library().ptx_facts(self._program, *numbers)
        self.shared_size_bytes, self.max_threads, count = (x.value for x in numbers)
        self._parameters = _parameters(module.source, name, module.dtype)
        self._places = [self._place(n) for n in range(count)]
        if [size for _, size in self._places] != [x.size for x in self._parameters]:
            raise LaunchError(f"{name}: the source declares {self._parameters}")

    def _place(self, n):
        """Return where a parameter lies among the arguments, and its bytes."""
        at, size = ctypes.c_uint32(), ctypes.c_uint32()
        library().ptx_parameter(self._program, n, at, size)
        return at.value, size.value

    def __call__(
        self,
        grid,
        block,
        args,
        *,
        shared_mem=0,
        cooperative=False,
        dynamic_limit=None,
    ):
        grid, block = self._launch_size(grid, block)
        if dynamic_limit is None:
            dynamic_limit = _UNASKED - self.shared_size_bytes
        if shared_mem > max(dynamic_limit, 0):
            raise LaunchError(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory, at most "
                f"{dynamic_limit}"
            )
        if len(args) != len(self._parameters):
            raise LaunchError(
                f"{self.name} takes {len(self._parameters)} arguments, got {len(args)}"
            )
        last, size = self._places[-1] if args else (0, 0)
        block_of_arguments, ranges = bytearray(last + size), []
        for n, (parameter, (at, size)) in enumerate(
            zip(self._parameters, self._places, strict=True)
        ):
            value = self._value(n, parameter, args[n])
            block_of_arguments[at : at + size] = value
            if isinstance(args[n], np.ndarray) and args[n].size:
                ranges.append(_range(args[n], parameter.constant))
        ranges = np.array(ranges, _RANGE)
        message = ctypes.create_string_buffer(_MESSAGE)
        failed = library().ptx_launch(
            self._program,
            grid,
            block,
            shared_mem,
            cooperative,
            bytes(block_of_arguments),
            ranges.ctypes.data,
            len(ranges),
            message,
            _MESSAGE,
        )
        if failed:
            raise LaunchError(message.value.decode(errors="replace"))

    def _launch_size(self, grid, block):
        """Return blocks and threads of each, all in x."""
        sizes = *tuple(grid), *tuple(block)
        if min(sizes) < 1 or grid[0] >= 2**31 or math.prod(block) > 1024:
            raise LaunchError(f"{self.name}: no grid {grid} or block {block}")
        if math.prod(sizes) != grid[0] * block[0]:
            raise LaunchError(
                f"{self.name}: only x is interpreted, got {grid}, {block}"
            )
        if block[0] > self.max_threads:
            raise LaunchError(
                f"{self.name}: {block[0]} threads, its launch bound is "
                f"{self.max_threads}"
            )
        return grid[0], block[0]

    def _value(self, n, parameter, x):
        """Return the bytes of an argument."""
        if isinstance(x, np.ndarray) and parameter.name == f"{x.dtype.name}*":
            if not x.flags.c_contiguous:
                raise LaunchError(f"{self.name}: argument {n} is not contiguous")
            return x.ctypes.data.to_bytes(8, "little")
        if isinstance(x, np.generic):
            null = parameter.name.endswith("*") and x.dtype == np.uint64 and x == 0
            if null or parameter.name == x.dtype.name:
                return x.tobytes()
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else repr(x)
        raise LaunchError(f"{self.name}: argument {n} is {parameter.name}, got {kind}")


class _Parameter:
    """What a source declares: ``float32*``, and whether it is a pointer to const."""

    def __init__(self, text, types):
        constant, ctype, star = re.fullmatch(
            r"(const )?([\w ]+?) ?(\*?) ?(?:__restrict__ )?\w+", text
        ).groups()
        self.name = types[ctype] + star
        self.constant = bool(constant and star)
        self.size = 8 if star else np.dtype(types[ctype]).itemsize

    def __repr__(self):
        return self.name


def _parameters(source, kernel, dtype):
    """Return the parameters of a kernel as its source declares them."""
    storage = "float32" if dtype == cuda.TF32 else dtype
    compute = "float64" if dtype == "float64" else "float32"
    types = {**_TYPES, "real_t": storage, "acc_t": compute}
    declared = re.search(rf"__global__[^{{;]*?\b{kernel}\(([^)]*)\)", source)
    return [
        _Parameter(text.strip(), types)
        for text in " ".join(declared[1].split()).split(",")
        if text.strip()
    ]


_allocations = {}  # id of an array -> a weak reference to it, its bytes ever written


def empty(shape, dtype):
    """Return fresh memory, of which nothing may be read before it is written.

    Its bytes are 0xFF, which is NaN in every floating type: a gap in a result shows.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.full(size + 512, 0xFF, dtype=np.uint8)  # with a gap behind it
    start = -raw.ctypes.data % 256  # as CUDA aligns
    key = id(raw)
    written = np.zeros(len(raw), np.uint8)
    _allocations[key] = weakref.ref(raw, lambda _: _allocations.pop(key)), written
    return raw[start : start + size].view(dtype).reshape(shape)


def _range(x, constant):
    """Return what a launch must know of an array's memory."""
    low, root = x.ctypes.data, x
    while isinstance(root.base, np.ndarray):
        root = root.base
    reference, written = _allocations.get(id(root), (lambda: None, None))
    shadow = 0
    if reference() is root:
        shadow = written.ctypes.data + low - root.ctypes.data
    fixed = constant or not x.flags.writeable
    return low, low + x.nbytes, shadow, fixed, x.itemsize, 0


class Handle:
    """A kernel as CuPy gives it, with the attribute that asks for shared memory."""

    def __init__(self, kernel, cooperative):
        self._kernel, self._cooperative = kernel, cooperative
        self.shared_size_bytes = kernel.shared_size_bytes
        self.max_dynamic_shared_size_bytes = _UNASKED - kernel.shared_size_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        limit = self.max_dynamic_shared_size_bytes
        shared = limit + self.shared_size_bytes
        if shared > _UNASKED and shared > cuda.current_device().shared_bytes:
            raise LaunchError(
                f"{self._kernel.name}: asks for {limit} bytes of shared memory"
            )
        if self._cooperative and grid[0] > cuda.current_device().multiprocessors:
            raise LaunchError(
                f"{self._kernel.name}: {grid[0]} blocks that wait for others"
            )
        self._kernel(
            grid,
            block,
            args,
            shared_mem=shared_mem,
            cooperative=self._cooperative,
            dynamic_limit=limit,
        )


@functools.cache
def module(source, dtype, arch=90):
    """Return the kernels of a source, compiled once."""
    return Module(source, dtype, arch)


@functools.cache
def _source(file):
    return cuda.source(file)


def raw_kernel(file, kernel, dtype, cooperative=False, *, arch=90):
    """Return a kernel of ``kernels/<file>.cu``."""
    return Handle(module(_source(file), dtype, arch).kernel(kernel), cooperative)


def install(monkeypatch, arch=90):
    """Run the public functions' kernels on NumPy arrays until the test ends.

    The `seam` is all of it: kernels, fresh arrays, and what counts as CUDA's. The
    checks then leave the values of arrays alone, as they do on a GPU.
    """
    monkeypatch.setattr(cuda, "raw_kernel", functools.partial(raw_kernel, arch=arch))
    monkeypatch.setattr(cuda, "empty", empty)
    monkeypatch.setattr(cuda, "to_device", np.asarray)
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(3, 48 << 10))
    monkeypatch.setattr(cuda, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(cuda, "is_cuda", lambda x: True)
