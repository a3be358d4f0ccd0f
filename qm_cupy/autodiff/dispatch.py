"""Dispatch of public functions: traced arrays go to an operator of their framework.

A framework (torch or JAX) traces an array if it records or compiles the operations on
it. Each operation decides once, in the wrapper of its public function, and then works
on NumPy and CuPy arrays only. A public function that calls operations, such as
`quickmerge`, decides too: with traced arrays it calls the public operations.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
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

# No framework traces values of these types, which most arguments have.
_NEVER_TRACED = frozenset({np.ndarray, int, float, bool, str, type(None)})

P = ParamSpec("P")
Result = TypeVar("Result")


def tracing_framework(values: Iterable[Any]) -> Literal["torch", "jax"] | None:
    """Return the framework that differentiates or compiles one of the values, or None.

    A torch tensor is traced in two cases: it requires grad while torch records
    gradients, or `torch.compile` or `torch.export` is running. A JAX array is traced if
    it is a tracer. For a tuple of layers, one layer is enough; for a named tuple, such
    as a `Merged`, the first element decides.
    """
    # A framework that is not imported cannot trace a value, so do not import it.
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for x in _elements(values):
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


def _elements(values: Iterable[Any]) -> Iterator[Any]:
    """Yield all values; of a tuple its elements, of a named tuple the first one."""
    for x in values:
        if type(x) is tuple:
            yield from x
        else:
            yield x[0] if isinstance(x, tuple) and x else x


def modules_of(framework: Literal["torch", "jax"]) -> tuple[Any, Any]:
    """Return the namespace of a framework, and the module of its operators."""
    # Import them here, so that `import qm_cupy` does not import a framework.
    xp: Any
    operators: Any
    if framework == "torch":
        import torch as xp

        from . import torch_operators as operators
    else:
        from jax import numpy as xp

        from . import jax_operators as operators
    return xp, operators


def operation(
    *,
    differentiable: tuple[str, ...] = (),
    constants: tuple[str, ...] = (),
    count_parameter: str = "",
    options: tuple[str, ...] = (),
    dtype: DtypeRule,
    shapes: Callable[..., tuple[Shape, ...]],
    results: int = 1,
    lists: tuple[str, ...] = (),
    vjp: str = "",
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Declare a public function as an operation that torch and JAX can trace.

    The arguments are the fields of `Operation`. `vjp` is the name of the function's
    vector–Jacobian product (VJP) in the same module; by default ``_vjp`` is added to
    the function's name. If no framework traces an array, the function itself runs on
    the device and stream of its first array, as with `on_callers_stream`.
    """

    def declare(function: Callable[P, Result]) -> Callable[P, Result]:
        # The operator `torch.ops.qm_cupy.<name>` is public, so its name has no leading
        # underscore, even if the function is private.
        name = function.__name__.lstrip("_")
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        declared = [
            *differentiable,
            *constants,
            *([count_parameter] if count_parameter else []),
            *options,
        ]
        # In "float temperature" or "mass?", the last word without "?" is the parameter.
        declared_names = {x.split()[-1].rstrip("?") for x in declared}
        # A traced call passes only declared parameters. It would silently lose others.
        if declared_names != set(names) - {"out"}:
            raise TypeError(
                f"`{name}` declares {sorted(declared_names)}, but takes {names}"
            )
        parameter_kinds = [x.kind for x in parameters.values()]
        all_names = frozenset(names)
        num_positional = parameter_kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # Read the defaults once, instead of in every call.
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
                # `scope` is None if the device and stream are already the current ones.
                scope = scope_of(values)
                if scope is None:
                    return function(*args, **kwargs)
                with scope:
                    return function(*args, **kwargs)
            # Plain dictionaries, because `torch.compile` traces through this code.
            positional = dict(zip(names, args, strict=False))
            arguments = {**defaults, **positional, **kwargs}
            clash = len(args) > num_positional or any(x in positional for x in kwargs)
            # If an argument is missing, unknown or repeated, call the function: Python
            # then raises its own error.
            if clash or arguments.keys() != all_names:
                return function(*args, **kwargs)
            _refuse_out(arguments)
            # Import the operators in the first traced call, so that `import qm_cupy`
            # does not import a framework.
            if framework == "torch":
                from .torch_operators import apply
            else:
                from .jax_operators import apply
            return apply(OPERATIONS[name], arguments)

        def find_vjp() -> Callable[..., Any]:
            # Look up the VJP only when it is needed: the module defines it below the
            # decorated function, so it does not exist yet here.
            return function.__globals__[vjp or f"{name}_vjp"]

        # The table stores the wrapper `dispatched`, not `function`. An operator calls
        # it with arrays that are not traced, so the wrapper selects the stream of these
        # arrays and then calls `function`.
        OPERATIONS[name] = Operation(
            name, differentiable, constants, count_parameter, options, dtype, shapes,
            results, lists, dispatched, find_vjp,
        )  # fmt: skip
        return renamed(dispatched, name)

    return declare


def on_callers_stream_unless_traced(
    function: Callable[P, Result],
) -> Callable[P, Result]:
    """Run a public function that only calls operations, in its first array's stream.

    This decorator differs from `on_callers_stream` in one case: if a framework traces
    an argument, the decorator selects no stream. Each operation then selects the stream
    when it runs.
    """

    @functools.wraps(function)
    def composed(*args: P.args, **kwargs: P.kwargs) -> Result:
        values = (*args, *kwargs.values())
        scope = None if tracing_framework(values) else scope_of(values)
        if scope is None:
            return function(*args, **kwargs)
        with scope:
            return function(*args, **kwargs)

    return renamed(composed, function.__name__)


def renamed(wrapper: Any, name: str) -> Any:
    """Give a wrapper its own code object, with the name of its function.

    All wrappers of one decorator otherwise have the same code object. torch's compiler
    counts recompilations for each code object and stops at a limit, which the calls of
    all functions together could reach. With its own name, a wrapper is also easy to
    identify in tracebacks.
    """
    wrapper.__code__ = wrapper.__code__.replace(co_name=name)
    return wrapper


def of_framework(arrays: Iterable[Any]) -> bool:
    """Return whether one of the arrays belongs to torch or JAX."""
    return any(library(x).name in ("torch", "jax") for x in arrays)


def as_constants_like(traced: Any, arrays: Iterable[Any]) -> tuple[Any, ...]:
    """Return arrays, such as NumPy arrays, as constants of a traced array's framework.

    For torch they become tensors on the device of `traced`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(traced, torch.Tensor):
        return tuple(torch.as_tensor(x, device=traced.device) for x in arrays)
    return tuple(arrays)  # JAX accepts NumPy arrays as constants


def _refuse_out(arguments: dict[str, Any]) -> None:
    """Raise if `out` is given: the operators are declared to write no argument."""
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
