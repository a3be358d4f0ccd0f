"""The operations as custom operators of torch, for autograd and `torch.compile`.

To the compiler each operator is one opaque node. Each operator returns one more tensor:
the number of the settings it ran under. autograd saves this number and runs the
backward under the same settings, in threads that would otherwise have the defaults.
Settings are read inside the operator, because `torch.compile` cannot trace a context
variable.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from ..arrays.checks import check_seed
from ..settings import Snapshot, restored, snapshot
from .operations import (
    KNOWN_WHILE_TRACING,
    OPERATIONS,
    Operation,
    check_option,
    plain_integer,
)

# All values of the three settings. A tensor can carry the index of a snapshot.
SNAPSHOTS: list[Snapshot] = list(
    itertools.product(("basic", "optimized"), (False, True), (False, True))
)


def apply(operation: Operation, arguments: dict[str, Any]) -> Any:
    """Call an operation with its arguments by name.

    `torch.compile` traces through this function up to the operator.
    """
    arguments = dict(arguments)
    if operation.counts:
        name = operation.counts.rstrip("?")
        counts = _split_count(operation.counts, arguments[name])
        arguments["counts"], arguments["max_groups"] = counts
    tensors = [check_array(x, arguments[x.rstrip("?")]) for x in operation.arrays]
    if not operation.inputs:  # no gradient, as for labels: the result is a constant
        tensors = [None if x is None else x.detach() for x in tensors]
    options = [_option(x, arguments[x.split()[-1]]) for x in operation.options]
    if operation.counts:
        options.append(arguments["max_groups"])
    # The last result is the index of the settings; only the backward reads it.
    *results, _ = getattr(torch.ops.qm_cupy, operation.name)(*tensors, *options)
    return tuple(results) if operation.results > 1 else results[0]


def masked_copy(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy in float32 or float64 that is 0 where a mask is False."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # no copy of float32
    return wide.clone() if mask is None else wide * mask


def _split_count(declared: str, count: Any) -> tuple[Tensor | None, Any]:
    """Return one count per sequence, or None, and the largest count.

    Shapes need the values of the counts. To read them from a tensor waits for the GPU
    and may break the compiler's graph.
    """
    name = declared.rstrip("?")
    if count is None and name != declared:
        return None, None
    if isinstance(count, Tensor) and count.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {count.dtype}")
    if isinstance(count, Tensor) and name != declared:
        return count, None  # no shape depends on it, so its values are not read
    if isinstance(count, Tensor) and count.ndim == 0:
        return None, int(count)
    if isinstance(count, int | torch.SymInt) or getattr(count, "ndim", 0) == 0:
        number = (
            count if isinstance(count, torch.SymInt) else plain_integer(name, count)
        )
        # A SymInt has no value while the compiler traces; the operation checks it.
        if isinstance(number, int) and number < 1:
            raise ValueError(f"`{name}` must lie in 1.., got {number}")
        return None, number
    counts = torch.as_tensor(count)  # (B,)
    if counts.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {counts.dtype}")
    return counts, int(counts.max()) if counts.numel() else 0


def check_array(declared: str, x: Any) -> Tensor | None:
    """Return a tensor, or None if "?" allows it; raise for everything else."""
    name = declared.rstrip("?")
    if isinstance(x, Tensor) or (x is None and name != declared):
        return x
    raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")


def _option(declared: str, value: Any) -> Any:
    """Return an option as a value of its type in the torch schema."""
    if not declared.startswith("uint64") or value is None:
        return check_option(declared, value)
    seed = plain_integer(declared.split()[-1], value)
    if not 0 <= seed < 2**64:
        check_seed(seed)  # raises
    # torch has signed integers only: the same 64 bits, which `_public` reverses.
    return seed - 2**64 if seed >= 2**63 else seed


def _register(operation: Operation) -> None:
    """Register an operation, and its gradient if it has one, as torch operators."""
    parameters = [
        f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in operation.arrays
    ]
    parameters += [x.replace("uint64", "int") for x in operation.typed_options]
    results = ", ".join(["Tensor"] * (operation.results + 1))  # and the settings
    forward = torch.library.custom_op(
        f"qm_cupy::{operation.name}",
        functools.partial(_forward, operation),
        mutates_args=(),
        schema=f"({', '.join(parameters)}) -> ({results})",
    )
    # The fake version gives shapes and dtypes, so that a compiler need not run it.
    forward.register_fake(functools.partial(_fake, operation))
    if not operation.inputs:
        return
    # The gradient is an operator too, so that a compiled backward contains it whole.
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
    with torch.no_grad():  # or the function would be dispatched here again
        result = operation.run(*_public(operation, arguments))
    results = result if isinstance(result, tuple) else (result,)
    return *results, torch.tensor(SNAPSHOTS.index(snapshot()))


def _vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Return the gradients of the inputs for which the last argument is True."""
    gradients, (settings, *values, wanted) = (
        arguments[: operation.results],
        arguments[operation.results :],
    )
    # The settings of the forward: this thread of autograd has the defaults.
    with torch.no_grad(), restored(SNAPSHOTS[int(settings)]):
        results = operation.run_vjp(gradients, *_public(operation, values))
    inputs = values[: len(operation.inputs)]
    # torch requires the dtype of the input; products may compute in float32.
    return [
        gradient.to(x.dtype)
        for gradient, x, want in zip(results, inputs, wanted, strict=True)
        if want
    ]


