"""Conversion of arrays of any library to NumPy or CuPy and back, through DLPack.

A public function converts its arguments by `convert_inputs`. The functions that it
calls afterwards work on NumPy or CuPy arrays only. At the end, ``convert_back``
converts the results to the caller's library. DLPack is the protocol by which array
libraries exchange arrays without a copy.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np

from ..install_advice import cupy_command
from .libraries import CUDA_TYPE, keep_numpy_or_cupy, library, may_share_memory

Array = TypeVar("Array", bound=Any)  # the result has the type of the input
# Arrays of the caller's library, as arguments or results, whose dtype is not that of
# the first input. No type expression can say "of the same library", so these types are
# Any. Users may annotate a result with its dtype: ``labels: NDArray[np.int32] = ...``.
IntArray = Any
BoolArray = Any
FloatArray = Any
P = ParamSpec("P")
Result = TypeVar("Result")
ConvertBack = Callable[[Any], Any]  # converts one result to the caller's library

_HOST = 1, 3  # DLPack's types kDLCPU and kDLCUDAHost (pinned memory of the CPU)


def on_callers_stream(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a public function on the device and stream of its first array.

    For a torch tensor, the function runs in torch's current stream. Torch's allocator
    reuses freed memory for later work of the same stream. Our kernels run in that
    stream too, so memory that they still read is not overwritten, and no
    `record_stream` is needed. A CUDA graph that torch captures contains the kernels.
    For arrays of all other libraries, the function runs in CuPy's current stream, and
    DLPack synchronises: CuPy's stream waits until the input is ready, and the library's
    stream waits until the result is ready.
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

    None means that there is nothing to set: CuPy already uses this device and stream,
    the array is on the CPU, there is no array, or the array cannot be used. In the last
    case, the function raises the error later.
    """
    for x in values:
        # For a `Merged`, which is a tuple, use its first array: the tokens.
        first = x[0] if isinstance(x, tuple) and x else x
        if hasattr(first, "__dlpack__"):
            return library(first).scope(first)
    return None  # there is no array


