"""The door: arrays of any library come in through DLPack and leave as they came."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

Array = TypeVar("Array", bound=Any)  # T -> T: the caller gets back what came in
Leave = Callable[[Any], Any]

# Arguments that may also be a number or a word; who takes them checks those.
_OFTEN_PLAIN = frozenset({"num_groups", "budget", "num_tokens", "hard", "weights"})
_CPU_DEVICES = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost


def enter(**arrays: Any) -> tuple[Any, ...]:
    """Return ``leave`` and every argument as a NumPy array (None stays None)."""
    given = {name: x for name, x in arrays.items() if not _is_plain(name, x)}
    libraries = {name: _library(name, x) for name, x in given.items()}
    if len(set(libraries.values())) > 1:
        found = ", ".join(f"`{name}` of {lib}" for name, lib in libraries.items())
        raise TypeError(f"arrays must come from one library, got {found}")
    inside = {name: _to_numpy(name, x) for name, x in given.items()}
    leave = _leave(next(iter(given.values()))) if given else _leave_numpy
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


def _to_numpy(name: str, x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        return x.view(np.ndarray)
    if x.__dlpack_device__()[0] not in _CPU_DEVICES:
        raise ValueError(f"`{name}` must be in CPU memory, got one on a GPU")
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"`{name}` cannot be read through DLPack: {error}") from error


def _leave(example: Any) -> Leave:
    """Return how to give results back; what no library knows comes back as NumPy."""
    if isinstance(example, np.ndarray) or not is_array_api_obj(example):
        return _leave_numpy
    leave: Leave = array_namespace(example).from_dlpack
    return leave


def _leave_numpy(x: Any) -> Any:
    return x if x.ndim else x[()]
