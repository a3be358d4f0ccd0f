"""The array libraries that the conversion supports. This module imports none of them.

An array can only exist if its library has been imported. The library is therefore in
`sys.modules`, and NumPy users do not wait for an import of torch or JAX.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Device types of DLPack, as `__dlpack_device__` returns them with the device number.
CPU = 1, 0  # kDLCPU, and the number of its only device
CUDA = 2  # kDLCUDA


class Library(NamedTuple):
    """Functions that convert the arrays of one library."""

    name: str
    device: Callable[[Any], tuple[int, int]]
    """Returns DLPack's device type and the device number."""
    prepare: Callable[[str, Any, bool], Any]
    """Returns an array that can be exported, or raises an error with the argument's
    name. The last argument says whether the array will be written."""
    to_numpy: Callable[[str, Any], NDArray[Any]]
    """Exports an array in CPU memory, without a copy."""
    give_back: Callable[[Any, Any], Any]
    """Converts a fresh NumPy or CuPy result to the library of an example array."""
    scope: Callable[[Any], AbstractContextManager[Any] | None]
    """Returns a context in which CuPy uses the array's device, and the stream that its
    library works in. None if CuPy uses them already."""


class _Stream(NamedTuple):
    """A stream as an object of the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the protocol's version first


def library(x: Any) -> Library:
    """Return the library of an object that supports DLPack."""
    array_type: type = type(x)
    return _library(array_type)


# Cached by type: each public call looks up the library of every array.
@functools.lru_cache(maxsize=64)
def _library(array_type: type) -> Library:
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    # The functions of each library are in the order of the fields of `Library`.
    if issubclass(array_type, np.ndarray):
        functions = _plain_numpy, _view, give_inside, _no_scope
        return Library("numpy", lambda x: CPU, *functions)
    if torch and issubclass(array_type, torch.Tensor):
        converters = _detached, _torch_to_numpy, _to_torch, _torch_scope
        return Library("torch", _torch_device, *converters)
    if jax and issubclass(array_type, jax.Array | jax.core.Tracer):
        converters = _concrete, _jax_to_numpy, _to_jax, _device_scope
        return Library("jax", _dlpack_device, *converters)
    # CuPy, and every other library with DLPack. Results return through the array API
    # if the library supports it, and as NumPy or CuPy arrays otherwise.
    name = array_type.__module__.split(".")[0]
    back = _to_namesake if hasattr(array_type, "__array_namespace__") else give_inside
    converters = (lambda name, x, output: x), _from_dlpack, back, _device_scope
    return Library(name, _dlpack_device, *converters)


def on_host(x: Any) -> bool:
    """Return whether a converted array is a NumPy array (or scalar)."""
    return isinstance(x, np.ndarray | np.generic)


def give_inside(x: Any, like: Any = None) -> Any:
    """Return a result as NumPy or CuPy array, C-contiguous; NumPy () as a scalar."""
    if not on_host(x):
        return x
    return np.ascontiguousarray(x) if x.ndim else x[()]


def bfloat16(name: str) -> np.dtype[Any]:
    """Return the dtype bfloat16, which NumPy and CuPy support only with ml_dtypes."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"`{name}` is bfloat16, which needs ml_dtypes: "
            'pip install "qm-cupy[bfloat16]"'
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def stack(arrays: Sequence[Any], axis: int) -> Any:
    """Join arrays of one library, whichever it is, along a new axis."""
    first = arrays[0]
    if hasattr(first, "__array_namespace__"):
        return first.__array_namespace__().stack(arrays, axis=axis)
    module = sys.modules[library(first).name]  # CuPy and torch have no namespace
    return module.stack(arrays, axis)


