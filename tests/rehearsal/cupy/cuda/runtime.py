"""CUDA's runtime, under CuPy's name. The code is in `cupy._runtime`.

That module can be imported before this package is complete.
"""

# Only names that CuPy has: names.py compares them.
from cupy._runtime import (
    CUDARuntimeError,
    deviceSynchronize,
    driverGetVersion,
    getDevice,
    getDeviceCount,
    getDeviceProperties,
    memGetInfo,
    runtimeGetVersion,
    setDevice,
    streamCaptureModeGlobal,
    streamCaptureModeRelaxed,
    streamCaptureModeThreadLocal,
)

__all__ = [
    "CUDARuntimeError",
    "deviceSynchronize",
    "driverGetVersion",
    "getDevice",
    "getDeviceCount",
    "getDeviceProperties",
    "memGetInfo",
    "runtimeGetVersion",
    "setDevice",
    "streamCaptureModeGlobal",
    "streamCaptureModeRelaxed",
    "streamCaptureModeThreadLocal",
]
