"""Dispatch of public functions: traced arrays go to an operator of their framework.

The decision is made once, at the public function. The code below it works on NumPy and
CuPy arrays only and contains no code for frameworks.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from ..arrays.conversion import scope_of
from ..arrays.libraries import library
from .operations import (
    KNOWN_WHILE_TRACING,
    OPERATIONS,
    DtypeRule,
    Operation,
    Shape,
)

# Most arguments have one of these types, which no framework traces.
_NEVER_TRACED = frozenset({np.ndarray, int, float, bool, str, type(None)})

P = ParamSpec("P")
Result = TypeVar("Result")


def tracing_framework(values: Iterable[Any]) -> Literal["torch", "jax"] | None:
    """Return the framework that differentiates or compiles one of the values, or None.

    A torch tensor is traced in two cases: it requires grad while torch records
    gradients, or `torch.compile` or `torch.export` is running. A JAX array is traced if
    it is a tracer. For a tuple, such as a `Merged`, the first element decides.
    """
    # `sys.modules` instead of an import: without the framework no value can be traced.
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for value in values:
        x = value[0] if isinstance(value, tuple) and value else value
        if type(x) in _NEVER_TRACED:
            continue
        if torch is not None and isinstance(x, torch.Tensor):
            # Under `torch.no_grad()` a tensor that requires grad is a plain tensor.
            recorded = x.requires_grad and torch.is_grad_enabled()
            if recorded or torch.compiler.is_compiling():
                return "torch"
        elif jax is not None and isinstance(x, jax.core.Tracer):
            return "jax"
    return None


def operation(
    *,
    inputs: tuple[str, ...] = (),
    constants: tuple[str, ...] = (),
    counts: str = "",
    options: tuple[str, ...] = (),
    dtype: DtypeRule,
    shapes: Callable[..., tuple[Shape, ...]],
    results: int = 1,
    vjp: str = "",
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Declare a public function as an operation that torch and JAX can trace.

    The arguments are the fields of `Operation`. `vjp` is the name of the
    vector–Jacobian product in the function's module; by default ``_vjp`` is added to
    the function's name. If no framework traces an array, the function itself runs on
    the device and stream of its first array, as with `on_callers_stream`.
    """

    def declare(function: Callable[P, Result]) -> Callable[P, Result]:
        name = function.__name__.lstrip("_")  # as in `torch.ops.qm_cupy.<name>`
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        declared = [*inputs, *constants, *([counts] if counts else []), *options]
        # "float temperature", "mass?": the last word without "?" is the parameter.
        known = {x.split()[-1].rstrip("?") for x in declared}
        # A parameter that is not declared would be dropped silently while tracing.
        if known != set(names) - {"out"}:
            raise TypeError(f"`{name}` declares {sorted(known)}, but takes {names}")
        parameter_kinds = [x.kind for x in parameters.values()]
        all_names = frozenset(names)
        num_positional = parameter_kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # Read once here, not in every call.
        defaults = {
            name: x.default
            for name, x in parameters.items()
            if x.default is not inspect.Parameter.empty
        }

        @functools.wraps(function)
        def dispatched(*args: P.args, **kwargs: P.kwargs) -> Result:
            values = (*args, *kwargs.values())
            framework = tracing_framework(values)
            if framework is None:
                # None if the device and stream are already the current ones.
                scope = scope_of(values)
                if scope is None:
                    return function(*args, **kwargs)
                with scope:
                    return function(*args, **kwargs)
            # Plain dictionaries, because `torch.compile` traces through this code.
            positional = dict(zip(names, args, strict=False))
            arguments = {**defaults, **positional, **kwargs}
            clash = len(args) > num_positional or any(x in positional for x in kwargs)
            if clash or arguments.keys() != all_names:
                # A missing, unknown or repeated argument: Python raises its own error.
                return function(*args, **kwargs)
            _refuse_out(arguments)
            # Imported by the first traced call, so that `import qm_cupy` imports no
            # framework.
            if framework == "torch":
                from .torch_operators import apply
            else:
                from .jax_primitives import apply
            return apply(OPERATIONS[name], arguments)

        def find_vjp() -> Callable[..., Any]:
            # Looked up when it is called: the page defines the product further down.
            return function.__globals__[vjp or f"{name}_vjp"]

        # `dispatched` is the function of the table: inside an operator its arrays are
        # not traced, so it enters their stream and runs the function itself.
        OPERATIONS[name] = Operation(
            name, inputs, constants, counts, options, dtype, shapes, results,
            dispatched, find_vjp,
        )  # fmt: skip
        return _renamed(dispatched, name)

    return declare


def composition(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a public function made of operations in the stream of its first array.

    This is `on_callers_stream`, except for traced arrays: for these each operation
    enters the stream itself.
    """

    @functools.wraps(function)
    def composed(*args: P.args, **kwargs: P.kwargs) -> Result:
        values = (*args, *kwargs.values())
        scope = None if tracing_framework(values) else scope_of(values)
        if scope is None:
            return function(*args, **kwargs)
        with scope:
            return function(*args, **kwargs)

    return _renamed(composed, function.__name__)


def _renamed(wrapper: Any, name: str) -> Any:
    """Give a wrapper its own code object, with the name of its function.

    All wrappers of one decorator otherwise have the same code object. torch's compiler
    counts recompilations for each code object and stops at a limit, so the calls of all
    functions together would reach the limit. Tracebacks also show the function's name.
    """
    wrapper.__code__ = wrapper.__code__.replace(co_name=name)
    return wrapper


def of_framework(arrays: Iterable[Any]) -> bool:
    """Return whether one of the arrays belongs to torch or JAX."""
    return any(library(x).name in ("torch", "jax") for x in arrays)


def beside(example: Any, arrays: Iterable[Any]) -> tuple[Any, ...]:
    """Return arrays, such as NumPy arrays, as constants of the example's framework."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(example, torch.Tensor):
        return tuple(torch.as_tensor(x, device=example.device) for x in arrays)
    return tuple(arrays)  # JAX accepts NumPy arrays as constants


def _refuse_out(arguments: dict[str, Any]) -> None:
    """Raise if `out` is given: the operators are declared to change no argument."""
    if arguments.get("out") is not None:
        raise TypeError(
            "`out` cannot be written while torch or JAX records gradients or compiles: "
            "call the function without `out`"
        )


def known_while_tracing(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let torch's compiler call a function while tracing and keep its result.

    The function must not depend on the values of a tensor.
    """
    KNOWN_WHILE_TRACING.append(function)
    return function
