"""Compile kernels for any architecture with NVRTC, which needs no GPU and no driver.

It needs the packages cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-runtime. The last
one has the header files of a CUDA toolkit. The first compilation imports the packages.

`kernel_facts` and `ptx` keep their results on disk, so a source is compiled once for
each architecture. The tests of compilation and of launches, the interpreter in
tests/ptx and benchmarks/resources.py share these files.

`disassembly` also needs nvdisasm, from the package nvidia-cuda-nvdisasm or a toolkit.
Its results are kept on disk as well.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path(
    os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "qm_cupy-kernels"
)
# The options that CuPy adds to those of a `RawModule`, besides the architecture.
_CUPY = "-ftz=true", "--device-as-default-execution-space"

# The log of ptxas, for each kernel, and the declarations in PTX.
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for .*\n")
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_SIGNATURE = re.compile(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)")
_BOUND = re.compile(r"\.maxntid\s+(\d+)")


class Facts(NamedTuple):
    """The resources that a compiled kernel needs, and its parameters."""

    registers: int
    """Registers of each thread."""
    spilled: int
    """Bytes stored to and loaded from memory because there are too few registers."""
    shared: int
    """Bytes of static shared memory."""
    bound: int | None
    """Largest number of threads of a block, by ``__launch_bounds__``, or None."""
    parameters: list[str]
    """Types in PTX: ``u64`` for pointers and long long, ``f64`` for double."""


@functools.cache
def include_folder() -> Path:
    """Return the folder of cuda_fp16.h, in the pip packages or else in a toolkit.

    The packages come first because NVRTC itself comes from them, and headers are
    written for the compiler of their own release.
    """
    return folder_with("include", "cuda_fp16.h")


@functools.cache
def folder_with(folder: str, file: str) -> Path:
    """Return the subfolder of the packages, or else of a toolkit, with a file."""
    # `nvidia` is a namespace of many packages; "cu13" is the folder of CUDA 13.
    folders = []
    if spec := importlib.util.find_spec("nvidia"):
        folders = [Path(p, "cu13", folder) for p in spec.submodule_search_locations]
    folders.append(Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"), folder))
    for candidate in folders:
        if (candidate / file).is_file():
            return candidate
    locations = ", ".join(map(str, folders))
    raise FileNotFoundError(f"no {file}: looked in {locations}")


@functools.cache
def kernel_facts(source: str, options: tuple[str, ...]) -> dict[str, Facts]:
    """Return the facts of every kernel of a source, compiled to machine code.

    `options` contain ``-arch=sm_…``; this function adds the options that CuPy adds. If
    the compilation fails, it raises ``RuntimeError`` with the compiler's log.
    """
    path = _kept_facts(source, options)
    try:
        # JSON has lists where `Facts` has fields.
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: Facts(*facts) for name, facts in kept.items()}
    except FileNotFoundError:
        result = _facts(*compile_source(source, options))
    keep(path, json.dumps(result).encode())
    return result


def _kept_facts(source: str, options: tuple[str, ...]) -> Path:
    # A change of this file makes old facts invalid, because it extracts them.
    this = Path(__file__).read_text(encoding="utf-8")
    return _kept(".json", this, source, *options)


@functools.cache
def ptx(source: str, options: tuple[str, ...]) -> str:
    """Return the PTX of a source, with line numbers, compiled with CuPy's options.

    `options` contain ``-arch=compute_…``: NVRTC then makes no machine code.
    """
    options = (*options, *_CUPY, "-lineinfo")  # faults name lines of the source
    path = _kept(".ptx", source, *options)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        _, text = run_nvrtc(source, options)
    keep(path, text.encode())
    return text


def disassembly(source: str, options: tuple[str, ...]) -> str:
    """Return the machine code of a source as nvdisasm prints it, with labels.

    `options` contain ``-arch=sm_…``. The facts of the kernels are kept as well, so one
    compilation is enough for both.
    """
    path = _kept(".sass", source, *options)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        added = *_CUPY, "--ptxas-options=-v"
        facts, cubin = _compiled((*options, *added), source, _facts_and_cubin)
    keep(_kept_facts(source, options), json.dumps(facts).encode())
    # nvdisasm reads a file. Its option -c prints code only, with labels for jumps.
    tool = folder_with("bin", "nvdisasm") / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-c", file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr}")
    keep(path, done.stdout.encode())
    return done.stdout


def version() -> str:
    """Return the version of NVRTC, such as ``13.5``."""
    return ".".join(map(str, _version()))


def _kept(suffix: str, *parts: str) -> Path:
    """Return the path in the cache of this NVRTC's result for some texts."""
    # A zero byte cannot be in a source, so it separates the parts without ambiguity.
    text = "\0".join([repr(_version()), *parts])
    return CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"


