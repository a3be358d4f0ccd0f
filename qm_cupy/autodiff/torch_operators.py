"""The operations as custom operators of torch, for autograd and `torch.compile`.

The compiler does not trace into an operator: in a graph, each operator is one node. An
operator also returns the index in `SNAPSHOTS` of the settings that were in force, as
one more tensor. autograd saves this tensor, and the backward pass runs under the same
settings. Without the index, it would run under the settings of its own Python thread,
which may differ: on the CPU this is the thread that calls ``backward``, and for a GPU
it is a thread of autograd, which has the defaults. The operator itself reads the
settings, because `torch.compile` cannot trace a context variable.

The arguments of an operator are in the order of operations.py: the differentiable
arrays first, then constants, counts, options and ``max_groups``. Names in the table are
declarations: "mask?" is an array `mask` that may be None, and "float? scale" is an
option `scale` that is a float or None.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from ..arrays.checks import check_batch_shape, check_seed, wrong_mask_dtype
from ..arrays.protect import (
    check_positions_exist,
    is_positions,
    of_valid_tokens,
    token_positions,
)
from ..settings import Snapshot, restored, snapshot
from .operations import (
    KNOWN_WHILE_TRACING,
    OPERATIONS,
    Operation,
    check_option,
    plain_integer,
)

# All values of `snapshot()`: (kernels, TF32 allowed, inputs checked for NaN and Inf).
# An index into this list is passed as a tensor.
SNAPSHOTS: list[Snapshot] = list(
    itertools.product(("basic", "optimized"), (False, True), (False, True))
)


def apply(operation: Operation, arguments: dict[str, Any]) -> Any:
    """Call an operation with its arguments by name.

    `torch.compile` traces through this function up to the operator.
    """
    arguments = dict(arguments)
    if operation.count_parameter:
        name = operation.count_parameter.rstrip("?")
        counts = _split_count(operation.count_parameter, arguments[name])
        arguments["counts"], arguments["max_groups"] = counts
    arrays = operation.array_arguments(arguments, torch.tensor)
    tensors = [check_array(name, x) for name, x in arrays]
    if not operation.differentiable:
        # The results, such as labels, are constants. Detach the tensors, so that the
        # results do not require grad.
        tensors = [None if x is None else x.detach() for x in tensors]
    options = [_option(x, arguments[x.split()[-1]]) for x in operation.options]
    if operation.count_parameter:
        options.append(arguments["max_groups"])
    # The last result is the index of the settings, which only the backward pass reads.
    *results, _ = getattr(torch.ops.qm_cupy, operation.name)(*tensors, *options)
    return tuple(results) if operation.results > 1 else results[0]


def masked_copy(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy in float32 or float64 that is 0 where a mask is False."""
    # `to` returns `x` itself, not a copy, if `x` already has the dtype. So `clone`
    # makes the copy.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Padding may be NaN, and NaN times 0 is NaN.
    return wide.clone() if mask is None else torch.where(mask != 0, wide, 0)


def _split_count(declared: str, count: Any) -> tuple[Tensor | None, Any]:
    """Split the caller's count into ``counts`` and ``max_groups``.

    ``counts`` holds the number of groups K of each sequence, or is None if the caller
    passed one number for all sequences. ``max_groups`` is the largest K. To compute
    ``max_groups``, the values of a tensor are read: the CPU waits for a tensor on a
    GPU, and the compiler may break its graph. If the declared name ends in "?", no
    shape depends on K. Then a tensor is returned as ``counts`` without reading its
    values, and ``max_groups`` is None.
    """
    name = declared.rstrip("?")
    if count is None and name != declared:
        return None, None
    if isinstance(count, Tensor) and count.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {count.dtype}")
    if isinstance(count, Tensor) and name != declared:
        return count, None  # no shape depends on these counts, so do not read them
    if isinstance(count, Tensor) and count.ndim == 0:
        return None, int(count)
    if isinstance(count, int | torch.SymInt) or getattr(count, "ndim", 0) == 0:
        number = (
            count if isinstance(count, torch.SymInt) else plain_integer(name, count)
        )
        # A SymInt has no value while the compiler traces. The operation checks it
        # later.
        known = isinstance(number, int) and not torch.compiler.is_compiling()
        if known and number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}")
        return None, number
    counts = torch.as_tensor(count)  # (B,)
    if counts.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {counts.dtype}")
    return counts, int(counts.max()) if counts.numel() else 0