def no_grad(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which torch records no graph, if `x` is a torch tensor."""
    torch = sys.modules.get("torch")
    if torch and isinstance(x, torch.Tensor):
        return torch.no_grad()
    return nullcontext()


def _dlpack_device(x: Any) -> tuple[int, int]:
    device_type, number = x.__dlpack_device__()
    return int(device_type), int(number)  # libraries return their own enumerations


def _no_scope(x: Any) -> None:
    return None


def _device_scope(x: Any) -> AbstractContextManager[Any] | None:
    """Return a context for the device of `x`, or None if it is the current device."""
    try:
        device_type, number = _dlpack_device(x)
        if device_type != CUDA:
            return None
        import cupy
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError):
        return None  # `enter` converts the same array later and raises a clear error
    if number == cupy.cuda.runtime.getDevice():
        return None
    return cupy.cuda.Device(number)


def _from_dlpack(name: str, x: Any) -> NDArray[Any]:
    return np.from_dlpack(x)


def _to_namesake(x: Any, like: Any) -> Any:
    """Convert a result to a library that supports the array API standard."""
    x = np.asarray(x, order="C") if on_host(x) else x
    return like.__array_namespace__().from_dlpack(x)


def _plain_numpy(name: str, x: Any, output: bool) -> Any:
    """Return a NumPy array in the byte order of this machine."""
    # A view would lose its mask silently.
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"`{name}` is a NumPy masked array: pass its data and `mask=`")
    if not x.dtype.isnative and not output:  # an output must not be a copy
        x = x.astype(x.dtype.newbyteorder("="))
    return x


def _view(name: str, x: Any) -> NDArray[Any]:
    return x.view(np.ndarray)  # np.matrix and other subclasses change operators


def _torch_device(x: Any) -> tuple[int, int]:
    return CPU if x.device.type == "cpu" else _dlpack_device(x)


def _torch_scope(x: Any) -> AbstractContextManager[Any] | None:
    """Return a context in which CuPy works in torch's current stream.

    Torch's allocator gives freed memory to later work of the same stream. If a kernel
    ran in another stream, torch could reuse memory that the kernel still reads.
    """
    if x.device.type != "cuda":
        return None
    try:
        import cupy
    except ImportError:
        return None  # `enter` converts the same array later and raises a clear error
    stream = sys.modules["torch"].cuda.current_stream(x.device)
    scope = ExitStack()
    scope.enter_context(cupy.cuda.Device(x.device.index))
    torch_stream = _Stream(stream.cuda_stream)
    scope.enter_context(cupy.cuda.Stream.from_external(torch_stream))
    return scope


def _detached(name: str, x: Any, output: bool) -> Any:
    """Return a tensor without gradients whose memory can be exported, or raise."""
    torch = sys.modules["torch"]
    if x.requires_grad:
        # Operations with a gradient were dispatched before this point. To detach here
        # would lose the gradient without notice.
        if torch.is_grad_enabled():
            raise TypeError(
                f"`{name}` requires grad, and this function has no gradient for it: "
                f"pass `{name}.detach()`, or call the function under `torch.no_grad()`"
            )
        x = x.detach()
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            f"`{name}` has a forward-mode tangent, but qm_cupy has gradients in "
            "reverse mode only: use `backward` or `torch.autograd.grad`"
        )
    if x.dtype == torch.bfloat16:
        bfloat16(name)  # raises now if ml_dtypes is missing
    # `x.conj().imag` is negated lazily: its memory still has the other sign.
    return x.resolve_neg()


def _torch_to_numpy(name: str, x: Any) -> NDArray[Any]:
    torch = sys.modules["torch"]
    if x.dtype == torch.bfloat16:  # NumPy < 2.5 has no DLPack for it
        return x.view(torch.int16).numpy().view(bfloat16(name))
    return x.numpy()


def _to_torch(x: Any, like: Any) -> Any:
    torch = sys.modules["torch"]
    if not on_host(x):
        return torch.from_dlpack(x)
    x = np.asarray(x, order="C")
    if x.dtype.kind == "V":  # bfloat16: no other result has this kind
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _concrete(name: str, x: Any, output: bool) -> Any:
    """Return a JAX array that has values, or raise."""
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"`{name}` is a JAX tracer, which has no values yet, and this function "
            "cannot be traced: call it outside of jax.jit, jax.grad and jax.vmap, or "
            "through jax.pure_callback"
        )
    if output:
        raise TypeError(
            f"`{name}` cannot be written: JAX arrays are immutable; use the returned "
            "result instead"
        )
    return x


def _jax_to_numpy(name: str, x: Any) -> NDArray[Any]:
    return np.asarray(x)  # JAX's own view, which knows bfloat16 and is read-only


def _to_jax(x: Any, like: Any) -> Any:
    jax = sys.modules["jax"]
    wide: AbstractContextManager[Any] = nullcontext()
    if x.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        # Otherwise JAX would narrow int64 and float64 silently.
        wide = jax.enable_x64(True)
    with wide:
        if not on_host(x):
            return jax.numpy.from_dlpack(x)
        result = jax.numpy.asarray(x)  # copies: NumPy aligns to 16 bytes, JAX to 64
        if isinstance(result, jax.core.Tracer):  # inside jax.jit, even for a constant
            with jax.ensure_compile_time_eval():
                result = jax.numpy.asarray(x)
        here = result.device == like.device
        return result if here else jax.device_put(result, like.device)


def is_cuda(x: Any) -> bool:
    """Return whether a converted array is a CuPy array. Tests replace this function."""
    return hasattr(type(x), "__cuda_array_interface__")


def may_share_memory(x: Any, y: Any) -> bool:
    """Return whether the address ranges of two CuPy arrays overlap.

    CuPy's own function compares the owners of the memory, but each view that was
    converted through DLPack has an owner of its own. Addresses do not depend on owners.
    """
    (low, high), (other_low, other_high) = _bounds(x), _bounds(y)
    return low < other_high and other_low < high  # both ranges exclude their end


def _bounds(x: Any) -> tuple[int, int]:
    """Return the address of the first byte of a CuPy array, and one past its last."""
    if x.size == 0:
        return 0, 0
    # Offsets in bytes from element (0, 0, ...) to the ends of each axis. They are
    # negative for a reversed view, whose first element has the highest address.
    steps = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    below = sum(step for step in steps if step < 0)
    above = sum(step for step in steps if step > 0)
    return x.data.ptr + below, x.data.ptr + above + x.itemsize
