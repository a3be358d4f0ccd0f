"""What the conversion knows of each array library, of which it imports none.

Arrays of a library that nobody has imported cannot come in: `sys.modules` has it.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CPU = 1, 0  # DLPack's kDLCPU, and the one device of that kind
CUDA = 2  # kDLCUDA


class Library(NamedTuple):
    """How the arrays of one library come in and go out."""

    name: str
    device: Callable[[Any], tuple[int, int]]
    """DLPack's number for the kind of memory, and the device's own."""
    prepare: Callable[[str, Any, bool], Any]
    """Returns what can be exported, or refuses the argument by its name; the last
    argument says whether it will be written."""
    to_numpy: Callable[[str, Any], NDArray[Any]]
    """Exports an array of the CPU's, without a copy."""
    give_back: Callable[[Any, Any], Any]
    """Imports a fresh result, NumPy's or CuPy's, for the giver of an array."""
    scope: Callable[[Any], AbstractContextManager[Any] | None]
    """Makes an array's device, and the stream its library works in, CuPy's own."""


class _Stream(NamedTuple):
    """A stream as the CUDA stream protocol has it."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the protocol's version first


def library(x: Any) -> Library:
    """Return the library of an object that speaks DLPack."""
    kind: type = type(x)
    return _library(kind)


@functools.lru_cache(maxsize=64)
def _library(kind: type) -> Library:
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if issubclass(kind, np.ndarray):
        at_home = _plain_numpy, _view, give_inside, _no_scope
        return Library("numpy", lambda x: CPU, *at_home)
    if torch and issubclass(kind, torch.Tensor):
        ways = _detached, _torch_to_numpy, _to_torch, _torch_scope
        return Library("torch", _torch_device, *ways)
    if jax and issubclass(kind, jax.Array | jax.core.Tracer):
        ways = _concrete, _jax_to_numpy, _to_jax, _device_scope
        return Library("jax", _dlpack_device, *ways)
    name = kind.__module__.split(".")[0]
    back = _to_namesake if hasattr(kind, "__array_namespace__") else give_inside
    ways = (lambda name, x, output: x), _from_dlpack, back, _device_scope
    return Library(name, _dlpack_device, *ways)


def on_host(x: Any) -> bool:
    """Whether a converted array is NumPy's."""
    return isinstance(x, np.ndarray | np.generic)


def give_inside(x: Any, like: Any = None) -> Any:
    """Return a result as NumPy's or CuPy's, C-contiguous; NumPy's (), as a scalar."""
    if not on_host(x):
        return x
    return np.ascontiguousarray(x) if x.ndim else x[()]


def bfloat16(name: str) -> np.dtype[Any]:
    """Return the dtype that NumPy and CuPy know by ml_dtypes alone."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"`{name}` is bfloat16, which takes ml_dtypes: "
            'pip install "qm-cupy[bfloat16]"'
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def stack(arrays: Sequence[Any], axis: int) -> Any:
    """Return arrays of one library, whichever it is, joined along a new axis."""
    first = arrays[0]
    if hasattr(first, "__array_namespace__"):
        return first.__array_namespace__().stack(arrays, axis=axis)
    module = sys.modules[library(first).name]  # CuPy and torch have no namespace
    return module.stack(arrays, axis)


def no_grad(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which torch, if `x` is a tensor of its, keeps no graph."""
    torch = sys.modules.get("torch")
    if torch and isinstance(x, torch.Tensor):
        return torch.no_grad()
    return nullcontext()


def _dlpack_device(x: Any) -> tuple[int, int]:
    kind, number = x.__dlpack_device__()
    return int(kind), int(number)


def _no_scope(x: Any) -> None:
    return None


def _device_scope(x: Any) -> AbstractContextManager[Any] | None:
    """Return a context on the device of `x`, or None where that is the current one."""
    try:
        kind, number = _dlpack_device(x)
        if kind != CUDA:
            return None
        import cupy
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError):
        return None  # the conversion raises a clear error
    if number == cupy.cuda.runtime.getDevice():
        return None
    return cupy.cuda.Device(number)


