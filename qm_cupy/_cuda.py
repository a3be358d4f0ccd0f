"""The keeper of the kernels: finds, splices, compiles, caches and launches them.

Importing this does nothing to the GPU; CuPy itself is imported by the first launch.
"""

import functools
import math
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._precision import TF32, kernel_dtype
from .settings import implementation as implementation
from .workspace import Workspace

_HERE = Path(__file__).resolve().parent
_FOLDERS = _HERE / "kernels", _HERE.parent / "kernels"  # a wheel's, a checkout's
_STORAGE = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\(")

WARP = 32  # threads that go in step
BLOCK = 256  # threads of a block, where a kernel does not say otherwise
COUNTS = 16  # arguments of `write_counts` in kernels/basic/counts.cu
_WRITE_COUNTS = "basic/counts", "write_counts", "float32"
# Of kernels/optimized/tiles.cuh: rows and columns of a tile, bytes of each row that are
# staged in a step, and the steps in shared memory of the widest tile.
TILE, STEP_BYTES, WIDE_STAGES = 128, 64, 4
THREAD_TOKENS = 4  # of a thread, in selection and in the saliency of layers
# Threads of a block, at most, in the kernels whose launch bounds these are; see
# `options`. Of linkages, by the bytes of a distance: as many as have the registers they
# need. A multiprocessor has one such block at a time, so that all of a launch can run.
SELECTION_THREADS = 1024
GROUP_THREADS = 1024
SORT_THREADS = 1024
LINKAGE_THREADS = {4: 512, 8: 384}
MAX_HEAD_DIM = 256  # of the transformer prior: a block keeps a head's sums
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}  # of linear maps
_SHARED_BYTES = 48 << 10  # of a block, static and dynamic, without asking


class KernelCompilationError(RuntimeError):
    """A kernel did not compile; holds the compiler's log and what may help."""


