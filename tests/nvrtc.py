"""Compiles kernels for any architecture with NVRTC, which needs no GPU and no driver.

It needs the packages cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-runtime, whose
headers are those of a toolkit. The first compilation imports them.

`kernel_facts` and `ptx` keep what they find on disk, so a source is compiled once for
every architecture, whoever asks: the tests of compilation and of launches, the
interpreter in tests/ptx, and benchmarks/resources.py.

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
# What CuPy adds to the options of a `RawModule`, beside the architecture.
_CUPY = "-ftz=true", "--device-as-default-execution-space"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for .*\n")
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_SIGNATURE = re.compile(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)")
_BOUND = re.compile(r"\.maxntid\s+(\d+)")


class Facts(NamedTuple):
    """What a compiled kernel asks of the device."""

    registers: int
    """Of each thread."""
    spilled: int
    """Bytes stored and loaded for want of registers."""
    shared: int
    """Bytes of static shared memory."""
    bound: int | None
    """Threads of a block, at most, where ``__launch_bounds__`` says so."""
    parameters: list[str]
    """Types in PTX: ``u64`` for pointers and long long, ``f64`` for double."""


@functools.cache
def include_folder() -> Path:
    """Return where cuda_fp16.h is: in the pip packages, or else in a toolkit.

    The packages come first because NVRTC itself comes from them, and headers are
    written for the compiler of their own release.
    """
    return folder_with("include", "cuda_fp16.h")


@functools.cache
def folder_with(kind: str, file: str) -> Path:
    """Return the folder of the packages, or else of a toolkit, that holds a file."""
    folders = []
    if spec := importlib.util.find_spec("nvidia"):
        folders = [Path(p, "cu13", kind) for p in spec.submodule_search_locations]
    folders.append(Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"), kind))
    for folder in folders:
        if (folder / file).is_file():
            return folder
    places = ", ".join(map(str, folders))
    raise FileNotFoundError(f"no {file}: looked in {places}")


@functools.cache
def kernel_facts(source: str, options: tuple[str, ...]) -> dict[str, Facts]:
    """Return the facts of every kernel of a source, compiled to machine code.

    `options` are the caller's, ``-arch=sm_…`` among them; what CuPy adds is added here
    too. A failure raises ``RuntimeError`` with the compiler's log.
    """
    path = _kept_facts(source, options)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: Facts(*facts) for name, facts in kept.items()}
    except FileNotFoundError:
        found = _facts(*compile_source(source, options))
    keep(path, json.dumps(found).encode())
    return found


def _kept_facts(source: str, options: tuple[str, ...]) -> Path:
    this = Path(__file__).read_text(encoding="utf-8")  # which finds the facts
    return _kept(".json", this, source, *options)


@functools.cache
def ptx(source: str, options: tuple[str, ...]) -> str:
    """Return the PTX of a source, with line numbers, as CuPy would have it made.

    `options` are the caller's, ``-arch=compute_…`` among them: no machine code is made.
    """
    options = (*options, *_CUPY, "-lineinfo")
    path = _kept(".ptx", source, *options)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        _, found = run_nvrtc(source, options)
    keep(path, found.encode())
    return found


def disassembly(source: str, options: tuple[str, ...]) -> str:
    """Return the machine code of a source as nvdisasm prints it, with labels.

    `options` are the caller's, ``-arch=sm_…`` among them. The facts of the kernels are
    kept as well: one compilation is enough for both.
    """
    path = _kept(".sass", source, *options)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        added = *_CUPY, "--ptxas-options=-v"
        facts, cubin = _compiled((*options, *added), source, _facts_and_cubin)
    keep(_kept_facts(source, options), json.dumps(facts).encode())
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
    """Return the version of NVRTC, as ``13.5``."""
    return ".".join(map(str, _version()))


def _kept(suffix: str, *parts: str) -> Path:
    """Return where what this NVRTC makes of some texts is kept."""
    text = "\0".join([repr(_version()), *parts])
    return CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"


def keep(path: Path, content: bytes) -> None:
    """Write a file at once, for tests that run side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder, path.name)
        written.write_bytes(content)
        written.replace(path)


def compile_source(source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """Compile to machine code; return the log, which tells each need, and the PTX."""
    return run_nvrtc(source, (*options, *_CUPY, "--ptxas-options=-v"))


def run_nvrtc(source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """Return NVRTC's log and its PTX."""
    return _compiled(options, source, _log_and_ptx)


def _compiled(options: tuple[str, ...], source: str, read: Callable[..., Any]) -> Any:
    """Return what `read` takes from a compiled program.

    NVRTC releases the interpreter lock meanwhile: threads compile side by side.
    """
    from cuda.bindings import nvrtc

    encoded = [x.encode() for x in (*options, f"-I{include_folder()}")]
    program = _check(
        *nvrtc.nvrtcCreateProgram(source.encode(), b"spliced.cu", 0, [], [])
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(_log(program))
        return read(program)
    finally:
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
    _, *parts = _ENTRY.split(log)  # name, its lines, name, its lines, ...
    lines = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {}
    for name, parameters, directives in _SIGNATURE.findall(ptx):
        bound = _BOUND.search(directives)
        found[name] = Facts(
            int(_REGISTERS.search(lines[name])[1]),
            sum(map(int, _SPILLS.findall(lines[name]))),
            sum(map(int, _SHARED.findall(lines[name]))),
            int(bound[1]) if bound else None,
            _PARAMETER.findall(parameters),
        )
    return found


def _text(program, find_size, read) -> str:
    return _read(program, find_size, read).decode(errors="replace").rstrip("\0")


def _read(program, find_size, read) -> bytes:
    # NVRTC writes into it. An empty log is one byte, 0, and `b" " * 1` is the one b" "
    # of the whole process.
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
