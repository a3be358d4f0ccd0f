"""Conversion: arrays of any library come in through DLPack and leave as they came."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from numpy.typing import NDArray

from .libraries import CUDA, give_inside, library

Array = TypeVar("Array", bound=Any)  # T -> T: the caller gets back what came in
P = ParamSpec("P")
Result = TypeVar("Result")
Leave = Callable[[Any], Any]

# Arguments that may also be a number or a word; who takes them checks those.
_ON_HOST = frozenset({"num_groups", "budget", "num_tokens", "hard"})  # shapes need them
_OFTEN_PLAIN = _ON_HOST | {"weights", "position", "size"}
_HOST, _CUDA = (1, 3), (CUDA,)  # DLPack's kDLCPU and kDLCUDAHost; kDLCUDA


def on_callers_stream(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a public function work on the device and in the stream of its first array.

    For torch that is its current stream: its allocator then needs to hear of nothing,
    and a graph that it captures holds the work. For CuPy it is CuPy's current stream,
    as it is for all others, which DLPack orders before and after it.
    """

    @functools.wraps(function)
    def on_stream(*args: P.args, **kwargs: P.kwargs) -> Result:
        scope = _scope((*args, *kwargs.values()))
        if scope is None:
            return function(*args, **kwargs)
        with scope:
            return function(*args, **kwargs)

    return on_stream


def _scope(given: tuple[Any, ...]) -> Any:
    for x in given:
        first = x[0] if isinstance(x, tuple) and x else x  # the tokens of a `Merged`
        if hasattr(first, "__dlpack__"):
            return library(first).scope(first)
    return None


def enter(**arrays: Any) -> tuple[Any, ...]:
    """Return ``leave`` and every argument as a NumPy or CuPy array; None stays None.

    Counts become NumPy arrays wherever they are: the shapes of results depend on them.
    """
    given = {
        name: _prepare(name, x) for name, x in arrays.items() if not _is_plain(name, x)
    }
    data = [name for name in given if name not in _ON_HOST] or list(given)
    if len(data) > 1:
        _check_alike(given, data)
    inside = {name: _bring_in(name, x) for name, x in given.items()}
    leave = _leave(given[data[0]]) if data else give_inside
    return leave, *(inside.get(name, x) for name, x in arrays.items())


def _is_plain(name: str, x: Any) -> bool:
    often = name in _OFTEN_PLAIN or name.startswith("gradient")
    return x is None or (often and not hasattr(x, "__dlpack__"))


def _prepare(name: str, x: Any) -> Any:
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be an array (NumPy's, or one that speaks DLPack), "
            f"got {type(x).__module__}.{type(x).__qualname__}"
        )
    return library(x).prepare(name, x)


def _check_alike(given: dict[str, Any], data: list[str]) -> None:
    """Refuse arrays of several libraries, or on several devices, naming them all."""
    libraries = {name: library(given[name]).name for name in data}
    if len(set(libraries.values())) > 1:
        got = ", ".join(f"`{name}` of {found}" for name, found in libraries.items())
        raise TypeError(f"arrays must come from one library, got {got}")
    devices = {name: _spelled(*_device(name, given[name])) for name in data}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"`{name}` on {found}" for name, found in devices.items())
        raise ValueError(f"arrays must be on one device, got {got}")


def _device(name: str, x: Any) -> tuple[int, int]:
    try:
        kind, number = library(x).device(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        _refuse(name, error)
    if kind not in _HOST + _CUDA:
        raise ValueError(f"`{name}` must be in the memory of a CPU or a CUDA device")
    return kind, number


def _refuse(name: str, error: Exception) -> NoReturn:
    """Raise for an array that cannot be exported; a GPU's own failure stays what it is.

    CuPy's errors of CUDA, and torch's, are RuntimeErrors too.
    """
    if "cudaError" in str(error) or "CUDA error" in str(error):
        raise error
    raise TypeError(f"`{name}` cannot be read through DLPack: {error}") from error


def _spelled(kind: int, number: int) -> str:
    return "the CPU" if kind in _HOST else f"CUDA device {number}"


def _bring_in(name: str, x: Any) -> Any:
    kind, _ = _device(name, x)
    cupy = None if kind in _HOST else _cupy(name)
    try:
        if cupy is None:
            return library(x).to_numpy(name, x)
        found = cupy.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        _refuse(name, error)
    return found.get() if name in _ON_HOST else found


def _cupy(name: str) -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"`{name}` is on a CUDA device, which takes CuPy: "
            'pip install "qm-cupy[cuda13]" (or cuda12)'
        ) from error
    return cupy


def _leave(example: Any) -> Leave:
    """Return how to give results back to who gave an array."""
    give_back = library(example).give_back
    return lambda x: give_back(x, example)


def deliver(leave: Any, result: NDArray[Any], out: Any, target: Any) -> Any:
    """Return the result, through the caller's `out` (inside: `target`) if given."""
    if out is None:
        return leave(result)
    if target is not result:  # a kernel has written it already
        target[...] = result
    return out
