"""Run compiled kernels on the CPU: an interpreter of the PTX that NVRTC compiles.

``raw_kernel`` and ``empty`` replace the functions of the same names in the `seam`;
`install` does that. A kernel is then called like a ``cupy.RawKernel``, on NumPy arrays.
The interpreter (the C++ files in this folder) checks every access to memory and stops
at the first fault. This file checks launches and the types of arguments; CUDA does not
check these types.
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

_UNASKED = 48 << 10  # bytes of shared memory that a launch has without a request
_MESSAGE = 4096  # bytes of an error message, at most
# NumPy's names of the parameter types in kernel sources.
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
# The layout of `struct Range` in global_memory.h.
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
    """A fault: a GPU would refuse the launch, hang, or silently go wrong."""


class Module:
    """The kernels of one source, compiled for one architecture."""

    def __init__(self, source, dtype, arch=90):
        self.source, self.dtype = source, dtype
        # compute_90 asks NVRTC for PTX; sm_90 would also ask for machine code.
        options = (*cuda.options(dtype), f"-arch=compute_{arch}")
        text = nvrtc.ptx(source, options).encode()
        message = ctypes.create_string_buffer(_MESSAGE)
        self.address = library().ptx_module(text, len(text), message, _MESSAGE)
        if not self.address:
            raise LaunchError(message.value.decode())

        self._kernels = {}

    def kernel(self, name):
        """Return a kernel by its name. It is decoded once."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]


class Kernel:
    """One kernel, which is called like a ``cupy.RawKernel``."""

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
        self._locations = [self._location(n) for n in range(count)]
        # Guards `_parameters`, which reads the source with a regular expression.
        if [size for _, size in self._locations] != [x.size for x in self._parameters]:
            raise LaunchError(
                f"{name}: the parameters in PTX do not fit the source, which declares "
                f"{self._parameters}"
            )

    def _location(self, n):
        """Return the offset of a parameter in the block of arguments, and its bytes."""
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
                f"{self.name}: dynamic shared memory must be at most {dynamic_limit} "
                f"bytes, got {shared_mem}"
            )
        if len(args) != len(self._parameters):
            raise LaunchError(
                f"{self.name} takes {len(self._parameters)} arguments, got {len(args)}"
            )
        # All arguments in one block of bytes, at the offsets that PTX gives them.
        last, size = self._locations[-1] if args else (0, 0)
        block_of_arguments, ranges = bytearray(last + size), []
        for n, (parameter, (at, size)) in enumerate(
            zip(self._parameters, self._locations, strict=True)
        ):
            value = self._value(n, parameter, args[n])
            block_of_arguments[at : at + size] = value
            # The kernel may access only the arrays that it gets.
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
        """Return the number of blocks and the threads of one block, all in x."""
        sizes = *tuple(grid), *tuple(block)
        # CUDA's limits: 2^31 - 1 blocks in x, 1024 threads of a block.
        if min(sizes) < 1 or grid[0] >= 2**31 or math.prod(block) > 1024:
            raise LaunchError(
                f"{self.name}: the grid {grid} or the block {block} is out of range"
            )
        if math.prod(sizes) != grid[0] * block[0]:
            raise LaunchError(
                f"{self.name}: grid and block must have size 1 in y and z, got grid "
                f"{grid} and block {block}"
            )
        if block[0] > self.max_threads:
            raise LaunchError(
                f"{self.name}: a block has {block[0]} threads, but its launch bound is "
                f"{self.max_threads}"
            )
        return grid[0], block[0]

    def _value(self, n, parameter, x):
        """Return the bytes of an argument: an address, or a number."""
        if isinstance(x, np.ndarray) and parameter.name == f"{x.dtype.name}*":
            if not x.flags.c_contiguous:
                raise LaunchError(f"{self.name}: argument {n} must be C-contiguous")
            return x.ctypes.data.to_bytes(8, "little")
        if isinstance(x, np.generic):
            # A pointer parameter also takes np.uint64(0), the null pointer.
            null = parameter.name.endswith("*") and x.dtype == np.uint64 and x == 0
            if null or parameter.name == x.dtype.name:
                return x.tobytes()
        value = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else repr(x)
        raise LaunchError(
            f"{self.name}: argument {n} must be {parameter.name}, got {value}"
        )