def check_array(declared: str, x: Any) -> Tensor | None:
    """Return a tensor; raise otherwise. None is allowed if the name ends in "?"."""
    name = declared.rstrip("?")
    if isinstance(x, Tensor) or (x is None and name != declared):
        return x
    raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")


def host_values(*values: Any) -> list[Any] | None:
    """Return values with NumPy arrays instead of tensors.

    Return None while the compiler traces, because tensors then have no values, and if a
    tensor is on a GPU, because the CPU would have to wait.
    """
    if torch.compiler.is_compiling():
        return None
    host = []
    for x in values:
        if isinstance(x, Tensor):
            if x.device.type != "cpu":
                return None
            x = x.detach()
            x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        host.append(x)
    return host


def full_mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return a mask as (B, N): booleans, or integers, which the operators check."""
    mask = check_array("mask?", mask)
    if mask is None:
        return None
    shape = tuple(tokens.shape[:-1])
    check_batch_shape("mask", mask, shape)
    if mask.is_floating_point() or mask.is_complex():
        raise wrong_mask_dtype(mask.dtype)
    return mask.expand(shape)


def protected_tokens(
    protect: Any, tokens: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Return protected tokens, as booleans or positions, as booleans (B, N)."""
    shape = tuple(tokens.shape[:-1])
    compiling = torch.compiler.is_compiling()
    is_tensor = isinstance(protect, Tensor)
    if is_positions(protect) and not (is_tensor and compiling):
        known = protect.cpu().numpy() if is_tensor else protect
        positions = token_positions(known, shape[-1])
        if mask is not None:
            valid = mask != 0
            if not compiling and mask.device.type == "cpu":
                check_positions_exist(positions, valid.numpy())
            return of_valid_tokens(positions, valid)
        flags = tokens.new_zeros(shape[-1:], dtype=torch.bool)
        for index in positions:
            flags[index] = True
        return flags.expand(shape)
    protect = check_array("protect?", protect)
    if protect is None:
        return None
    if protect.dtype != torch.bool:
        raise TypeError(
            "`protect` must be boolean, or a list of positions, while torch compiles, "
            f"got {protect.dtype}"
        )
    check_batch_shape("protect", protect, shape)
    return protect.expand(shape)


def _option(declared: str, value: Any) -> Any:
    """Return an option as a value of its type in the torch schema."""
    if not declared.startswith("uint64") or value is None:
        return check_option(declared, value)
    seed = plain_integer(declared.split()[-1], value)
    if not 0 <= seed < 2**64:
        check_seed(seed)  # raises
    # A torch schema has signed integers only, so pass the signed integer that has the
    # same 64 bits. `_public_arguments` converts it back.
    return seed - 2**64 if seed >= 2**63 else seed


def _register(operation: Operation) -> None:
    """Register an operation, and its gradient if it has one, as torch operators."""
    parameters = [
        f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in operation.arrays
    ]
    parameters += [x.replace("uint64", "int") for x in operation.options_and_max_groups]
    # One tensor for each result, and one for the index of the settings.
    results = ", ".join(["Tensor"] * (operation.results + 1))
    forward = torch.library.custom_op(
        f"qm_cupy::{operation.name}",
        functools.partial(_forward, operation),
        mutates_args=(),
        schema=f"({', '.join(parameters)}) -> ({results})",
    )
    # The compiler calls the fake version, which returns tensors of the right shape and
    # dtype and computes no values.
    forward.register_fake(functools.partial(_fake, operation))
    if not operation.differentiable:
        return
    # The gradient is an operator too, so that it is one node in the graph of a compiled
    # backward pass. `wanted` says which gradients torch needs.
    gradients = [f"Tensor gradient_{i}" for i in range(operation.results)]
    vjp = torch.library.custom_op(
        f"qm_cupy::{operation.name}_vjp",
        functools.partial(_vjp, operation),
        mutates_args=(),
        schema=f"({', '.join(gradients)}, Tensor settings, {', '.join(parameters)}, "
        "bool[] wanted) -> Tensor[]",
    )
    vjp.register_fake(functools.partial(_fake_vjp, operation))
    vjp.register_autograd(functools.partial(_refuse, operation))
    forward.register_autograd(
        functools.partial(_backward, operation),
        setup_context=functools.partial(_save, operation),
    )


