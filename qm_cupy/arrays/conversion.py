"""Conversion: arrays of any library come in through DLPack and leave as they came."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn, ParamSpec, TypeVar

from .libraries import CUDA, give_inside, library

Array = TypeVar("Array", bound=Any)  # T -> T: the caller gets back what came in
# Arrays of the first array's library, but of another dtype. No type can say the former,
# so type checkers let users say the latter: ``labels: NDArray[np.int32] = ...``.
IntArray = Any
BoolArray = Any
FloatArray = Any
P = ParamSpec("P")
Result = TypeVar("Result")
Leave = Callable[[Any], Any]

_HOST = 1, 3  # DLPack's kDLCPU and kDLCUDAHost


def on_callers_stream(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a public function work on the device and in the stream of its first array.

    For torch that is its current stream: its allocator then needs no notice, and a
    graph that it captures holds the work. For CuPy it is CuPy's current stream, as it
    is for all others, which DLPack orders before and after it.
    """

    @functools.wraps(function)
    def on_stream(*args: P.args, **kwargs: P.kwargs) -> Result:
        scope = scope_of((*args, *kwargs.values()))
        if scope is None:
            return function(*args, **kwargs)
        with scope:
            return function(*args, **kwargs)

    return on_stream


def scope_of(values: Iterable[Any]) -> AbstractContextManager[Any] | None:
    """Return a context on the device and stream of the first array, if it needs one."""
    for x in values:
        first = x[0] if isinstance(x, tuple) and x else x  # the tokens of a `Merged`
        if hasattr(first, "__dlpack__"):
            return library(first).scope(first)
    return None


def enter(
    arrays: Mapping[str, Any],
    *,
    counts: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Return ``leave`` and every argument as a NumPy or CuPy array, in their order.

    Arguments are given by their names, which errors use; None stays None. All arrays
    must be of one library and on one device. ``leave`` converts a result to the library
    of the first array.

    Parameters
    ----------
    arrays : mapping
        Arrays to read.
    counts : mapping, optional
        Numbers, or arrays of any library on any device. Arrays become NumPy's: the
        shapes of results depend on them.
    gradients : mapping, optional
        Arrays to read, or numbers, which stay as they are.
    outputs : mapping, optional
        Arrays to write to.
    """
    prepared = {name: _prepare(name, x) for name, x in arrays.items() if x is not None}
    for name, x in (gradients or {}).items():
        if hasattr(x, "__dlpack__"):
            prepared[name] = _prepare(name, x)
    for name, x in (outputs or {}).items():
        if x is not None:
            prepared[name] = _prepare(name, x, output=True)
    if len(prepared) > 1:
        _check_alike(prepared)
    inside = {name: _bring_in(name, x) for name, x in prepared.items()}
    values = [*map(inside.get, arrays)]
    example = next(iter(prepared.values()), None)
    for name, x in (counts or {}).items():
        if hasattr(x, "__dlpack__"):
            example = x if example is None else example
            x = _bring_in(name, _prepare(name, x), to_host=True)
        values.append(x)
    values += [inside.get(name, x) for name, x in (gradients or {}).items()]
    values += map(inside.get, outputs or ())
    return give_inside if example is None else _leave(example), *values


def deliver(leave: Leave, result: Any, out: Any, target: Any) -> Any:
    """Return the result, through the caller's `out` (inside: `target`) if given."""
    if out is None:
        return leave(result)
    if target is not result:  # a kernel has written it already
        target[...] = result
    return out


def _prepare(name: str, x: Any, *, output: bool = False) -> Any:
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be an array (NumPy's, or one that speaks DLPack), "
            f"got {type(x).__module__}.{type(x).__qualname__}"
        )
    return library(x).prepare(name, x, output)


def _check_alike(given: Mapping[str, Any]) -> None:
    """Refuse arrays of several libraries, or on several devices, naming them all."""
    libraries = {name: library(x).name for name, x in given.items()}
    if len(set(libraries.values())) > 1:
        got = ", ".join(f"`{name}` of {found}" for name, found in libraries.items())
        raise TypeError(f"arrays must come from one library, got {got}")
    devices = {name: _spelled(*_device(name, x)) for name, x in given.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"`{name}` on {found}" for name, found in devices.items())
        raise ValueError(f"arrays must be on one device, got {got}")


def _device(name: str, x: Any) -> tuple[int, int]:
    try:
        kind, number = library(x).device(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        _refuse(name, error)
    if kind not in (*_HOST, CUDA):
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


def _bring_in(name: str, x: Any, *, to_host: bool = False) -> Any:
    kind, _ = _device(name, x)
    cupy = None if kind in _HOST else _cupy(name)
    try:
        if cupy is None:
            return library(x).to_numpy(name, x)
        inside = cupy.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        _refuse(name, error)
    return inside.get() if to_host else inside


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
    """Return how to give results back to the caller's library."""
    give_back = library(example).give_back
    return lambda x: give_back(x, example)
