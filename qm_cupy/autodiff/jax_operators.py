"""The operations as JAX functions, for `jax.grad`, `jax.jit` and `jax.vmap`.

One function, `_apply`, runs every operation. It is a `custom_vjp`: JAX calls the
operation's own vector–Jacobian product (VJP). Its static arguments are the name of the
operation, the options and the settings at the time of tracing. JAX requires that they
are hashable.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax import numpy as jnp

from ..arrays.checks import (
    check_batch_shape,
    check_integer,
    check_mask,
    wrong_mask_dtype,
)
from ..arrays.protect import (
    check_positions_exist,
    is_positions,
    of_valid_tokens,
    token_positions,
)
from ..settings import Snapshot, restored, snapshot
from .operations import OPERATIONS, Operation, check_option

Arrays = tuple[jax.Array | None, ...]


def apply(operation: Operation, arguments: dict[str, Any]) -> Any:
    """Call an operation with its arguments by name."""
    arguments = dict(arguments)
    if operation.count_parameter:
        name = operation.count_parameter.rstrip("?")
        counts = _split_count(operation.count_parameter, arguments[name])
        arguments["counts"], arguments["max_groups"] = counts
    # Arrays in the order of the table; options as hashable Python values.
    named_arrays = operation.array_arguments(arguments, np.array)
    arrays = tuple(check_array(name, x) for name, x in named_arrays)
    options = tuple(_option(x, arguments[x.split()[-1]]) for x in operation.options)
    if operation.count_parameter:
        options += (arguments["max_groups"],)
    num_differentiable = len(operation.differentiable)
    # JAX may call the library back later, in another Python thread, so pass the
    # settings.
    static = operation.name, options, snapshot()
    return _apply(*static, arrays[:num_differentiable], arrays[num_differentiable:])


def masked_copy(x: Any, mask: jax.Array | None) -> jax.Array:
    """Return an array in float32 or float64 that is 0 where a mask is False.

    Without a mask, an array that already has this dtype is returned itself, because
    JAX arrays are immutable.
    """
    x = jnp.asarray(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Padding may be NaN, and NaN times 0 is NaN.
    return wide if mask is None else jnp.where(mask != 0, wide, 0)


def check_known(name: str, value: Any) -> None:
    """Raise if the value is a tracer."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`{name}` is a JAX tracer, but its value must be known while tracing: for "
            "a number, name the argument in `static_argnames` of jax.jit; for an "
            "array, use a JAX array made outside the traced function"
            f"{', or pass an integer `budget`' if name == 'mask' else ''}"
        )


def _split_count(declared: str, count: Any) -> tuple[jax.Array | None, int | None]:
    """Return the arguments ``counts`` and ``max_groups`` for a count.

    ``counts`` is K of each sequence, or None if the caller passed one number for all
    sequences. ``max_groups`` is the largest K. If the declared name ends in "?", no
    shape depends on K. Then a JAX array is returned as ``counts`` without reading its
    values, and ``max_groups`` is None. If `count` is None, both are None.
    """
    name = declared.rstrip("?")
    if count is None and name != declared:
        return None, None
    if isinstance(count, jax.Array) and name != declared:
        if count.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must be integers, got {count.dtype}")
        return count, None  # the counts may be a tracer, because no shape needs them
    check_known(name, count)  # JAX needs the shapes of results while it traces
    if getattr(count, "ndim", 0) == 0:
        number = check_integer(name, count)
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}")
        return None, number
    counts = np.asarray(count)  # (B,), on the CPU
    if counts.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got {counts.dtype}")
    return jnp.asarray(counts.astype(np.int32)), int(counts.max(initial=0))


def check_array(declared: str, x: Any) -> Any:
    """Return a JAX array; raise otherwise. None is allowed if the name ends in "?"."""
    name = declared.rstrip("?")
    if isinstance(x, jax.Array) or (x is None and name != declared):
        return x
    if isinstance(
        x, np.ndarray | np.generic
    ):  # such as NumPy labels for a traced array
        return jnp.asarray(x)
    raise TypeError(f"`{name}` must be a jax.Array, got {type(x).__name__}")


def host_values(*values: Any) -> list[Any] | None:
    """Return values with NumPy arrays instead of JAX arrays; None for tracers."""
    if any(isinstance(x, jax.core.Tracer) for x in values):
        return None
    return [np.asarray(x) if isinstance(x, jax.Array) else x for x in values]


def full_mask(mask: Any, tokens: Any) -> Any:
    """Return a mask as (B, N): booleans, or integers, which the operations check."""
    shape = tokens.shape[:-1]
    if isinstance(mask, jax.core.Tracer):
        check_batch_shape("mask", mask, shape)
        if mask.dtype.kind not in "biu":
            raise wrong_mask_dtype(mask.dtype)
        return jnp.broadcast_to(mask, shape)
    if mask is None:
        return None
    # Under `jax.jit` the result would be a tracer, although the values are known.
    with jax.ensure_compile_time_eval():
        mask = check_array("mask", mask)
        return jnp.asarray(check_mask(np.asarray(mask), shape))


