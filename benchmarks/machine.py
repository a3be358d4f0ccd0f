"""The array libraries of this machine, its description, and measures of a call."""

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

# Otherwise JAX would reserve three quarters of the GPU's memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_FIELDS = (  # of `nvidia-smi --query-gpu`
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
)


@functools.cache
def cupy_or_reason() -> tuple[Any, str]:
    """Return CuPy and "", or None and the reason why CuPy cannot use a GPU."""
    try:
        import cupy

        if not cupy.is_available():
            return None, "CuPy finds no GPU"
        cupy.empty(1)  # the first allocation shows whether the GPU works
    except ImportError:
        return None, "CuPy is not installed"
    except Exception as error:  # for example a wrong driver, or a GPU in use
        return None, one_line(error)
    return cupy, ""


@functools.cache
def torch_or_none() -> Any:
    """Return torch, or None if it is not installed or its import fails."""
    try:
        import torch
    except Exception:
        return None
    return torch


@functools.cache
def torch_on_gpu() -> Any:
    """Return torch if both torch and CuPy can use a GPU, or None."""
    torch = torch_or_none()
    try:
        usable = torch is not None and torch.cuda.is_available()
    except Exception:
        return None
    return torch if usable and cupy_or_reason()[0] is not None else None


def properties() -> dict[str, Any]:
    """Return CUDA's properties of the current GPU."""
    runtime = cupy_or_reason()[0].cuda.runtime
    return runtime.getDeviceProperties(runtime.getDevice())


def clocks() -> dict[str, str]:
    """Return the driver's version and the clocks, or {} if nvidia-smi fails."""
    # An unknown field makes the whole query fail; then only the driver is asked for.
    for fields in (_FIELDS, _FIELDS[:1]):
        query = f"--query-gpu={','.join(fields)}"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return {}
        if done.returncode == 0 and done.stdout:
            values = done.stdout.splitlines()[0].split(",")  # the first GPU
            return dict(zip(fields, map(str.strip, values), strict=False))
    return {}


def cpu() -> str:
    """Return a description of the CPU for the reports."""
    return f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"


def describe() -> dict[str, str]:
    """Return the name of the GPU, its driver and clocks, and versions of libraries."""
    cupy, torch = cupy_or_reason()[0], torch_on_gpu()
    said = clocks()  # {} without nvidia-smi
    try:
        name = properties()["name"]
        cuda = str(cupy.cuda.runtime.runtimeGetVersion())
    except Exception as error:  # the benchmark can run without this description
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
    """The device of the tokens: its arrays, how to wait for it, and its memory."""

    def __init__(self, on_cpu: bool = False) -> None:
        self.cupy = None if on_cpu else cupy_or_reason()[0]
        self.gpu = self.cupy is not None
        self.torch = torch_on_gpu() if self.gpu else torch_or_none()
        self.card = describe() if self.gpu else {}
        self.name = self.card.get("GPU", cpu())

    def put(self, x: np.ndarray, for_torch: bool) -> Any:
        """Return `x` on this device: float16 on a GPU, unchanged dtype on the CPU.

        On a GPU with torch every array is a tensor; otherwise `for_torch` decides.
        """
        # Without torch, the array on a GPU is CuPy's.
        if self.gpu and self.torch is not None:
            return self.torch.from_numpy(x).cuda().half()
        if self.gpu:
            return self.cupy.asarray(x.astype(np.float16))
        return self.torch.from_numpy(x) if for_torch else x

    def waited(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a call that also waits for the GPU, so that its time is complete."""
        if not self.gpu:
            return call

        def run() -> None:
            call()
            synchronize()

        return run

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Return how many kernels a call launches; None without a GPU or torch."""
        if not self.gpu or self.torch is None:
            return None
        torch = self.torch
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        # The profiler also lists "Memcpy" and "Memset", which are not kernels.
        return sum(
            event.count
            for event in profile.key_averages()
            if event.device_type == on_gpu and not event.key.startswith("Mem")
        )

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the peak bytes of a call, above the memory in use before it.

        On a GPU this is the sum over the pools of CuPy and torch. On Linux it is the
        growth of the resident set. On other systems it is unknown, and None.
        """
        if self.gpu:
            return self._peak_on_gpu(call)
        # Writing 5 resets the peak of the resident set (VmHWM) to its current size.
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        # VmRSS is the resident set now, VmHWM its largest size since the reset.
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)

    def _peak_on_gpu(self, call: Callable[[], Any]) -> int:
        free_memory()
        pool = self.cupy.get_default_memory_pool()
        # CuPy's pool keeps the blocks that a call frees, so its growth is the peak of
        # the call. torch records its own peak.
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
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10  # the file has KiB
    raise OSError(f"/proc/self/status has no field {field}")
