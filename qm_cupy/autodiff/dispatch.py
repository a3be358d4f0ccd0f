"""Where arrays come in: those that a framework traces go to its operators."""

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

_NEVER_TRACED = frozenset({np.ndarray, int, float, bool, str, type(None)})

P = ParamSpec("P")
Result = TypeVar("Result")


def tracing_framework(values: Iterable[Any]) -> Literal["torch", "jax"] | None:
    """Return the framework that differentiates or compiles one of the values.

    A torch tensor is traced if it requires grad where gradients are recorded, and any
    tensor while `torch.compile` or `torch.export` traces; of JAX's, tracers are. Of a
    tuple, a `Merged` for example, the first is looked at.
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for value in values:
        x = value[0] if isinstance(value, tuple) and value else value
        if type(x) in _NEVER_TRACED:
            continue
        if torch is not None and isinstance(x, torch.Tensor):
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

    The arguments are the fields of `Operation`. `vjp` names the vector–Jacobian product
    in the function's module; by default it is the function's name with ``_vjp`` added.
    Arrays that no framework traces go to the function itself, which then works on the
    device and in the stream of the first of them, as under `on_callers_stream`.
    """

    def declare(function: Callable[P, Result]) -> Callable[P, Result]:
        name = function.__name__.lstrip("_")
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        declared = [*inputs, *constants, *([counts] if counts else []), *options]
        known = {x.split()[-1].rstrip("?") for x in declared}
        if known != set(names) - {"out"}:
            raise TypeError(f"`{name}` declares {sorted(known)}, but takes {names}")
        kinds = [x.kind for x in parameters.values()]
        every = frozenset(names)
        num_positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
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
                scope = scope_of(values)
                if scope is None:
                    return function(*args, **kwargs)
                with scope:
                    return function(*args, **kwargs)
            placed = dict(zip(names, args, strict=False))
            given = {**defaults, **placed, **kwargs}
            clash = len(args) > num_positional or any(x in placed for x in kwargs)
            if clash or given.keys() != every:
                return function(*args, **kwargs)  # Python says what is wrong
            _refuse_out(given)
            if framework == "torch":
                from .torch_operators import apply
            else:
                from .jax_primitives import apply
            return apply(OPERATIONS[name], given)

        def find_vjp() -> Callable[..., Any]:
            return function.__globals__[vjp or f"{name}_vjp"]

        OPERATIONS[name] = Operation(
            name, inputs, constants, counts, options, dtype, shapes, results,
            dispatched, find_vjp,
        )  # fmt: skip
        return _renamed(dispatched, name)

    return declare


def composition(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a public function made of operations work in the stream of its first array.

    As `on_callers_stream` does; where arrays are traced, the operations do it.
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
    """Give a wrapper code of its own, which tracebacks show by the function's name.

    torch's compiler counts recompilations by code object.
    """
    wrapper.__code__ = wrapper.__code__.replace(co_name=name)
    return wrapper


def of_framework(arrays: Iterable[Any]) -> bool:
    """Whether one of the arrays is torch's or JAX's."""
    return any(library(x).name in ("torch", "jax") for x in arrays)


def beside(example: Any, arrays: Iterable[Any]) -> tuple[Any, ...]:
    """Return arrays, NumPy's among them, as constants of the example's framework."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(example, torch.Tensor):
        return tuple(torch.as_tensor(x, device=example.device) for x in arrays)
    return tuple(arrays)


def _refuse_out(given: dict[str, Any]) -> None:
    if given.get("out") is not None:
        raise TypeError(
            "`out` cannot be written while a framework records gradients or compiles: "
            "call this without it"
        )


def known_while_tracing(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let torch's compiler call a function at once and keep its result."""
    KNOWN_WHILE_TRACING.append(function)
    return function