def keep(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: other processes may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic within one file system, hence in the same folder.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder, path.name)
        written.write_bytes(content)
        written.replace(path)


def compile_source(source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """Compile to machine code; return the PTX and the log, which has the resources."""
    return run_nvrtc(source, (*options, *_CUPY, "--ptxas-options=-v"))


def run_nvrtc(source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """Compile a source; return NVRTC's log and the PTX."""
    return _compiled(options, source, _log_and_ptx)


def _compiled(options: tuple[str, ...], source: str, read: Callable[..., Any]) -> Any:
    """Compile a source and return the result of `read`, called with the program.

    NVRTC releases Python's interpreter lock, so threads compile at the same time.
    """
    from cuda.bindings import nvrtc

    # Include files, such as cuda_fp16.h, are not part of the source.
    encoded = [x.encode() for x in (*options, f"-I{include_folder()}")]
    program = _check(
        *nvrtc.nvrtcCreateProgram(source.encode(), b"spliced.cu", 0, [], [])
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(_log(program))
        return read(program)
    finally:  # a failed program holds memory as well
        _check(*nvrtc.nvrtcDestroyProgram(program))


def _log(program) -> str:
    from cuda.bindings import nvrtc

    return _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)


def _log_and_ptx(program) -> tuple[str, str]:
    from cuda.bindings import nvrtc

    text = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    return _log(program), text


def _facts_and_cubin(program) -> tuple[dict[str, Facts], bytes]:
    from cuda.bindings import nvrtc

    cubin = _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    return _facts(*_log_and_ptx(program)), cubin


def _facts(log: str, ptx: str) -> dict[str, Facts]:
    """Return the facts: resources from the log of ptxas, declarations from the PTX."""
    _, *parts = _ENTRY.split(log)  # name, its lines, name, its lines, ...
    lines = dict(zip(parts[::2], parts[1::2], strict=True))
    facts = {}
    for name, parameters, directives in _SIGNATURE.findall(ptx):
        bound = _BOUND.search(directives)
        facts[name] = Facts(
            int(_REGISTERS.search(lines[name])[1]),
            sum(map(int, _SPILLS.findall(lines[name]))),  # stores and loads
            sum(map(int, _SHARED.findall(lines[name]))),  # absent if there is none
            int(bound[1]) if bound else None,
            _PARAMETER.findall(parameters),
        )
    return facts


def _text(program, find_size, read) -> str:
    return _read(program, find_size, read).decode(errors="replace").rstrip("\0")


def _read(program, find_size, read) -> bytes:
    # NVRTC writes into this object. An empty log has one byte, a 0. A buffer `b" " * 1`
    # would be the only b" " object of the whole process, and this 0 would change it.
    content = bytes(_check(*find_size(program)))
    _check(*read(program, content))
    return content


@functools.cache
def _version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    _check(status)
    return tuple(version)


def _check(status, *results):
    from cuda.bindings import nvrtc

    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(nvrtc.nvrtcGetErrorString(status)[1].decode())
    return results[0] if results else None