def _from_dlpack(name: str, x: Any) -> NDArray[Any]:
    return np.from_dlpack(x)


def _to_namesake(x: Any, like: Any) -> Any:
    """Give a result to a library by the array API that it speaks."""
    x = np.asarray(x, order="C") if on_host(x) else x
    return like.__array_namespace__().from_dlpack(x)


def _plain_numpy(name: str, x: Any, output: bool) -> Any:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"`{name}` is a NumPy masked array: pass its data and `mask=`")
    if not x.dtype.isnative and not output:  # an output must not be a copy
        x = x.astype(x.dtype.newbyteorder("="))
    return x


def _view(name: str, x: Any) -> NDArray[Any]:
    return x.view(np.ndarray)


def _torch_device(x: Any) -> tuple[int, int]:
    return CPU if x.device.type == "cpu" else _dlpack_device(x)


def _torch_scope(x: Any) -> AbstractContextManager[Any] | None:
    if x.device.type != "cuda":
        return None
    try:
        import cupy
    except ImportError:
        return None  # the conversion raises a clear error
    stream = sys.modules["torch"].cuda.current_stream(x.device)
    scope = ExitStack()
    scope.enter_context(cupy.cuda.Device(x.device.index))
    theirs = _Stream(stream.cuda_stream)
    scope.enter_context(cupy.cuda.Stream.from_external(theirs))
    return scope


def _detached(name: str, x: Any, output: bool) -> Any:
    torch = sys.modules["torch"]
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise TypeError(
                f"`{name}` requires grad, and this function has no gradient for it: "
                f"give `{name}.detach()`, or call this under `torch.no_grad()`"
            )
        x = x.detach()
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            f"`{name}` has a forward-mode tangent, and gradients here are of reverse "
            "mode only: use `backward` or `torch.autograd.grad`"
        )
    if x.dtype == torch.bfloat16:
        bfloat16(name)
    return x.resolve_neg()  # as of `x.conj().imag`, whose memory has the other sign


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
    if x.dtype.kind == "V":  # bfloat16: no other result is one
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _concrete(name: str, x: Any, output: bool) -> Any:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"`{name}` is a JAX tracer, which has no values yet, and this function "
            "cannot be traced: call it outside of jax.jit, jax.grad and jax.vmap, or "
            "through jax.pure_callback"
        )
    if output:
        raise TypeError(f"`{name}` cannot be written: JAX arrays are immutable")
    return x


def _jax_to_numpy(name: str, x: Any) -> NDArray[Any]:
    return np.asarray(x)  # JAX's own view, which knows bfloat16 and is read-only


def _to_jax(x: Any, like: Any) -> Any:
    jax = sys.modules["jax"]
    wide: AbstractContextManager[Any] = nullcontext()
    if x.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        wide = jax.enable_x64(True)  # or JAX would narrow int64 and float64, silently
    with wide:
        if not on_host(x):
            return jax.numpy.from_dlpack(x)
        found = jax.numpy.asarray(x)  # copies: NumPy aligns to 16 bytes, JAX to 64
        if isinstance(found, jax.core.Tracer):  # of a constant, inside jax.jit
            with jax.ensure_compile_time_eval():
                found = jax.numpy.asarray(x)
        here = found.device == like.device
        return found if here else jax.device_put(found, like.device)


def is_cuda(x: Any) -> bool:
    """Whether a converted array is CuPy's; part of the seam."""
    return hasattr(type(x), "__cuda_array_interface__")


def may_share_memory(x: Any, y: Any) -> bool:
    """Whether the bounds of two CuPy arrays overlap.

    CuPy's own function compares what owns the memory, and views that came in through
    DLPack have an owner each. Addresses do not depend on owners.
    """
    (low, high), (other_low, other_high) = _bounds(x), _bounds(y)
    return low < other_high and other_low < high


def _bounds(x: Any) -> tuple[int, int]:
    """Return the addresses of the first byte of a CuPy array and of the one after."""
    if x.size == 0:
        return 0, 0
    steps = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    below = sum(step for step in steps if step < 0)
    above = sum(step for step in steps if step > 0)
    return x.data.ptr + below, x.data.ptr + above + x.itemsize