def convert_inputs(
    arrays: Mapping[str, Any],
    *,
    counts: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Return ``convert_back``, then all arguments as NumPy or CuPy arrays.

    The arguments come in the order of the parameters below: first `arrays`, last
    `outputs`. The keys are the names that error messages use. None stays None. All
    arrays except `counts` must be of one library and on one device. The function
    ``convert_back`` converts a result to the library of the first array.

    Parameters
    ----------
    arrays : mapping
        Arrays to read.
    counts : mapping, optional
        Numbers, or arrays of any library on any device. Arrays become NumPy arrays,
        because the shapes of results depend on their values.
    gradients : mapping, optional
        Gradients of results: arrays to read, or numbers. Numbers stay unchanged.
    outputs : mapping, optional
        Arrays to write to. They must not overlap each other or any other array.
    """
    # First prepare and compare all arrays except the counts, so that a wrong array is
    # refused before any conversion. The order matters: results are converted to the
    # library of the first array in `prepared`.
    prepared = {name: _prepare(name, x) for name, x in arrays.items() if x is not None}
    for name, x in (gradients or {}).items():
        if hasattr(x, "__dlpack__"):
            prepared[name] = _prepare(name, x)
    for name, x in (outputs or {}).items():
        if x is not None:
            prepared[name] = _prepare(name, x, output=True)
    if len(prepared) > 1:
        _check_alike(prepared)
    converted = {name: _to_numpy_or_cupy(name, x) for name, x in prepared.items()}
    values = [*map(converted.get, arrays)]
    # Results return to the library of this array, and to its device.
    like = next(iter(prepared.values()), None)
    for name, x in (counts or {}).items():
        if hasattr(x, "__dlpack__"):
            like = x if like is None else like  # if the function has no other array
            converted[name] = _to_numpy_or_cupy(name, _prepare(name, x))
            # For counts on a GPU, the CPU waits here, because the shapes of results
            # depend on these values.
            x = converted[name]
            x = x.get() if hasattr(x, "get") else x  # CuPy's arrays have `get`
        values.append(x)
    for name in outputs or ():
        _check_apart(name, converted)
    values += [converted.get(name, x) for name, x in (gradients or {}).items()]
    values += map(converted.get, outputs or ())
    return keep_numpy_or_cupy if like is None else _convert_back_to(like), *values


def _check_apart(name: str, arrays: Mapping[str, Any]) -> None:
    """Raise if the output of this name overlaps another array of the call."""
    # Of two outputs, one would overwrite the other. Some GPU threads may still read an
    # input while others already write the result.
    out = arrays.get(name)
    on_host = isinstance(out, np.ndarray)
    overlap = np.may_share_memory if on_host else may_share_memory
    for other, x in arrays.items():
        # Counts may be on the CPU although the other arrays are on a GPU.
        if out is None or other == name or isinstance(x, np.ndarray) != on_host:
            continue
        if overlap(out, x):
            raise ValueError(
                f"`{name}` must not share memory with `{other}`: pass a separate array"
            )


def deliver(convert_back: ConvertBack, result: Any, out: Any, target: Any) -> Any:
    """Return the result, or write it to the caller's `out` and return `out`.

    `target` is `out` as a NumPy or CuPy array; both have the same memory.
    """
    if out is None:
        return convert_back(result)
    if target is not result:  # otherwise a kernel has already written to `out`
        target[...] = result
    return out


def _prepare(name: str, x: Any, *, output: bool = False) -> Any:
    """Return an array that can be exported through DLPack, or raise."""
    if not hasattr(x, "__dlpack__"):
        advice = ": make one array of it" if isinstance(x, list | tuple) else ""
        raise TypeError(
            f"`{name}` must be an array of NumPy or another library with DLPack, "
            f"got {type(x).__module__}.{type(x).__qualname__}{advice}"
        )
    return library(x).prepare(name, x, output)


def _check_alike(arrays: Mapping[str, Any]) -> None:
    """Raise if arrays are of several libraries or on several devices."""
    # Results have one library and one device, so all inputs must have the same.
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
        _raise_export_error(name, error)
    if device_type not in (*_HOST, CUDA_TYPE):
        raise ValueError(
            f"`{name}` must be in the memory of a CPU or a CUDA device, got DLPack "
            f"device type {device_type}"
        )
    return device_type, number


def _raise_export_error(name: str, error: Exception) -> NoReturn:
    """Raise TypeError for an array that cannot be exported; re-raise errors of CUDA.

    `error` comes from the array's library. CUDA errors of CuPy and torch are
    RuntimeErrors too. They mean that the GPU failed, not that the argument is wrong.
    """
    if "cudaError" in str(error) or "CUDA error" in str(error):
        raise error
    raise TypeError(f"`{name}` cannot be read through DLPack: {error}") from error


def _device_name(device_type: int, number: int) -> str:
    return "the CPU" if device_type in _HOST else f"CUDA device {number}"


def _to_numpy_or_cupy(name: str, x: Any) -> Any:
    """Return an array as NumPy or CuPy array, as a view of the same memory."""
    device_type, _ = _device(name, x)
    cupy = None if device_type in _HOST else _cupy(name)
    try:
        if cupy is None:
            return library(x).to_numpy(name, x)
        # DLPack makes CuPy's current stream wait for the work of the exporting library.
        return cupy.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        _raise_export_error(name, error)


def _cupy(name: str) -> Any:
    """Import CuPy, which only arrays on a GPU need."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"`{name}` is on a CUDA device, which needs CuPy: {cupy_command()}"
        ) from error
    return cupy


def _convert_back_to(like: Any) -> ConvertBack:
    """Return the function that converts results to the library of the array `like`."""
    return functools.partial(_from_result, like)  # unlike a lambda, it can be pickled


def _from_result(like: Any, x: Any) -> Any:
    return library(like).from_result(x, like)
