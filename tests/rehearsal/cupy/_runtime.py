"""CUDA's runtime: its errors, the current device, and faults planted on purpose.

Three environment variables plant a fault in the kernel that they name.
``QM_CUPY_REHEARSE_ILLEGAL``: the kernel reads memory that is not its own. The launch
returns, the next synchronisation fails, and so does every CUDA call after it.
``QM_CUPY_REHEARSE_HANG``: the next synchronisation never returns; SIGINT does not
interrupt it. ``QM_CUPY_REHEARSE_WRONG``: the kernel changes one element of its last
array.
"""

import os
import signal
import time
from typing import Any

from cupy import _card

streamCaptureModeGlobal = 0  # noqa: N816
streamCaptureModeThreadLocal = 1  # noqa: N816
streamCaptureModeRelaxed = 2  # noqa: N816

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

# What has gone wrong on the device: `pending` shows at the next synchronisation.
_fault: dict[str, Any] = {"pending": 0, "sticky": 0, "hangs": False}


class CUDARuntimeError(RuntimeError):
    """An error of the CUDA runtime, by its number."""

    def __init__(self, status: int, reason: str = "") -> None:
        self.status = status
        text = ": ".join(_ERRORS[status])
        super().__init__(f"{text} ({reason})" if reason else text)

    def __reduce__(self) -> Any:
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
    return 13000


def driverGetVersion() -> int:  # noqa: N802
    return 13000


def deviceSynchronize() -> None:  # noqa: N802
    from cupy import _streams

    _streams.synchronize_device()


def check_number(device: int) -> None:
    if device != 0:
        raise CUDARuntimeError(101)


def check() -> None:
    """Fail if the device has failed: such an error stays until the process ends."""
    if _fault["sticky"]:
        raise CUDARuntimeError(_fault["sticky"])


def planted(kind: str, kernel: str) -> bool:
    return os.environ.get(f"QM_CUPY_REHEARSE_{kind}") == kernel


def break_() -> None:
    """Let the next synchronisation find an illegal access."""
    _fault["pending"] = _ILLEGAL


def hang() -> None:
    _fault["hangs"] = True


def settle() -> None:
    """End a synchronisation: what the device did wrong shows now."""
    if _fault["hangs"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})
        while True:
            time.sleep(3600)
    if _fault["pending"]:
        _fault["sticky"] = _fault["pending"]
    check()


CUDARuntimeError.__module__ = "cupy.cuda.runtime"
