import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arrays.checks import check_seed
from .operations import OPERATIONS, Operation, check_option, integer


def apply(name: str, *arguments: Any) -> Any:
    """Call an operation with all its arguments, in their order."""
    operation = OPERATIONS[name]
    arrays = operation.inputs + operation.constants
    tensors = map(check_tensor, arrays, arguments)
    options = map(check_option, operation.options, arguments[len(arrays) :])
    return getattr(torch.ops.qm_cupy, name)(*tensors, *options)


def apply_constant(name: str, *arguments: Any) -> Any:
    """Call an operation whose result has no gradient, whatever its arguments have."""
    return apply(name, *(x.detach() if isinstance(x, Tensor) else x for x in arguments))


def counts_of(name: str, count: Any) -> tuple[Tensor | None, int]:
    """Return an array of one count for each sequence, or None, and the largest count.

    To see what is in a tensor waits for a GPU, and divides the graph of a compiler.
    """
    if isinstance(count, int) or getattr(count, "ndim", 0) == 0:
        return None, integer(name, count)
    counts = torch.as_tensor(count)
    if counts.is_floating_point():
        raise TypeError(f"`{name}` must be integers, got {counts.dtype}")
    return counts, int(counts.max()) if counts.numel() else 0


def optional_counts(name: str, count: Any) -> tuple[Tensor | None, int | None]:
    """Return as `counts_of`, or twice None."""
    return (None, None) if count is None else counts_of(name, count)


def signed(seed: Any) -> int | None:
    """Return a seed as 64 bits with a sign, which is what torch's integers are."""
    if seed is None:
        return None
    value = integer("seed", seed)
    if not 0 <= value < 2**64:
        check_seed(value)  # which raises
    return value - 2**64 if value >= 2**63 else value


def fresh(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy, in float32 at least, that is 0 where a mask is False."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.clone() if mask is None else wide * mask


def check_tensor(declared: str, x: Any) -> Any:
    """Return a tensor, or None where "?" allows it, and refuse all else."""
    name = declared.rstrip("?")
    if isinstance(x, Tensor) or (x is None and name != declared):
        return x
    raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")


def _register(name: str, operation: Operation) -> None:
    arrays = operation.inputs + operation.constants
    given = [f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in arrays]
    given += operation.options
    gradients = [f"gradient_{i}" for i in range(operation.results)]
    results = ", ".join(["Tensor"] * operation.results)
    forward = torch.library.custom_op(
        f"qm_cupy::{name}",
        functools.partial(_forward, operation),
        mutates_args=(),
        schema=f"({', '.join(given)}) -> ({results})",
    )
    forward.register_fake(functools.partial(_fake, operation))
    if not operation.inputs:
        return
    taken = [*(f"Tensor {gradient}" for gradient in gradients), *given]
    vjp = torch.library.custom_op(
        f"qm_cupy::{name}_vjp",
        functools.partial(_vjp, operation),
        mutates_args=(),
        schema=f"({', '.join(taken)}, bool[] wanted) -> Tensor[]",
    )
    vjp.register_fake(functools.partial(_fake_vjp, operation))
    vjp.register_autograd(functools.partial(_refuse, name))
    forward.register_autograd(
        functools.partial(_backward, operation, vjp),
        setup_context=functools.partial(_save, operation),
    )


def _forward(operation: Operation, *arguments: Any) -> Any:
    with torch.no_grad():
        return operation.forward(*arguments)


def _vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    """Return the gradients to the inputs for which the last argument is True."""
    *given, wanted = arguments
    with torch.no_grad():
        found = operation.vjp(*given)
    inputs = _inputs(operation, given)
    return [
        gradient.to(x.dtype)
        for gradient, x, want in zip(found, inputs, wanted, strict=True)
        if want
    ]


def _inputs(operation: Operation, given: list[Any]) -> list[Any]:
    return given[operation.results :][: len(operation.inputs)]


def _fake(operation: Operation, *arguments: Any) -> Any:
    """Return tensors of the results' shapes and dtypes, and nothing in them."""
    arrays = arguments[: len(operation.inputs + operation.constants)]
    first = next(x for x in arrays if x is not None)
    dtype = torch.int32
    if operation.dtype == "stored":
        dtype = first.dtype
    elif operation.dtype != "int32":
        deciding = 1 if operation.dtype == "computed" else len(operation.inputs)
        kinds = [x.dtype for x in arguments[:deciding]]
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
    shapes = operation.shapes(*arguments)
    found = tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)
    return found if operation.results > 1 else found[0]


def _fake_vjp(operation: Operation, *arguments: Any) -> list[Tensor]:
    *given, wanted = arguments
    inputs = zip(_inputs(operation, given), wanted, strict=True)
    plain = torch.contiguous_format
    return [torch.empty_like(x, memory_format=plain) for x, want in inputs if want]


def _save(operation: Operation, ctx: Any, inputs: Any, output: Any) -> None:
    arrays = len(operation.inputs + operation.constants)
    ctx.save_for_backward(*inputs[:arrays])
    ctx.options = inputs[arrays:]


def _backward(
    operation: Operation, vjp: Callable[..., list[Tensor]], ctx: Any, *gradients: Any
) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[: len(operation.inputs)])
    found = iter(vjp(*gradients, *ctx.saved_tensors, *ctx.options, wanted))
    inputs = tuple(next(found) if want else None for want in wanted)
    return inputs + (None,) * (len(operation.constants) + len(ctx.options))


def _refuse(name: str, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        f"`{name}` can be differentiated once: its gradient has no gradient"
    )


for _name, _operation in OPERATIONS.items():
    _register(_name, _operation)
