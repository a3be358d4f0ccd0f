"""Conversion of arrays of any library to NumPy or CuPy and back, through DLPack.

A public function calls `enter` once. Everything below it works on NumPy or CuPy arrays
only, and ``leave`` converts the results to the caller's library.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn, ParamSpec, TypeVar

from .libraries import CUDA, give_inside, library

Array = TypeVar("Array", bound=Any)  # the result has the type of the input
# Results of the caller's library that have another dtype than the input. No type
# expression can name "the same library", so these are Any, and users may annotate the
# result with its dtype: ``labels: NDArray[np.int32] = ...``.
IntArray = Any
BoolArray = Any
FloatArray = Any
P = ParamSpec("P")
Result = TypeVar("Result")
Leave = Callable[[Any], Any]  # converts one result to the caller's library

_HOST = 1, 3  # DLPack's kDLCPU and kDLCUDAHost (pinned memory of the CPU)


def on_callers_stream(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a public function on the device and stream of its first array.

    For a torch tensor this is torch's current stream. Torch's allocator frees memory in
    the order of that stream, so no `record_stream` is needed, and a CUDA graph that
    torch captures contains the work. For all other libraries it is CuPy's current
    stream. DLPack orders the work of such a library before and after this stream.
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
    """Return a context for the device and stream of the first array, or None.

    None means that the current device and stream are the right ones.
    """
    for x in values:
        first = x[0] if isinstance(x, tuple) and x else x  # the tokens of a `Merged`
        if hasattr(first, "__dlpack__"):
            return library(first).scope(first)
    return None  # no array: the function itself raises the error


def enter(
    arrays: Mapping[str, Any],
    *,
    counts: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Return ``leave`` and every argument as a NumPy or CuPy array, in their order.

    The keys are the argument names that error messages use. None stays None. All arrays
    must be of one library and on one device. ``leave`` converts a result to the library
    of the first array.

    Parameters
    ----------
    arrays : mapping
        Arrays to read.
    counts : mapping, optional
        Numbers, or arrays of any library on any device. Arrays become NumPy arrays,
        because the shapes of results depend on their values.
    gradients : mapping, optional
        Arrays to read, or numbers. Numbers stay unchanged.
    outputs : mapping, optional
        Arrays to write to.
    """
    # First prepare and compare all arguments, so that a wrong one is refused before any
    # conversion. `prepared` has the order of the arguments; the first is the example.
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
            example = x if example is None else example  # a function of counts alone
            # This waits for the GPU, but the shapes of results need the values.
            x = _bring_in(name, _prepare(name, x), to_host=True)
        values.append(x)
    values += [inside.get(name, x) for name, x in (gradients or {}).items()]
    values += map(inside.get, outputs or ())
    return give_inside if example is None else _leave(example), *values


def deliver(leave: Leave, result: Any, out: Any, target: Any) -> Any:
    """Return the result, or write it to the caller's `out` and return `out`.

    `target` is `out` as a NumPy or CuPy array; both have the same memory.
    """
    if out is None:
        return leave(result)
    if target is not result:  # else a kernel has written it already
        target[...] = result
    return out


def _prepare(name: str, x: Any, *, output: bool = False) -> Any:
    """Return an array that can be exported through DLPack, or raise."""
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"`{name}` must be an array of NumPy or another library with DLPack, "
            f"got {type(x).__module__}.{type(x).__qualname__}"
        )
    return library(x).prepare(name, x, output)


def _check_alike(arrays: Mapping[str, Any]) -> None:
    """Raise if arrays are of several libraries or on several devices."""
    # A result goes back to one library on one device, so the inputs must agree.
    libraries = {name: library(x).name for name, x in arrays.items()}
    if len(set(libraries.values())) > 1:
        got = ", ".join(f"`{name}` of {origin}" for name, origin in libraries.items())
        raise TypeError(f"arrays must come from one library, got {got}")
    devices = {name: _device_name(*_device(name, x)) for name, x in arrays.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
        raise ValueError(f"arrays must be on one device, got {got}")


def _device(name: str, x: Any) -> tuple[int, int]:
    """Return DLPack's device type and device number of an array."""
    try:
        device_type, number = library(x).device(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        _refuse(name, error)
    if device_type not in (*_HOST, CUDA):
        raise ValueError(
            f"`{name}` must be in the memory of a CPU or a CUDA device, got DLPack "
            f"device type {device_type}"
        )
    return device_type, number


def _refuse(name: str, error: Exception) -> NoReturn:
    """Raise TypeError for an array that cannot be exported; re-raise errors of CUDA.

    CUDA errors of CuPy and torch are RuntimeErrors too. They mean that the GPU failed,
    not that the argument is wrong.
    """
    if "cudaError" in str(error) or "CUDA error" in str(error):
        raise error
    raise TypeError(f"`{name}` cannot be read through DLPack: {error}") from error


def _device_name(device_type: int, number: int) -> str:
    return "the CPU" if device_type in _HOST else f"CUDA device {number}"


def _bring_in(name: str, x: Any, *, to_host: bool = False) -> Any:
    """Return an array as NumPy or CuPy, without a copy unless it goes to the CPU."""
    device_type, _ = _device(name, x)
    cupy = None if device_type in _HOST else _cupy(name)
    try:
        if cupy is None:
            return library(x).to_numpy(name, x)
        # DLPack makes CuPy's current stream wait for the work of the exporting library.
        inside = cupy.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        _refuse(name, error)
    return inside.get() if to_host else inside


def _cupy(name: str) -> Any:
    """Import CuPy, which only arrays on a GPU need."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"`{name}` is on a CUDA device, which needs CuPy: "
            'pip install "qm-cupy[cuda13]" (or "qm-cupy[cuda12]")'
        ) from error
    return cupy


def _leave(example: Any) -> Leave:
    """Return the function that converts results to the library of `example`."""
    give_back = library(example).give_back
    return lambda x: give_back(x, example)