class _Parameter:
    """A declared parameter: its type as in ``float32*``, and if it points to const."""

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
    # `real_t` and `acc_t` in the sources; TF32 kernels store float32.
    storage = "float32" if dtype == cuda.TF32 else dtype
    compute = "float64" if dtype == "float64" else "float32"
    types = {**_TYPES, "real_t": storage, "acc_t": compute}
    declared = re.search(rf"__global__[^{{;]*?\b{kernel}\(([^)]*)\)", source)
    return [
        _Parameter(text.strip(), types)
        for text in " ".join(declared[1].split()).split(",")
        if text.strip()
    ]


# The arrays of `empty`: id of an array -> (a weak reference to it, a mark for each byte
# that a kernel has written).
_allocations = {}


def empty(shape, dtype):
    """Return fresh memory; a kernel that reads it before it writes it is a fault.

    Its bytes are 0xFF, which is NaN in every floating type, so an element that no
    kernel writes shows in the result.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.full(size + 512, 0xFF, dtype=np.uint8)  # a gap of 256 bytes follows it
    start = -raw.ctypes.data % 256  # CUDA aligns memory to 256 bytes
    key = id(raw)
    written = np.zeros(len(raw), np.uint8)
    # The weak reference removes the entry together with the array. It also tells
    # whether an id belongs to this array or to a later one at the same address.
    _allocations[key] = weakref.ref(raw, lambda _: _allocations.pop(key)), written
    return raw[start : start + size].view(dtype).reshape(shape)


def _range(x, constant):
    """Return an array's memory as `_RANGE` describes it."""
    low, root = x.ctypes.data, x
    while isinstance(root.base, np.ndarray):  # a view belongs to its first owner
        root = root.base
    reference, written = _allocations.get(id(root), (lambda: None, None))
    shadow = 0  # null: the caller wrote all bytes
    if reference() is root:
        shadow = written.ctypes.data + low - root.ctypes.data
    fixed = constant or not x.flags.writeable  # writes by the kernel are faults
    return low, low + x.nbytes, shadow, fixed, x.itemsize, 0


class Handle:
    """A kernel with CuPy's attributes, one of which requests shared memory."""

    def __init__(self, kernel, cooperative):
        self._kernel, self._cooperative = kernel, cooperative
        self.shared_size_bytes = kernel.shared_size_bytes
        self.max_dynamic_shared_size_bytes = _UNASKED - kernel.shared_size_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        limit = self.max_dynamic_shared_size_bytes
        shared = limit + self.shared_size_bytes
        if shared > _UNASKED and shared > cuda.current_device().shared_bytes:
            raise LaunchError(
                f"{self._kernel.name}: a block requests {limit} bytes of shared "
                f"memory, more than the device has for it"
            )
        # Blocks that wait for each other must all run at once: here one block for each
        # multiprocessor.
        if self._cooperative and grid[0] > cuda.current_device().multiprocessors:
            raise LaunchError(
                f"{self._kernel.name}: {grid[0]} blocks wait for each other, more than "
                f"the device has multiprocessors"
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
    """Return the kernels of a source. It is compiled once."""
    return Module(source, dtype, arch)


@functools.cache
def _source(file):
    return cuda.source(file)


def raw_kernel(file, kernel, dtype, cooperative=False, *, arch=90):
    """Return a kernel of ``kernels/<file>.cu``."""
    return Handle(module(_source(file), dtype, arch).kernel(kernel), cooperative)


def install(monkeypatch, arch=90):
    """Run the public functions' kernels on NumPy arrays until the test ends.

    Only the `seam` changes: the kernels, fresh arrays, the device, and the rule that
    NumPy arrays count as CUDA arrays. As on a GPU, the library then does not check the
    values of arrays.
    """
    monkeypatch.setattr(cuda, "raw_kernel", functools.partial(raw_kernel, arch=arch))
    monkeypatch.setattr(cuda, "empty", empty)
    monkeypatch.setattr(cuda, "to_device", np.asarray)
    # A small device: 3 multiprocessors, and 48 KB of shared memory for a block.
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(3, 48 << 10))
    monkeypatch.setattr(cuda, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(cuda, "is_cuda", lambda x: True)
