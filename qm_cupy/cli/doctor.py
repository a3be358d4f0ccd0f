"""The command `doctor`: show what is installed, what is missing, and how to get it."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ..install_advice import cupy_command, install_command

_REQUIRED = ("qm-cupy", "numpy", "scipy")
# For each optional module: the packages that provide it, and the command that installs
# it. The last two are for progress bars and for shell completion.
_OPTIONAL = {
    ("cupy-cuda13x", "cupy-cuda12x", "cupy"): cupy_command(),
    ("matplotlib",): install_command("plot"),
    ("safetensors",): install_command("safetensors"),
    ("ml_dtypes",): install_command("bfloat16"),
    ("torch",): install_command("torch"),
    ("jax",): install_command("jax"),
    ("gguf",): install_command("gguf"),
    ("tqdm",): install_command("tqdm"),
    ("shtab",): install_command("shtab"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`, which has none."""
    parser.description = (
        "Show the versions of installed packages, the commands that install missing "
        "ones, the GPUs that CuPy finds, and the folder of compiled kernels."
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    """Print the state of this installation, one fact per line."""
    rows = [("Python", platform.python_version())]
    rows += [(name, _version(name) or "missing") for name in _REQUIRED]
    for names, command in _OPTIONAL.items():
        # Show all packages that are installed: three packages provide CuPy.
        installed = [(name, version) for name in names if (version := _version(name))]
        rows += installed or [(names[-1], f"not installed: {command}")]
    rows += [("GPU", line) for line in _gpus()]
    rows += [("kernel cache", _cache())]
    rows += [("device", "arrays on a GPU use the CUDA kernels, all others use NumPy")]
    for name, text in rows:
        print(f"{name:<17} {text}")


def _version(name: str) -> str | None:
    """Return the version of a package without importing it, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[str]:
    """Yield one line per GPU and one for CUDA, or one line with the error."""
    try:
        import cupy
    except ImportError as error:
        # CuPy may be installed while a library that it imports is missing.
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        yield "unknown: CuPy is not installed" if missing else _failure(error)
        return
    except Exception as error:  # a broken driver raises errors of many types
        yield _failure(error)
        return
    try:
        runtime = cupy.cuda.runtime
        for index in range(runtime.getDeviceCount()):  # raises if there is no driver
            yield _describe(runtime.getDeviceProperties(index))
        driver, own = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        yield f"CUDA {_dotted(driver)} by the driver, {_dotted(own)} by the runtime"
    except Exception as error:  # a broken driver, found by the first call of CUDA
        yield _failure(error)


def _describe(device: dict[str, Any]) -> str:
    memory = device["totalGlobalMem"] / 2**30
    capability = f"{device['major']}.{device['minor']}"
    return f"{device['name'].decode()}, {memory:.1f} GiB, sm {capability}"


def _dotted(version: int) -> str:
    """Return "13.1" for 13010, which is CUDA's form: 1000 · major + 10 · minor."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _failure(error: Exception) -> str:
    reason = " ".join(str(error).split()) or "no reason given"
    return f"CuPy cannot use a GPU: {type(error).__name__}: {reason}"


def _cache() -> str:
    """Describe the folder in which CuPy keeps compiled kernels."""
    # CuPy uses the folder of the environment variable, or its default folder. Unlike
    # `Path.expanduser`, this function raises no error if there is no home folder.
    default = os.path.expanduser("~/.cupy/kernel_cache")  # noqa: PTH111
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or default)
    try:
        if not folder.is_dir():
            return f"{folder}, not created yet"
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    except OSError as error:
        return f"{folder}, not readable: {error.strerror}"
    return f"{folder}, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