def _forward(operation: Operation, *arguments: Any) -> tuple[Tensor, ...]:
    """Run the public function and append the index of the current settings."""
    with torch.no_grad():  # else the public function would call this operator again
        result = operation.run(*_public_arguments(operation, arguments))
    results = result if isinstance(result, tuple) else (result,)
    return *results, torch.tensor(SNAPSHOTS.index(snapshot()))


def _vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Run the vector–Jacobian product (VJP) of an operation.

    The last argument, `wanted`, has a bool for each differentiable array. Gradients are
    returned where it is True.
    """
    gradients, (settings, *values, wanted) = (
        arguments[: operation.results],
        arguments[operation.results :],
    )
    # Use the settings of the forward pass: the settings of the Python thread in which
    # autograd runs this may differ.
    with torch.no_grad(), restored(SNAPSHOTS[int(settings)]):
        results = operation.run_vjp(gradients, *_public_arguments(operation, values))
    arrays = values[: len(operation.differentiable)]
    # A VJP may return float32 for a narrower array. torch requires the array's dtype.
    return [
        gradient.to(x.dtype)
        for gradient, x, want in zip(results, arrays, wanted, strict=True)
        if want
    ]


def _public_arguments(operation: Operation, arguments: Any) -> list[Any]:
    """Return an operator's arguments for the public function: seeds become unsigned."""
    values = list(arguments)
    for i, option in enumerate(operation.options_and_max_groups, len(operation.arrays)):
        if option.startswith("uint64") and values[i] is not None:
            values[i] %= 2**64  # from signed back to unsigned
    return values


def _fake(operation: Operation, *arguments: Any) -> tuple[Tensor, ...]:
    """Return uninitialised tensors with the shapes and dtypes of the results."""
    arrays = arguments[: len(operation.arrays)]
    first = next(x for x in arrays if x is not None)
    dtype = torch.int32
    if operation.dtype != "int32":
        dtypes = [
            x.dtype for x in arguments[: len(operation.differentiable)] if x is not None
        ]
        dtype = operation.result_dtype(dtypes, torch.float32, torch.float64)
    shapes = operation.shapes(*arguments)  # a size may be a SymInt
    results = [first.new_empty(shape, dtype=dtype) for shape in shapes]
    return *results, torch.empty((), dtype=torch.int64)  # the index of the settings


def _fake_vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Return uninitialised tensors with the shapes and dtypes of the gradients."""
    # The gradients of the results and the index of the settings come first.
    *values, wanted = arguments[operation.results + 1 :]
    pairs = zip(values[: len(operation.differentiable)], wanted, strict=True)
    # A VJP returns a C-contiguous gradient even if the array itself is strided.
    plain = torch.contiguous_format
    return [torch.empty_like(x, memory_format=plain) for x, want in pairs if want]


def _save(operation: Operation, ctx: Any, inputs: Any, output: Any) -> None:
    """Keep the settings, the arrays and the options for the backward pass.

    `inputs` are all arguments of the operator and `output` are its results; torch
    passes them by these names. Of the results only the index of the settings is kept,
    because the VJP computes the others again.
    """
    num_arrays = len(operation.arrays)
    ctx.save_for_backward(output[-1], *inputs[:num_arrays])
    ctx.options = inputs[num_arrays:]


def _backward(
    operation: Operation, ctx: Any, *gradients: Any
) -> tuple[Tensor | None, ...]:
    """Return one gradient, or None, for each argument of the operator."""
    wanted = list(ctx.needs_input_grad[: len(operation.differentiable)])
    vjp = getattr(torch.ops.qm_cupy, f"{operation.name}_vjp")
    # Omit the last gradient: it belongs to the index of the settings, an integer.
    results = iter(vjp(*gradients[:-1], *ctx.saved_tensors, *ctx.options, wanted))
    input_gradients = tuple(next(results) if want else None for want in wanted)
    # The arrays after the differentiable ones (`operation.constants` and `counts`) and
    # the options have no gradient.
    rest = len(operation.arrays) - len(input_gradients) + len(ctx.options)
    return input_gradients + (None,) * rest


def _refuse(operation: Operation, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        f"`{operation.name}` can be differentiated once: its gradient has no gradient"
    )


# This module is first imported when torch records or compiles a call (dispatch.py and
# composition.py). All modules that declare operations are imported by then, so
# `OPERATIONS` is complete.
for _operation in OPERATIONS.values():
    _register(_operation)
# The results of these functions do not depend on the values of tensors. So the compiler
# calls them while it traces, and keeps the results as constants.
for _function in KNOWN_WHILE_TRACING:
    torch.compiler.assume_constant_result(_function)