def _public(operation: Operation, arguments: Any) -> list[Any]:
    """Convert an operator's arguments to those of the public function."""
    values = list(arguments)
    for i, option in enumerate(operation.typed_options, len(operation.arrays)):
        if option.startswith("uint64") and values[i] is not None:
            values[i] %= 2**64  # signed back to unsigned
    return values


def _fake(operation: Operation, *arguments: Any) -> tuple[Tensor, ...]:
    """Return uninitialised tensors with the shapes and dtypes of the results."""
    arrays = arguments[: len(operation.arrays)]
    first = next(x for x in arrays if x is not None)
    dtype = torch.int32
    if operation.dtype != "int32":
        dtypes = [x.dtype for x in arguments[: len(operation.inputs)] if x is not None]
        dtype = operation.result_dtype(dtypes, torch.float32, torch.float64)
    shapes = operation.shapes(*arguments)  # may contain SymInt
    results = [first.new_empty(shape, dtype=dtype) for shape in shapes]
    return *results, torch.empty((), dtype=torch.int64)


def _fake_vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Return uninitialised tensors with the shapes and dtypes of the gradients."""
    *values, wanted = arguments[operation.results + 1 :]  # after the settings
    inputs = zip(values[: len(operation.inputs)], wanted, strict=True)
    # Products return C-contiguous arrays, also for inputs with other strides.
    plain = torch.contiguous_format
    return [torch.empty_like(x, memory_format=plain) for x, want in inputs if want]


def _save(operation: Operation, ctx: Any, inputs: Any, output: Any) -> None:
    """Keep the settings, the arrays and the options for the backward.

    Results are not kept: a product computes the forward values again.
    """
    arrays = len(operation.arrays)
    ctx.save_for_backward(output[-1], *inputs[:arrays])
    ctx.options = inputs[arrays:]


def _backward(
    operation: Operation, ctx: Any, *gradients: Any
) -> tuple[Tensor | None, ...]:
    """Return one gradient, or None, for each argument of the operator."""
    wanted = list(ctx.needs_input_grad[: len(operation.inputs)])
    vjp = getattr(torch.ops.qm_cupy, f"{operation.name}_vjp")
    # The last gradient belongs to the settings, which are integers.
    results = iter(vjp(*gradients[:-1], *ctx.saved_tensors, *ctx.options, wanted))
    inputs = tuple(next(results) if want else None for want in wanted)
    rest = len(operation.arrays) - len(inputs) + len(ctx.options)
    return inputs + (None,) * rest


def _refuse(operation: Operation, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        f"`{operation.name}` can be differentiated once: its gradient has no gradient"
    )


# All pages are imported by now, so the table is complete.
for _operation in OPERATIONS.values():
    _register(_operation)
for _function in KNOWN_WHILE_TRACING:
    torch.compiler.assume_constant_result(_function)