def launch(
    file: str,
    kernel: str,
    dtype: Any,
    threads: int,
    args: tuple[Any, ...],
    *,
    block: int = BLOCK,
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Run a kernel of ``kernels/<file>.cu`` on the current stream and device.

    `threads` is rounded up to whole blocks, all in x: the one axis that may have more
    than 65,535 of them. Nothing is launched for zero threads. `shared` is in bytes;
    blocks that wait for each other take a `cooperative` launch.
    """
    if threads == 0:
        return
    grid = -(-threads // block)
    run = raw_kernel(file, kernel, kernel_dtype(file, dtype), cooperative)
    if shared and run.shared_size_bytes + shared > _SHARED_BYTES:
        # The same for every launch, so that threads cannot take it from each other.
        run.max_dynamic_shared_size_bytes = _most_dynamic(run)
    # Every argument in the width of its parameter: a launch converts nothing itself.
    values = tuple([_WIDEN.get(type(x), _as_it_is)(x) for x in args])
    run((grid,), (block,), values, shared_mem=shared)


def dynamic_shared_bytes(file: str, kernel: str, dtype: Any) -> int:
    """Return the most shared memory that a launch of a kernel can add to its own."""
    return _most_dynamic(raw_kernel(file, kernel, kernel_dtype(file, dtype)))


def _most_dynamic(run: Any) -> int:
    most: int = device().shared_bytes - run.shared_size_bytes
    return most


def _as_it_is(x: Any) -> Any:
    if not isinstance(x, np.generic) and not x.flags.c_contiguous:
        raise ValueError(f"a kernel takes C-contiguous arrays, got strides {x.strides}")
    return x


_NULL = np.uint64(0)
_WIDEN: dict[type, Callable[[Any], Any]] = {
    int: np.int64,
    bool: np.int64,
    float: np.float64,
    type(None): lambda x: _NULL,
}


def accumulation(dtype: Any) -> np.dtype[Any]:
    """Return `acc_t`: float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def vectors(x: Any) -> int:
    """Return how many vectors of 16 bytes the rows of `x` take."""
    width: int = 16 // x.dtype.itemsize
    rows: int = math.prod(x.shape[:-1])
    return rows * -(-int(x.shape[-1]) // width)


def raw_kernel(file: str, kernel: str, dtype: str, cooperative: bool = False) -> Any:
    """Return the compiled kernel for the current device.

    The seam, with `empty`: tests/ptx puts its own in its place, which is
    called as this is, with ``(grid, block, args)``, and takes NumPy arrays. A launch
    with `shared` memory also reads its ``shared_size_bytes``, the static part.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    return _compile(file, kernel, dtype, cooperative, device)


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array for a kernel to fill; part of the seam."""
    import cupy

    return cupy.empty(shape, dtype=dtype)


def to_device(x: NDArray[Any]) -> Any:
    """Return a small array of the CPU's on the current device; part of the seam."""
    import cupy

    return cupy.asarray(x)


def to_host(x: Any) -> Any:
    """Return an array of the CPU's, which waits for the GPU; part of the seam."""
    return x if x is None or isinstance(x, np.ndarray | np.generic) else x.get()


class Device(NamedTuple):
    """What a launcher asks of the current device."""

    multiprocessors: int
    """How many there are: blocks of up to 1024 threads that can run at once."""
    shared_bytes: int
    """The most shared memory that a block can have, static and dynamic."""


def device() -> Device:
    """Return the current device; part of the seam."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


@functools.cache
def _device(number: int) -> Device:
    import cupy

    has = cupy.cuda.Device(number).attributes
    return Device(has["MultiProcessorCount"], has["MaxSharedMemoryPerBlockOptin"])


def free_memory() -> int:
    """Return how many bytes can be had on the current device; part of the seam."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    free = int(free) + int(cupy.get_default_memory_pool().free_bytes())
    lender = getattr(cupy.cuda.get_allocator(), "__self__", None)
    return lender.free_memory(free) if isinstance(lender, Workspace) else free


def memory_of(workspace: Workspace | None, tokens: Any) -> AbstractContextManager[None]:
    """Return a context that allocates from a workspace, if that is of use here."""
    if workspace is None or not is_cuda(tokens):
        return nullcontext()
    return workspace.lend()


def is_cuda(x: Any) -> bool:
    """Whether an array that has come through the door is CuPy's; part of the seam."""
    return hasattr(type(x), "__cuda_array_interface__")


def may_share_memory(x: Any, y: Any) -> bool:
    """Whether the bounds of two CuPy arrays overlap.

    CuPy's own function compares what owns the memory, and views that came in through
    DLPack have an owner each. Addresses do not depend on owners.
    """
    (low, high), (other_low, other_high) = _bounds(x), _bounds(y)
    return low < other_high and other_low < high


def _bounds(x: Any) -> tuple[int, int]:
    """Return the addresses of the first byte of a CuPy array and of the one after."""
    if x.size == 0:
        return 0, 0
    steps = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    below = sum(step for step in steps if step < 0)
    above = sum(step for step in steps if step > 0)
    return x.data.ptr + below, x.data.ptr + above + x.itemsize


def contiguous(x: Any, dtype: Any = None) -> Any:
    """Return `x` as a kernel takes it: C-contiguous, of `dtype`; None stays None."""
    return None if x is None else x.astype(dtype or x.dtype, order="C", copy=False)


def counts(num_groups: NDArray[np.int64]) -> tuple[Any, int]:
    """Return K of every sequence as a kernel takes it, null if all are equal, and K."""
    most = int(num_groups.max(initial=0))
    if (num_groups == most).all():
        return None, most
    if is_capturing():
        return _write_counts(num_groups), most
    raw_kernel(*_WRITE_COUNTS)  # loaded by now, should the next call be captured
    return to_device(num_groups.astype(np.int32)), most


def is_capturing() -> bool:
    """Whether the current stream captures a CUDA graph."""
    cupy = sys.modules.get("cupy")  # nothing else here makes CuPy's arrays
    return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())


def _write_counts(num_groups: NDArray[np.int64]) -> Any:
    """Return counts (B,) int32 as arguments of launches, which a graph can hold.

    CuPy copies from the CPU through memory that it uses again: a graph that is replayed
    later would read something else there.
    """
    out = empty(num_groups.shape, np.int32)
    values = num_groups.ravel().tolist()
    for first in range(0, len(values), COUNTS):
        some = values[first : first + COUNTS]
        some += [0] * (COUNTS - len(some))
        launch(*_WRITE_COUNTS, 1, (first, out.size, *some, out))
    return out


@functools.cache
def _compile(file: str, kernel: str, dtype: str, cooperative: bool, device: int) -> Any:
    import cupy

    try:
        return _module(file, dtype, cooperative).get_function(kernel)
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompilationError(
            f"kernel `{kernel}` of {file}.cu did not compile for {dtype} on device "
            f"{device}:\n{error}\n{_hint(str(error))}"
        ) from error


@functools.cache
def _module(file: str, dtype: str, cooperative: bool) -> Any:
    import cupy

    return cupy.RawModule(
        code=source(file),
        options=options(dtype),
        enable_cooperative_groups=cooperative,  # a way to launch, not to compile
    )


def _hint(log: str) -> str:
    if "cuda_fp16.h" in log or "cannot open source file" in log:
        return (
            "Hint: the CUDA headers are missing; install CuPy with them, for example "
            "`pip install 'qm_cupy[cuda13]'`."
        )
    return (
        "Hint: sm_75 (Turing) is the oldest GPU these kernels are for; if yours is "
        "newer, please report this log."
    )


def source(file: str) -> str:
    """Return ``common.cuh``, the ``.cuh`` beside the kernel file, and the file itself.

    One text, because CuPy's disk cache would not notice a change in an included file;
    errors name the true files all the same.
    """
    folder = _folder()
    beside = sorted((folder / file).parent.glob("*.cuh"))
    return "".join(
        f'#line 1 "{path.relative_to(folder)}"\n{path.read_text(encoding="utf-8")}'
        for path in (folder / "common.cuh", *beside, folder / f"{file}.cu")
    )


def options(dtype: str) -> tuple[str, ...]:
    """Return the compiler's options: the language, the types, and sizes of blocks."""
    storage = _STORAGE["float32" if dtype == TF32 else dtype]
    compute = "double" if dtype == "float64" else "float"
    types = f"-Dreal_t={storage}", f"-Dacc_t={compute}"
    sizes = {
        "TILE": TILE,
        "STEP_BYTES": STEP_BYTES,
        "WIDE_STAGES": WIDE_STAGES,
        "THREAD_TOKENS": THREAD_TOKENS,
        "BLOCK_THREADS": BLOCK,
        "SELECTION_THREADS": SELECTION_THREADS,
        "GROUP_THREADS": GROUP_THREADS,
        "SORT_THREADS": SORT_THREADS,
        "LINKAGE_THREADS": LINKAGE_THREADS[8 if dtype == "float64" else 4],
        "MAX_HEAD_DIM": MAX_HEAD_DIM,
        "RELU": ACTIVATIONS["relu"],
        "GELU": ACTIVATIONS["gelu"],
    }
    defined = (f"-D{name}={size}" for name, size in sizes.items())
    return "--std=c++17", *types, f"-DTF32={int(dtype == TF32)}", *defined


def kernel_files() -> list[str]:
    """Return all kernel files, as ``basic/merge_tokens`` and so on."""
    return [
        f"{path.parent.name}/{path.stem}" for path in sorted(_folder().glob("*/*.cu"))
    ]


def kernel_names(file: str) -> list[str]:
    """Return the names of the kernels in a file, in its order."""
    return _KERNEL.findall(text(file))


def text(file: str) -> str:
    """Return a kernel file as it is."""
    return (_folder() / f"{file}.cu").read_text(encoding="utf-8")


@functools.cache
def _folder() -> Path:
    for folder in _FOLDERS:
        if (folder / "common.cuh").is_file():
            return folder
    places = " and ".join(str(folder) for folder in _FOLDERS)
    raise FileNotFoundError(f"no kernels: looked for common.cuh in {places}")


def warmup(dtype: Any = np.float32) -> None:
    """Compile every kernel for `dtype` on the current device, ahead of its first use.

    Parameters
    ----------
    dtype : dtype, default float32
        float16, bfloat16, float32 or float64, as the tokens will be.

    Raises
    ------
    TypeError
        If no kernel is of that dtype.
    KernelCompilationError
        If a kernel does not compile.
    """
    name = np.dtype(dtype).name
    if name not in _STORAGE:
        raise TypeError(f"`dtype` must be one of {', '.join(_STORAGE)}, got {name}")
    for file in kernel_files():
        kinds = {kernel_dtype(file, x) for x in (dtype, accumulation(np.dtype(dtype)))}
        for kind in kinds:
            compile_file(file, kind)


def compile_file(file: str, dtype: str) -> None:
    """Compile every kernel of a file, for each way in which it is launched."""
    for kernel in kernel_names(file):
        raw_kernel(file, kernel, dtype)
        if "blocks_barrier(" in text(file):
            raw_kernel(file, kernel, dtype, True)
