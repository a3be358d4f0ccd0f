"""CUDA's runtime; `cupy._runtime` has it, which imports nothing of this package."""

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
