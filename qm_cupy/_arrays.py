"""The door: arrays of any library come in through DLPack and leave as they came."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from array_api_compat import (
    array_namespace,
    is_array_api_obj,
    is_cupy_array,
    is_numpy_array,
)

Array = TypeVar("Array", bound=Any)  # T -> T: the caller gets back what came in
Leave = Callable[[Any], Any]

# Arguments that may also be a number or a word; who takes them checks those.
_OFTEN_PLAIN = frozenset({"num_groups", "budget", "num_tokens", "hard", "weights"})
_ON_HOST = _OFTEN_PLAIN - {"weights"}  # counts, which shapes depend on
_CPU, _CUDA = (1, 3), (2,)  # DLPack's kDLCPU and kDLCUDAHost; kDLCUDA


def enter(**arrays: Any) -> tuple[Any, ...]:
    """Return ``leave`` and every argument as a NumPy or CuPy array; None stays None.

    Counts become NumPy arrays wherever they are: the shapes of results depend on them.
    """
    given = {name: x for name, x in arrays.items() if not _is_plain(name, x)}
    libraries = {name: _library(name, x) for name, x in given.items()}
    inside = {name: _bring_in(name, x) for name, x in given.items()}
    data = [name for name in given if name not in _ON_HOST] or list(given)
    _check_alike("arrays must come from one library", {n: libraries[n] for n in data})
    _check_alike("arrays must be in one memory", {n: _memory(inside[n]) for n in data})
    leave = _leave(given[data[0]]) if data else _leave_inside
    return leave, *(inside.get(name, x) for name, x in arrays.items())


def _is_plain(name: str, x: Any) -> bool:
    return x is None or (name in _OFTEN_PLAIN and not hasattr(x, "__dlpack__"))


def _library(name: str, x: Any) -> str:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"`{name}` is a NumPy masked array: pass its data and `mask=`")
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be an array (NumPy's, or one that speaks DLPack), "
            f"got {type(x).__module__}.{type(x).__qualname__}"
        )
    return "numpy" if isinstance(x, np.ndarray) else type(x).__module__.split(".")[0]


def _check_alike(wanted: str, found: dict[str, str]) -> None:
    if len(set(found.values())) > 1:
        got = ", ".join(f"`{name}` of {what}" for name, what in found.items())
        raise TypeError(f"{wanted}, got {got}")


def _bring_in(name: str, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        return x.view(np.ndarray)
    kind, number = x.__dlpack_device__()
    if kind not in _CPU + _CUDA:
        raise ValueError(f"`{name}` must be in the memory of a CPU or a CUDA device")
    try:
        if kind in _CPU:
            return np.from_dlpack(x)
        found = _cupy(name, number).from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"`{name}` cannot be read through DLPack: {error}") from error
    return found.get() if name in _ON_HOST else found


def _cupy(name: str, number: int) -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"`{name}` is on a CUDA device, which takes CuPy: "
            'pip install "qm-cupy[cuda13]" (or cuda12)'
        ) from error
    current = cupy.cuda.runtime.getDevice()
    if number != current:
        raise ValueError(
            f"`{name}` is on CUDA device {number}, and the current one is {current}: "
            f"call within `with cupy.cuda.Device({number}):`"
        )
    return cupy


def _memory(x: Any) -> str:
    return "the CPU" if _on_host(x) else "a CUDA device"


def _leave(example: Any) -> Leave:
    """Return how to give results back: as NumPy's or CuPy's if no library is known."""
    known = is_array_api_obj(example)
    if not known or is_numpy_array(example) or is_cupy_array(example):
        return _leave_inside
    xp = array_namespace(example)
    return lambda x: xp.from_dlpack(np.asarray(x, order="C") if _on_host(x) else x)


def _leave_inside(x: Any) -> Any:
    if not _on_host(x):
        return x
    return np.ascontiguousarray(x) if x.ndim else x[()]


def _on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic)
