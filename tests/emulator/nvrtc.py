"""Compiles kernels for any architecture with NVRTC, which needs no GPU and no driver.

It takes the packages cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-runtime, whose
headers are those of a toolkit; the first is imported by the first compilation.
"""

import importlib.util
import os
from pathlib import Path


def include_folder() -> Path:
    """Return where cuda_fp16.h is: in the pip packages, or else in a toolkit.

    The packages come first because NVRTC itself comes from them, and headers are
    written for the compiler of their own release.
    """
    folders = []
    if spec := importlib.util.find_spec("nvidia"):
        folders = [Path(p, "cu13", "include") for p in spec.submodule_search_locations]
    folders.append(Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"), "include"))
    for folder in folders:
        if (folder / "cuda_fp16.h").is_file():
            return folder
    places = ", ".join(map(str, folders))
    raise FileNotFoundError(f"no cuda_fp16.h: looked in {places}")


def compile_log(source: str, options: list[str]) -> str:
    """Compile to a cubin; return the log, which tells registers and spills.

    `options` are the caller's, ``-arch=sm_…`` among them; what CuPy adds to those of a
    ``RawModule`` is added here too. A failure raises ``RuntimeError`` with the log.
    """
    from cuda.bindings import nvrtc

    added = f"-I{include_folder()}", "-ftz=true", "--ptxas-options=-v"
    encoded = [option.encode() for option in (*options, *added)]
    program = _check(
        *nvrtc.nvrtcCreateProgram(source.encode(), b"spliced.cu", 0, [], [])
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = b" " * _check(*nvrtc.nvrtcGetProgramLogSize(program))
        _check(*nvrtc.nvrtcGetProgramLog(program, log))
    finally:
        _check(*nvrtc.nvrtcDestroyProgram(program))
    text = log.decode(errors="replace").rstrip("\0")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(text)
    return text


def _check(status, *results):
    from cuda.bindings import nvrtc

    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(nvrtc.nvrtcGetErrorString(status)[1].decode())
    return results[0] if results else None
