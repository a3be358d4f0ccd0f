"""CUDA's runtime: its errors, the current device, and planted faults.

Three environment variables plant a fault in the kernel that they name.

``QM_CUPY_REHEARSE_ILLEGAL``
    The kernel reads memory out of bounds. The launch returns, but the next
    synchronisation fails, and every later CUDA call fails too.
``QM_CUPY_REHEARSE_HANG``
    The next synchronisation never returns, and SIGINT does not interrupt it.
``QM_CUPY_REHEARSE_WRONG``
    The kernel changes one element of its last array.
"""

import os
import signal
import time
from typing import Any

from cupy import _card

streamCaptureModeGlobal = 0  # noqa: N816
streamCaptureModeThreadLocal = 1  # noqa: N816
streamCaptureModeRelaxed = 2  # noqa: N816

# CUDA's errors: number, name and text of cudaError_t.
_ERRORS = {
    1: ("cudaErrorInvalidValue", "invalid argument"),
    2: ("cudaErrorMemoryAllocation", "out of memory"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    900: (
        "cudaErrorStreamCaptureUnsupported",
        "operation not permitted when stream is capturing",
    ),
    901: (
        "cudaErrorStreamCaptureInvalidated",
        "operation failed due to a previous error during capture",
    ),
    906: (
        "cudaErrorStreamCaptureImplicit",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
    907: (
        "cudaErrorCapturedEvent",
        "operation not permitted on an event last recorded in a capturing stream",
    ),
}
_ILLEGAL = 700

# The state of the device. `pending` is the number of an error that the next
# synchronisation reports; then it is `sticky`, and every call reports it.
_fault: dict[str, Any] = {"pending": 0, "sticky": 0, "hangs": False}


class CUDARuntimeError(RuntimeError):
    """An error of the CUDA runtime, named by its number."""

    def __init__(self, status: int, reason: str = "") -> None:
        self.status = status
        text = ": ".join(_ERRORS[status])
        super().__init__(f"{text} ({reason})" if reason else text)

    def __reduce__(self) -> Any:  # pickle would pass the text to __init__
        return type(self), (self.status,)


def getDevice() -> int:  # noqa: N802
    check()
    return 0


def setDevice(device: int) -> None:  # noqa: N802
    check()
    check_number(device)


def getDeviceCount() -> int:  # noqa: N802
    check()
    return 1


def getDeviceProperties(device: int) -> dict[str, Any]:  # noqa: N802
    check()
    check_number(device)
    return dict(_card.PROPERTIES)


def memGetInfo() -> tuple[int, int]:  # noqa: N802
    from cupy import _memory

    check()
    return _card.MEMORY_BYTES - _memory.held_bytes(), _card.MEMORY_BYTES


def runtimeGetVersion() -> int:  # noqa: N802
    return 13000  # CUDA 13.0


def driverGetVersion() -> int:  # noqa: N802
    return 13000


def deviceSynchronize() -> None:  # noqa: N802
    from cupy import _streams

    _streams.synchronize_device()


def check_number(device: int) -> None:
    if device != 0:  # there is one device
        raise CUDARuntimeError(101)


def check() -> None:
    """Raise the device's error if it has one; it stays until the process ends."""
    if _fault["sticky"]:
        raise CUDARuntimeError(_fault["sticky"])


# One variable names one kernel; without it, no kernel has the fault.
def planted(fault: str, kernel: str) -> bool:
    return os.environ.get(f"QM_CUPY_REHEARSE_{fault}") == kernel


def break_() -> None:
    """Let the next synchronisation report an illegal access."""
    _fault["pending"] = _ILLEGAL


def hang() -> None:
    _fault["hangs"] = True


def settle() -> None:
    """End a synchronisation, which reports the errors of the device."""
    if _fault["hangs"]:
        # A wait inside the driver does not return to Python, so Python's handlers of
        # signals do not run.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})
        while True:
            time.sleep(3600)
    if _fault["pending"]:
        _fault["sticky"] = _fault["pending"]
    check()


CUDARuntimeError.__module__ = "cupy.cuda.runtime"
