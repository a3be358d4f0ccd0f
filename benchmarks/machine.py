"""Which array libraries can be used here, and what the GPU says of itself."""

import datetime
import functools
import os
import platform
import subprocess
from typing import Any

import numpy as np
from guard import one_line

# JAX would take three quarters of the memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
)


@functools.cache
def cupy_or_reason() -> tuple[Any, str]:
    """Return CuPy if it can use a GPU, or None and why not."""
    try:
        import cupy

        if not cupy.is_available():
            return None, "CuPy finds none"
        cupy.empty(1)
    except ImportError:
        return None, "no CuPy"
    except Exception as error:  # a driver that does not fit, a GPU in use
        return None, one_line(error)
    return cupy, ""


@functools.cache
def torch_or_none() -> Any:
    """Return torch if it is installed; an import that fails counts as none."""
    try:
        import torch
    except Exception:
        return None
    return torch


@functools.cache
def torch_on_gpu() -> Any:
    """Return torch if both it and CuPy can use a GPU, or None."""
    torch = torch_or_none()
    try:
        usable = torch is not None and torch.cuda.is_available()
    except Exception:
        return None
    return torch if usable and cupy_or_reason()[0] is not None else None


def properties() -> dict[str, Any]:
    runtime = cupy_or_reason()[0].cuda.runtime
    return runtime.getDeviceProperties(runtime.getDevice())


def clocks() -> dict[str, str]:
    """Return the driver's version and the clocks by nvidia-smi, {} without it."""
    for fields in (_FIELDS, _FIELDS[:1]):  # one unknown field fails the whole query
        query = f"--query-gpu={','.join(fields)}"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return {}
        if done.returncode == 0 and done.stdout:
            values = done.stdout.splitlines()[0].split(",")
            return dict(zip(fields, map(str.strip, values), strict=False))
    return {}


def cpu() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"


def describe() -> dict[str, str]:
    """Return the name of the GPU and the versions of what uses it."""
    cupy, torch = cupy_or_reason()[0], torch_on_gpu()
    name = properties()["name"]
    said = clocks()
    return {
        "GPU": name.decode() if isinstance(name, bytes) else str(name),
        "driver": said.pop("driver_version", "unknown"),
        **said,
        "CUDA": str(cupy.cuda.runtime.runtimeGetVersion()),
        "CuPy": str(cupy.__version__),
        "torch": str(torch.__version__) if torch else "none",
        "date": datetime.date.today().isoformat(),
    }
