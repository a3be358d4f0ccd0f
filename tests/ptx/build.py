"""Compile the interpreter with g++, once for each machine, and load it."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvrtc

_HERE = Path(__file__).resolve().parent
_COMPILER = os.environ.get("CXX", "g++")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fPIC", "-Wall", "-Wextra",
    # Round every operation by itself. Nothing reads floating-point flags or errno.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


@functools.cache
def library():
    """Return the interpreter; compile it first if the sources or the CPU are new."""
    # An object file is named by a hash of its source and of all headers, so a change of
    # one source compiles one file, and a change of a header compiles all.
    sources = sorted(_HERE.glob("*.cpp"))
    headers = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.h")))
    objects = {path: _kept(path.read_bytes() + headers, ".o") for path in sources}
    path = _kept(repr(sorted(objects.values())).encode(), ".so")  # named by its objects
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tests run in several processes: one compiles, the others wait for it.
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(_compile, objects.keys(), objects.values()))
                _make(path, "-shared", *map(str, objects.values()))
    # The signatures of the `extern "C"` functions of interpret.cpp.
    loaded = ctypes.CDLL(str(path))
    loaded.ptx_module.restype = loaded.ptx_kernel.restype = ctypes.c_void_p
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    text = ctypes.c_char_p
    loaded.ptx_module.argtypes = text, u64, text, u64
    loaded.ptx_kernel.argtypes = pointer, text, text, u64
    loaded.ptx_facts.argtypes = pointer, *(ctypes.POINTER(u32),) * 3
    loaded.ptx_parameter.argtypes = pointer, u32, *(ctypes.POINTER(u32),) * 2
    loaded.ptx_launch.argtypes = (
        pointer, u32, u32, u32, ctypes.c_int, text, pointer, u32, text, u64,
    )  # fmt: skip
    return loaded


def _kept(content, suffix):
    """Return the path in the cache of what this compiler makes of `content`."""
    key = hashlib.sha256(content + repr((_COMPILER, _FLAGS, _cpu())).encode())
    return nvrtc.CACHE / f"ptx-{key.hexdigest()[:32]}{suffix}"


def _compile(source, target):
    if not target.exists():
        _make(target, *_FLAGS, "-c", str(source))


def _make(target, *options):
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        command = _COMPILER, *options, "-o", str(made)
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            message = (
                f"the interpreter of kernels needs {_COMPILER}: install it, or set CXX"
            )
            raise RuntimeError(message) from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        made.replace(target)  # atomic: no process sees half of a file


@functools.cache
def _cpu():
    """Return the features of the CPU, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.machine(), platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), "")