def protected_tokens(protect: Any, tokens: Any, mask: Any) -> Any:
    """Return protected tokens, as booleans or positions, as booleans (B, N)."""
    shape = tokens.shape[:-1]
    if is_positions(protect):
        check_known("protect", protect)
        known = np.asarray(protect) if hasattr(protect, "dtype") else protect
        positions = token_positions(known, shape[-1])
        if isinstance(mask, jax.core.Tracer):
            return of_valid_tokens(positions, mask != 0)
        valid = np.ones(shape, np.bool_) if mask is None else np.asarray(mask)
        check_positions_exist(positions, valid)
        return jnp.asarray(of_valid_tokens(positions, valid))
    protect = check_array("protect?", protect)
    if protect is None:
        return None
    if protect.dtype != np.bool_:
        raise TypeError(
            f"`protect` must be boolean or have integer positions, got {protect.dtype}"
        )
    check_batch_shape("protect", protect, shape)
    return jnp.broadcast_to(protect, shape)


def _option(declared: str, value: Any) -> Any:
    """Return an option as a Python value, which JAX can hash; raise for a tracer."""
    check_known(declared.split()[-1], value)
    return check_option(declared, value)


# Arguments 0, 1 and 2 are Python values, which JAX does not trace.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(
    name: str,
    options: tuple[Any, ...],
    settings: Snapshot,
    differentiable: Arrays,
    constants: Arrays,
) -> Any:
    """Run an operation on arrays with values, or add a callback for tracers."""
    operation = OPERATIONS[name]

    def run(differentiable: Arrays, constants: Arrays) -> Any:
        with restored(settings):
            return operation.run(*differentiable, *constants, *options)

    results = _results(operation, differentiable, constants, options)
    return _call(run, results, differentiable, constants)


def _forward(
    name: str,
    options: tuple[Any, ...],
    settings: Snapshot,
    differentiable: Arrays,
    constants: Arrays,
) -> tuple[Any, tuple[Arrays, Arrays]]:
    """Return the results, and the arrays that the backward pass needs."""
    result = _apply(name, options, settings, differentiable, constants)
    # Results are not kept, because the VJP computes the forward values again.
    return result, (differentiable, constants)


def _backward(
    name: str,
    options: tuple[Any, ...],
    settings: Snapshot,
    kept: tuple[Arrays, Arrays],
    gradient: Any,
) -> tuple[Arrays, None]:
    """Return the gradients of the differentiable arrays, and None for the constants."""
    if not OPERATIONS[name].differentiable:  # the results are labels or counts
        return (), None
    gradients = gradient if isinstance(gradient, tuple) else (gradient,)
    arrays = tuple(map(jnp.asarray, gradients))  # one for each result
    return _gradients(name, options, settings, arrays, *kept), None


# This function is a `custom_vjp` too. Its rule (`_no_second`) raises a clear error,
# because the library implements no second derivatives.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradients(
    name: str,
    options: tuple[Any, ...],
    settings: Snapshot,
    gradients: tuple[jax.Array, ...],
    differentiable: Arrays,
    constants: Arrays,
) -> Arrays:
    """Run the VJP under the settings of the forward pass."""
    operation = OPERATIONS[name]

    def run(gradients: Arrays, differentiable: Arrays, constants: Arrays) -> Arrays:
        with restored(settings):
            results = operation.run_vjp(
                gradients, *differentiable, *constants, *options
            )
        # JAX requires that a gradient has the dtype of its array, and that it is None
        # for an array that is None.
        pairs = zip(results, differentiable, strict=True)
        return tuple(None if x is None else g.astype(x.dtype) for g, x in pairs)

    # A gradient has the shape and dtype of its array.
    results = jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), differentiable)
    return _call(run, results, gradients, differentiable, constants)


def _no_second(name: str, *arguments: Any) -> Any:
    """Raise an error, because JAX needs a second derivative of the operation."""
    raise NotImplementedError(
        f"`{name}` can be differentiated once: its gradient has no gradient"
    )


_apply.defvjp(_forward, _backward)
_gradients.defvjp(_no_second, _no_second)


def _call(function: Callable[..., Any], results: Any, *arrays: Any) -> Any:
    """Call a function now, or add a callback to JAX's graph if an array is a tracer.

    `results` describes the shapes and dtypes of the results, which JAX needs before the
    callback runs.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        return function(*arrays)

    def on_host(*values: Any) -> Any:
        return function(*jax.tree.map(np.asarray, values))

    # "sequential": `jax.vmap` calls the library once for each index of the mapped axis.
    return jax.pure_callback(on_host, results, *arrays, vmap_method="sequential")


def _results(
    operation: Operation,
    differentiable: tuple[Any, ...],
    constants: Arrays,
    options: tuple[Any, ...],
) -> Any:
    """Return the shapes and dtypes of the results, without computing values."""
    # The rules are in the operator table; torch's fake operators use them too.
    dtype: Any = np.dtype(np.int32)
    if operation.dtype != "int32":
        dtypes = [x.dtype for x in differentiable if x is not None]
        floats = np.dtype(np.float32), np.dtype(np.float64)
        dtype = operation.result_dtype(dtypes, *floats)
    shapes = operation.shapes(*differentiable, *constants, *options)
    results = tuple(ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return results if operation.results > 1 else results[0]
