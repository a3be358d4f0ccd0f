"""Compilation: finds, splices, compiles and caches the kernels.

Importing this does nothing to the GPU; CuPy itself is imported by the first launch.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.dtypes import accumulation_dtype
from ..settings import tf32_allowed
from .constants import definitions

_HERE = Path(__file__).resolve().parents[1]
_FOLDERS = _HERE / "kernels", _HERE.parent / "kernels"  # a wheel's, a checkout's
_STORAGE = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\(")
TF32 = "tf32"  # float32 to all but the multiplication: a kernel's dtype, not an array's


class KernelCompilationError(RuntimeError):
    """A kernel did not compile; holds the compiler's log and what may help."""


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
        kinds = {
            kernel_dtype(file, x) for x in (dtype, accumulation_dtype(np.dtype(dtype)))
        }
        for kind in kinds:
            compile_file(file, kind)


def compile_file(file: str, dtype: str) -> None:
    """Compile every kernel of a file, for each way in which it is launched."""
    for kernel in kernel_names(file):
        raw_kernel(file, kernel, dtype)
        if "blocks_barrier(" in text(file):
            raw_kernel(file, kernel, dtype, True)


def raw_kernel(file: str, kernel: str, dtype: str, cooperative: bool = False) -> Any:
    """Return the compiled kernel for the current device.

    The seam, with `empty`: tests/ptx puts its own in its place, which is
    called as this is, with ``(grid, block, args)``, and takes NumPy arrays. A launch
    with `shared` memory also reads its ``shared_size_bytes``, the static part.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    return _compile(file, kernel, dtype, cooperative, device)


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
    """Return the compiler's options: the language, the types, and shared numbers."""
    storage = _STORAGE["float32" if dtype == TF32 else dtype]
    compute = "double" if dtype == "float64" else "float"
    types = f"-Dreal_t={storage}", f"-Dacc_t={compute}"
    shared = definitions(8 if compute == "double" else 4)
    defined = (f"-D{name}={number}" for name, number in shared.items())
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


def kernel_dtype(file: str, dtype: Any) -> str:
    """Return the dtype that a file's kernels are compiled for: TF32 for float32?"""
    name = _name(np.dtype(dtype))
    if name != "float32" or not file.startswith("optimized/"):
        return name
    return TF32 if tf32_allowed() else name


@functools.lru_cache(maxsize=16)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which NumPy composes anew, at the price of a launch
