"""How arrays of each library are converted to NumPy or CuPy, and back.

At import, this module imports no array library except NumPy; CuPy is imported only when
a function needs it for an array on a GPU. An array of torch or JAX can only exist if
its library has been imported, so the library is in `sys.modules`. NumPy users therefore
do not wait for an import of torch or JAX.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..install_advice import install_command

# DLPack's `__dlpack_device__` returns a device type and a device number.
CPU_DEVICE = 1, 0  # the type kDLCPU, and the number of its only device
CUDA_TYPE = 2  # the type kDLCUDA, without a number


class Library(NamedTuple):
    """Functions that convert the arrays of one library."""

    name: str
    device: Callable[[Any], tuple[int, int]]
    """Returns DLPack's device type and the device number."""
    prepare: Callable[[str, Any, bool], Any]
    """Returns an array that can be exported, or raises. Its arguments are the name for
    the error message, the array, and whether the array will be written."""
    to_numpy: Callable[[str, Any], NDArray[Any]]
    """Exports an array in CPU memory, without a copy. The name is for error
    messages."""
    from_result: Callable[[Any, Any], Any]
    """Converts a new NumPy or CuPy array, a result, to this library. The second
    argument is an array of this library, whose device the result gets."""
    scope: Callable[[Any], AbstractContextManager[Any] | None]
    """Returns a context in which CuPy uses the array's device and, for a torch tensor,
    torch's current stream. None if there is nothing to set, as for a CPU array."""


class _Stream(NamedTuple):
    """A stream as an object of the CUDA stream protocol, which CuPy accepts."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the version of the protocol, and the stream


def library(x: Any) -> Library:
    """Return the library of an object that supports DLPack."""
    array_type: type = type(x)
    return _library(array_type)


# Cached by type, because each public call looks up the library of every array.
@functools.lru_cache(maxsize=64)
def _library(array_type: type) -> Library:
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    # The functions of each library are in the order of the fields of `Library`.
    if issubclass(array_type, np.ndarray):
        functions = _plain_numpy, _view, keep_numpy_or_cupy, _no_scope
        return Library("numpy", lambda x: CPU_DEVICE, *functions)
    if torch and issubclass(array_type, torch.Tensor):
        converters = _detached, _torch_to_numpy, _to_torch, _torch_scope
        return Library("torch", _torch_device, *converters)
    if jax and issubclass(array_type, jax.Array | jax.core.Tracer):
        converters = _concrete, _jax_to_numpy, _to_jax, _device_scope
        return Library("jax", _dlpack_device, *converters)
    # CuPy, and every other library with DLPack. If the library supports the array API
    # standard, results are converted to it. Otherwise they stay NumPy or CuPy arrays.
    name = array_type.__module__.split(".")[0]
    from_result = (
        _to_array_api_library
        if hasattr(array_type, "__array_namespace__")
        else keep_numpy_or_cupy
    )
    converters = (lambda name, x, output: x), _from_dlpack, from_result, _device_scope
    return Library(name, _dlpack_device, *converters)


def on_host(x: Any) -> bool:
    """Return whether a converted array is a NumPy array (or scalar)."""
    return isinstance(x, np.ndarray | np.generic)


def keep_numpy_or_cupy(x: Any, like: Any = None) -> Any:
    """Return a result that stays a NumPy or CuPy array.

    A NumPy result becomes C-contiguous, or a scalar if it has no axes.
    """
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
            f"{install_command('bfloat16')}"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def stack(arrays: Sequence[Any], axis: int) -> Any:
    """Join arrays along a new axis.

    All belong to one library; any library is supported.
    """
    first = arrays[0]
    if hasattr(first, "__array_namespace__"):
        return first.__array_namespace__().stack(arrays, axis=axis)
    # Arrays of CuPy and torch do not have the attribute.
    module = sys.modules[library(first).name]
    return module.stack(arrays, axis)


def own_copy(x: Any) -> Any:
    """Return a copy of an array of any library, which a user's function may write to.

    None stays None. JAX arrays are immutable, so they need no copy.
    """
    if x is None or library(x).name == "jax":
        return x
    if library(x).name == "torch":
        return x.clone()
    if hasattr(x, "copy"):  # NumPy and CuPy
        return x.copy()
    return x.__array_namespace__().asarray(x, copy=True)


def no_grad(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which torch records no graph, if `x` is a torch tensor."""
    torch = sys.modules.get("torch")
    if torch and isinstance(x, torch.Tensor):
        return torch.no_grad()
    return nullcontext()


def _dlpack_device(x: Any) -> tuple[int, int]:
    device_type, number = x.__dlpack_device__()
    return int(device_type), int(number)  # some libraries return enumerations


def _no_scope(x: Any) -> None:
    return None


