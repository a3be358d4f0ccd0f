"""The operations as torch's custom operators: for autograd, and whole to its compiler.

Each returns one tensor more: the settings it ran under, for its backward, which
autograd runs on threads of its own. Settings are read inside the operator, because
`torch.compile` cannot trace a context variable.
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

SNAPSHOTS: list[Snapshot] = list(
    itertools.product(("basic", "optimized"), (False, True), (False, True))
)


def apply(operation: Operation, given: dict[str, Any]) -> Any:
    """Call an operation with its arguments by name; a constant one detaches tensors."""
    given = dict(given)
    if operation.counts:
        name = operation.counts.rstrip("?")
        counts = _split_count(operation.counts, given[name])
        given["counts"], given["max_groups"] = counts
    tensors = [check_array(x, given[x.rstrip("?")]) for x in operation.arrays]
    if not operation.inputs:
        tensors = [None if x is None else x.detach() for x in tensors]
    options = [_option(x, given[x.split()[-1]]) for x in operation.options]
    if operation.counts:
        options.append(given["max_groups"])
    *results, _ = getattr(torch.ops.qm_cupy, operation.name)(*tensors, *options)
    return tuple(results) if operation.results > 1 else results[0]


def masked_copy(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy, in float32 at least, that is 0 where a mask is False."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.clone() if mask is None else wide * mask


def _split_count(declared: str, count: Any) -> tuple[Tensor | None, Any]:
    """Return an array of one count for each sequence, or None, and the largest count.

    To read a tensor waits for a GPU, and may divide the graph of a compiler.
    """
    name = declared.rstrip("?")
    if count is None and name != declared:
        return None, None
    if isinstance(count, Tensor) and count.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {count.dtype}")
    if isinstance(count, Tensor) and name != declared:
        return count, None
    if isinstance(count, Tensor) and count.ndim == 0:
        return None, int(count)
    if isinstance(count, int | torch.SymInt) or getattr(count, "ndim", 0) == 0:
        number = (
            count if isinstance(count, torch.SymInt) else plain_integer(name, count)
        )
        if isinstance(number, int) and number < 1:
            raise ValueError(f"`{name}` must lie in 1.., got {number}")
        return None, number
    counts = torch.as_tensor(count)
    if counts.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {counts.dtype}")
    return counts, int(counts.max()) if counts.numel() else 0


def check_array(declared: str, x: Any) -> Tensor | None:
    """Return a tensor, or None where "?" allows it, and refuse all else."""
    name = declared.rstrip("?")
    if isinstance(x, Tensor) or (x is None and name != declared):
        return x
    raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")


def _option(declared: str, value: Any) -> Any:
    """Return an option as torch's schemas take it."""
    if not declared.startswith("uint64") or value is None:
        return check_option(declared, value)
    seed = plain_integer(declared.split()[-1], value)
    if not 0 <= seed < 2**64:
        check_seed(seed)  # raises
    return seed - 2**64 if seed >= 2**63 else seed


def _register(operation: Operation) -> None:
    given = [f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in operation.arrays]
    given += [x.replace("uint64", "int") for x in operation.typed_options]
    results = ", ".join(["Tensor"] * (operation.results + 1))
    forward = torch.library.custom_op(
        f"qm_cupy::{operation.name}",
        functools.partial(_forward, operation),
        mutates_args=(),
        schema=f"({', '.join(given)}) -> ({results})",
    )
    forward.register_fake(functools.partial(_fake, operation))
    if not operation.inputs:
        return
    gradients = [f"Tensor gradient_{i}" for i in range(operation.results)]
    vjp = torch.library.custom_op(
        f"qm_cupy::{operation.name}_vjp",
        functools.partial(_vjp, operation),
        mutates_args=(),
        schema=f"({', '.join(gradients)}, Tensor settings, {', '.join(given)}, "
        "bool[] wanted) -> Tensor[]",
    )
    vjp.register_fake(functools.partial(_fake_vjp, operation))
    vjp.register_autograd(functools.partial(_refuse, operation))
    forward.register_autograd(
        functools.partial(_backward, operation),
        setup_context=functools.partial(_save, operation),
    )


def _forward(operation: Operation, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = operation.run(*_public(operation, arguments))
    results = result if isinstance(result, tuple) else (result,)
    return *results, torch.tensor(SNAPSHOTS.index(snapshot()))


def _vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Return the gradients to the inputs for which the last argument is True."""
    gradients, (settings, *given, wanted) = (
        arguments[: operation.results],
        arguments[operation.results :],
    )
    with torch.no_grad(), restored(SNAPSHOTS[int(settings)]):
        results = operation.run_vjp(gradients, *_public(operation, given))
    inputs = given[: len(operation.inputs)]
    return [
        gradient.to(x.dtype)
        for gradient, x, want in zip(results, inputs, wanted, strict=True)
        if want
    ]


def _public(operation: Operation, arguments: Any) -> list[Any]:
    """Return an operator's arguments as the public function takes them."""
    given = list(arguments)
    for i, option in enumerate(operation.typed_options, len(operation.arrays)):
        if option.startswith("uint64") and given[i] is not None:
            given[i] %= 2**64
    return given


def _fake(operation: Operation, *arguments: Any) -> tuple[Tensor, ...]:
    """Return tensors of the results' shapes and dtypes, and nothing in them."""
    arrays = arguments[: len(operation.arrays)]
    first = next(x for x in arrays if x is not None)
    dtype = torch.int32
    if operation.dtype != "int32":
        dtypes = [x.dtype for x in arguments[: len(operation.inputs)] if x is not None]
        dtype = operation.result_dtype(dtypes, torch.float32, torch.float64)
    shapes = operation.shapes(*arguments)
    results = [first.new_empty(shape, dtype=dtype) for shape in shapes]
    return *results, torch.empty((), dtype=torch.int64)


def _fake_vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    *given, wanted = arguments[operation.results + 1 :]
    inputs = zip(given[: len(operation.inputs)], wanted, strict=True)
    plain = torch.contiguous_format
    return [torch.empty_like(x, memory_format=plain) for x, want in inputs if want]


def _save(operation: Operation, ctx: Any, inputs: Any, output: Any) -> None:
    arrays = len(operation.arrays)
    ctx.save_for_backward(output[-1], *inputs[:arrays])
    ctx.options = inputs[arrays:]


def _backward(
    operation: Operation, ctx: Any, *gradients: Any
) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[: len(operation.inputs)])
    vjp = getattr(torch.ops.qm_cupy, f"{operation.name}_vjp")
    found = iter(vjp(*gradients[:-1], *ctx.saved_tensors, *ctx.options, wanted))
    inputs = tuple(next(found) if want else None for want in wanted)
    rest = len(operation.arrays) - len(inputs) + len(ctx.options)
    return inputs + (None,) * rest


def _refuse(operation: Operation, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        f"`{operation.name}` can be differentiated once: its gradient has no gradient"
    )


for _operation in OPERATIONS.values():
    _register(_operation)
for _function in KNOWN_WHILE_TRACING:
    torch.compiler.assume_constant_result(_function)
