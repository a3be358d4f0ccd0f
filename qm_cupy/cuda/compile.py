"""Compilation: find the kernels, join them with their headers, compile and cache them.

In this module, `file` is the folder and the name of a kernel file without ``.cu``, such
as "basic/merge_tokens". An import of this module does not use the GPU: the first launch
imports CuPy.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from ..install_advice import cupy_command
from ..settings import tf32_allowed
from .constants import definitions

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (
    _PACKAGE / "kernels",
    _PACKAGE.parent / "kernels",
)  # in a wheel, in a checkout
_STORAGE = {  # the C++ type `real_t` in which arrays are stored
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
# The name of a kernel: the identifier after `__global__ void` and its launch bounds.
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\(")
# Kernels can be compiled for this dtype, but arrays cannot have it: tensor cores
# multiply float32 arrays as TF32.
TF32 = "tf32"


class KernelCompilationError(RuntimeError):
    """A kernel did not compile. The message has the compiler's log and a hint."""


def warmup(dtype: Any = np.float32) -> None:
    """Compile every kernel for `dtype` on the current device, before its first use.

    Parameters
    ----------
    dtype : dtype, default float32
        The dtype of the tokens: float16, bfloat16, float32 or float64.

    Raises
    ------
    TypeError
        If there are no kernels for that dtype.
    KernelCompilationError
        If a kernel does not compile.
    """
    name = np.dtype(dtype).name
    if name not in _STORAGE:
        raise TypeError(f"`dtype` must be one of {', '.join(_STORAGE)}, got {name}")
    for file in kernel_files():
        # Stages whose arrays are not tokens, such as saliency, use the dtype of sums.
        # Kernels without floats, such as those of labels, are launched as float32.
        used = dtype, accumulation_dtype(np.dtype(dtype)), np.float32
        for kernel_type in {kernel_dtype(file, x) for x in used}:
            compile_file(file, kernel_type)


def compile_file(file: str, dtype: str) -> None:
    """Compile every kernel of a file, also for cooperative launches if it has them."""
    for kernel in kernel_names(file):
        raw_kernel(file, kernel, dtype)
        # Some kernels have a barrier at which the blocks of a grid wait for each other.
        if "blocks_barrier(" in text(file):
            raw_kernel(file, kernel, dtype, True)


def raw_kernel(file: str, kernel: str, dtype: str, cooperative: bool = False) -> Any:
    """Return the compiled kernel for the current device.

    Tests replace this function and `empty`, to run kernels without a GPU. `launch`
    calls the result with ``(grid, block, args)``; in these tests, `args` has NumPy
    arrays. A launch with dynamic shared memory also reads the attribute
    ``shared_size_bytes`` of the result, its static shared memory.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    return _compile(file, kernel, dtype, cooperative, device)


# `device` is only a key of the cache: a loaded kernel belongs to one device.
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


@functools.cache  # one module for all kernels of a file
def _module(file: str, dtype: str, cooperative: bool) -> Any:
    import cupy

    return cupy.RawModule(
        code=source(file),
        options=options(dtype),
        # If the blocks of a grid wait for each other, all of them must run at the same
        # time. CUDA guarantees this for a cooperative launch. The code is the same.
        enable_cooperative_groups=cooperative,
    )


def _hint(log: str) -> str:
    """Return a hint for the user that fits the compiler's log."""
    if "cuda_fp16.h" in log or "cannot open source file" in log:
        return (
            "Hint: the CUDA headers are missing. Install CuPy together with them: "
            f"{cupy_command()}."
        )
    return (
        "Hint: these kernels need a GPU of sm_75 (Turing) or newer. If yours is new "
        "enough, please report this log."
    )


def source(file: str) -> str:
    """Return ``common.cuh``, the ``.cuh`` files of the folder, and the file, joined.

    The files are joined instead of included, because the key of CuPy's disk cache is
    the source text: CuPy would not notice a change in an included file. ``#line`` makes
    compiler errors name the original files.
    """
    folder = _folder()
    # Sorted by name, so that the text is the same on every machine.
    headers = sorted((folder / file).parent.glob("*.cuh"))
    return "".join(
        f'#line 1 "{path.relative_to(folder)}"\n{path.read_text(encoding="utf-8")}'
        for path in (folder / "common.cuh", *headers, folder / f"{file}.cu")
    )


def options(dtype: str) -> tuple[str, ...]:
    """Return the compiler's options: the language, the types, and the constants."""
    storage = _STORAGE["float32" if dtype == TF32 else dtype]
    compute = "double" if dtype == "float64" else "float"
    # `real_t` is the type of arrays in memory, and `acc_t` is the type of sums.
    types = f"-Dreal_t={storage}", f"-Dacc_t={compute}"
    constants = definitions(8 if compute == "double" else 4)  # bytes of an acc_t
    defined = (f"-D{name}={number}" for name, number in constants.items())
    return "--std=c++17", *types, f"-DTF32={int(dtype == TF32)}", *defined


def kernel_files() -> list[str]:
    """Return all kernel files, as ``basic/merge_tokens`` and so on."""
    return [
        f"{path.parent.name}/{path.stem}" for path in sorted(_folder().glob("*/*.cu"))
    ]


def kernel_names(file: str) -> list[str]:
    """Return the names of the kernels in a file, in the order of the file."""
    return _KERNEL.findall(text(file))


def text(file: str) -> str:
    """Return the text of a kernel file."""
    return (_folder() / f"{file}.cu").read_text(encoding="utf-8")


@functools.cache
def _folder() -> Path:
    for folder in _FOLDERS:
        if (folder / "common.cuh").is_file():
            return folder
    folders = " and ".join(str(folder) for folder in _FOLDERS)
    raise FileNotFoundError(
        f"the kernels of qm_cupy are missing: looked for common.cuh in {folders}; "
        "install qm-cupy again"
    )


def kernel_dtype(file: str, dtype: Any) -> str:
    """Return the dtype that a file's kernels are compiled for.

    The result is `dtype` itself, with one exception: it is `TF32` for float32 in
    optimized kernels if `allow_tf32` allows TF32.
    """
    name = _name(np.dtype(dtype))
    if name != "float32" or not file.startswith("optimized/"):
        return name
    return TF32 if tf32_allowed() else name


# Cached, because NumPy builds the name on every access, which takes as long as a
# launch.
@functools.lru_cache(maxsize=16)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name