def _device_scope(x: Any) -> AbstractContextManager[Any] | None:
    """Return a context for the device of `x`, or None if it is the current device."""
    try:
        device_type, number = _dlpack_device(x)
        if device_type != CUDA_TYPE:
            return None
        import cupy
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError):
        # `convert_inputs` converts the same array later and raises a clear error.
        return None
    if number == cupy.cuda.runtime.getDevice():
        return None
    return cupy.cuda.Device(number)


def _from_dlpack(name: str, x: Any) -> NDArray[Any]:
    return np.from_dlpack(x)


def _to_array_api_library(x: Any, like: Any) -> Any:
    """Convert a result to the library of `like`, through the array API standard."""
    x = np.asarray(x, order="C") if on_host(x) else x
    return like.__array_namespace__().from_dlpack(x)


def _plain_numpy(name: str, x: Any, output: bool) -> Any:
    """Return a NumPy array; an input gets the byte order of this machine."""
    # The conversion would silently lose the array's mask.
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"`{name}` is a NumPy masked array: pass its data and `mask=`")
    # A copy of an output would not be the caller's memory. So an output keeps its byte
    # order, and `check_out` refuses it if this order is not that of the machine.
    if not x.dtype.isnative and not output:
        x = x.astype(x.dtype.newbyteorder("="))
    return x


def _view(name: str, x: Any) -> NDArray[Any]:
    # Return a plain array, because subclasses such as np.matrix define `*` differently.
    return x.view(np.ndarray)


def _torch_device(x: Any) -> tuple[int, int]:
    return CPU_DEVICE if x.device.type == "cpu" else _dlpack_device(x)


def _torch_scope(x: Any) -> AbstractContextManager[Any] | None:
    """Return a context in which CuPy works in torch's current stream.

    Torch's allocator reuses freed memory for later work of the same stream. If a kernel
    ran in another stream, torch could reuse memory that the kernel still reads.
    """
    if x.device.type != "cuda":
        return None
    try:
        import cupy
    except ImportError:
        # `convert_inputs` converts the same array later and raises a clear error.
        return None
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
        # While gradients are recorded, a call of an operation goes to a torch operator,
        # which calls the function without recording. So here, recording means that the
        # function has no gradient. If it detached the tensor, the gradient would be
        # lost without notice.
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
    # torch negates some tensors lazily, for example `x.conj().imag`: their memory still
    # has the other sign.
    return x.resolve_neg()


def _torch_to_numpy(name: str, x: Any) -> NDArray[Any]:
    torch = sys.modules["torch"]
    # torch's `numpy()` does not support bfloat16, and neither does `np.from_dlpack`
    # before NumPy 2.5, so pass the bits as int16.
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(bfloat16(name))
    return x.numpy()


def _to_torch(x: Any, like: Any) -> Any:
    torch = sys.modules["torch"]
    if not on_host(x):
        return torch.from_dlpack(x)
    x = np.asarray(x, order="C")
    if x.dtype.kind == "V":  # bfloat16 is the only dtype of results with this kind
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
    # `np.asarray` supports bfloat16 of JAX, and `np.from_dlpack` does not before
    # NumPy 2.5. The result is a read-only view.
    return np.asarray(x)


def _to_jax(x: Any, like: Any) -> Any:
    jax = sys.modules["jax"]
    wide: AbstractContextManager[Any] = nullcontext()
    if x.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        # Without this context JAX would silently convert int64 and float64 to 32 bits.
        wide = jax.enable_x64(True)
    with wide:
        if not on_host(x):
            return jax.numpy.from_dlpack(x)
        # `asarray` copies the NumPy array. JAX 0.10 does so for every alignment of the
        # array's memory.
        result = jax.numpy.asarray(x)
        if isinstance(result, jax.core.Tracer):
            # Under `jax.jit` even a constant becomes a tracer: compute it now instead.
            with jax.ensure_compile_time_eval():
                result = jax.numpy.asarray(x)
        same_device = result.device == like.device
        return result if same_device else jax.device_put(result, like.device)


def is_cuda(x: Any) -> bool:
    """Return whether a converted array is a CuPy array.

    Tests replace this function to run the code for CuPy without a GPU.
    """
    return hasattr(type(x), "__cuda_array_interface__")


def may_share_memory(x: Any, y: Any) -> bool:
    """Return whether the address ranges of two CuPy arrays overlap.

    CuPy's own function returns False if the memory objects of the arrays start at
    different addresses. The memory object of a view that was converted through DLPack
    starts at the view, so this function compares the addresses of the elements instead.
    """
    (low, high), (other_low, other_high) = _bounds(x), _bounds(y)
    return low < other_high and other_low < high  # both ranges exclude their end


def _bounds(x: Any) -> tuple[int, int]:
    """Return the address of the first byte of a CuPy array, and one past its last."""
    if x.size == 0:
        return 0, 0
    # For each axis, the bytes from its first element to its last one. The number is
    # negative for a reversed axis, whose first element has the highest address.
    spans = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    below = sum(span for span in spans if span < 0)
    above = sum(span for span in spans if span > 0)
    return x.data.ptr + below, x.data.ptr + above + x.itemsize
