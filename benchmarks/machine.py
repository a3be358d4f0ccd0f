"""Which array libraries can be used here, and what the GPU says of itself."""

import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from guard import free_memory, one_line, synchronize

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
    said = clocks()
    try:
        name = properties()["name"]
        cuda = str(cupy.cuda.runtime.runtimeGetVersion())
    except Exception as error:  # no reason to measure nothing
        name, cuda = one_line(error), "unknown"
    return {
        "GPU": name.decode() if isinstance(name, bytes) else str(name),
        "driver": said.pop("driver_version", "unknown"),
        **said,
        "CUDA": cuda,
        "CuPy": str(cupy.__version__),
        "torch": str(torch.__version__) if torch else "none",
        "date": datetime.date.today().isoformat(),
    }


class Machine:
    """Where tokens lie, and how work there is waited for and weighed."""

    def __init__(self, on_cpu: bool = False) -> None:
        self.cupy = None if on_cpu else cupy_or_reason()[0]
        self.gpu = self.cupy is not None
        self.torch = torch_on_gpu() if self.gpu else torch_or_none()
        self.card = describe() if self.gpu else {}
        self.name = self.card.get("GPU", cpu())

    def put(self, x: np.ndarray, for_torch: bool) -> Any:
        if self.gpu and self.torch is not None:
            return self.torch.from_numpy(x).cuda().half()
        if self.gpu:
            return self.cupy.asarray(x.astype(np.float16))
        return self.torch.from_numpy(x) if for_torch else x

    def waited(self, call: Callable[[], Any]) -> Callable[[], Any]:
        if not self.gpu:
            return call

        def run() -> None:
            call()
            synchronize()

        return run

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Return how many kernels a call launches, on a GPU with torch."""
        if not self.gpu or self.torch is None:
            return None
        torch = self.torch
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        return sum(
            event.count
            for event in profile.key_averages()
            if event.device_type == on_gpu and not event.key.startswith("Mem")
        )

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the most bytes a call holds above what was held before it.

        On a GPU the allocations' sum over both pools; on Linux the resident set, whose
        mark is reset before; elsewhere unknown.
        """
        if self.gpu:
            return self._peak_on_gpu(call)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)

    def _peak_on_gpu(self, call: Callable[[], Any]) -> int:
        free_memory()
        pool = self.cupy.get_default_memory_pool()
        kept, cuda = pool.total_bytes(), None
        if self.torch is not None:
            cuda = self.torch.cuda
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
        call()
        synchronize()
        ours = pool.total_bytes() - kept
        return int(ours + (cuda.max_memory_allocated() - before if cuda else 0))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")
