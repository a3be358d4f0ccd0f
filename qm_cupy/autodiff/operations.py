"""The operator table: what a framework needs to differentiate and trace an operation.

Pages declare their operations with `dispatch.operation`; `torch_operators` and
`jax_primitives` read the table. The arguments of an operation have one order here:
inputs (arrays with a gradient), constants (arrays without one), ``counts``, the
options, and ``max_groups`` last.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..arrays.checks import check_integer, check_number

Shape = tuple[int, ...]
DtypeRule = Literal["int32", "stored", "computed", "widest"]


class Operation(NamedTuple):
    """A public function of arrays, with its gradients, shapes and dtypes."""

    name: str
    inputs: tuple[str, ...]
    """Arrays that receive gradients; "mass?" may be None."""
    constants: tuple[str, ...]
    """Arrays that have no gradient, such as labels and masks."""
    counts: str
    """The parameter that counts groups, or "" if there is none; "hard?" may be None.

    It becomes two arguments: ``counts`` (B,), which is None if all K are equal, and
    ``max_groups``. If the parameter may be None, no shape depends on it. For an array
    of such counts ``max_groups`` is None, so that the values need not be known.
    """
    options: tuple[str, ...]
    """All other parameters with their types. Types are those of a torch schema, such as
    "float? scale", or "uint64?" for a seed, which torch passes as signed 64 bits."""
    dtype: DtypeRule
    """The dtype of the results. "stored" is the dtype of the first input. "computed" is
    float32, or float64 for a float64 first input. "widest" is the same rule for all
    inputs."""
    shapes: Callable[..., tuple[Shape, ...]]
    """Returns the shapes of the results from the arguments, without computing them."""
    results: int
    """The number of arrays that the function returns."""
    function: Callable[..., Any]
    """The public function; it accepts all arguments by name."""
    find_vjp: Callable[[], Callable[..., Any]]
    """Returns the vector–Jacobian product. Its arguments are the gradients of the
    results, then, by name, the arguments of the function that it needs."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of all array arguments, in their order."""
        return self.inputs + self.constants + (("counts?",) if self.counts else ())

    @property
    def typed_options(self) -> tuple[str, ...]:
        """The arguments that are not arrays, in their order, with their types."""
        if not self.counts:
            return self.options
        optional = "?" if self.counts.endswith("?") else ""
        # SymInt: shapes depend on it, and torch may trace with an unknown integer.
        return (*self.options, f"SymInt{optional} max_groups")

    def run(self, *values: Any) -> Any:
        """Call the function with the values of all arguments."""
        return self.function(**self._by_name(values))

    def run_vjp(self, gradients: Sequence[Any], *values: Any) -> tuple[Any, ...]:
        """Return one gradient for each input."""
        if not self.inputs:
            return ()
        vjp = self.find_vjp()
        arguments = self._by_name(values)
        # A product takes only the arguments that it needs.
        known = {
            name: arguments[name]
            for name in self.vjp_arguments(vjp)
            if name in arguments
        }
        result = vjp(*gradients, **known)
        return result if isinstance(result, tuple) else (result,)

    def vjp_arguments(self, vjp: Callable[..., Any]) -> tuple[str, ...]:
        """Return the names of the product's arguments after the gradients.

        Raise if the operation does not have one of them.
        """
        names = _parameters(vjp)[self.results :]  # one gradient for each result
        unknown = set(names) - set(_parameters(self.function))
        if unknown:
            raise TypeError(
                f"`{vjp.__name__}` takes {sorted(unknown)}, but `{self.name}` has no "
                "such parameter"
            )
        return names

    def result_dtype(self, dtypes: Sequence[Any], float32: Any, float64: Any) -> Any:
        """Return the dtype of the results from the dtypes of the inputs.

        It is not called for "int32". `float32` and `float64` are the framework's own.
        """
        if self.dtype == "stored":  # tokens: the dtype that the caller stores
            return dtypes[0]
        # Sums are float32, or float64 if a deciding input is float64.
        deciding = dtypes[:1] if self.dtype == "computed" else dtypes
        return float64 if float64 in deciding else float32

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the public function by their names."""
        declared = (*self.arrays, *self.typed_options)
        names = (argument.split()[-1].rstrip("?") for argument in declared)
        arguments = dict(zip(names, values, strict=True))
        if self.counts:  # `counts` and `max_groups` become one argument again
            counts, max_groups = arguments.pop("counts"), arguments.pop("max_groups")
            name = self.counts.rstrip("?")
            arguments[name] = max_groups if counts is None else counts
        return arguments


@functools.cache  # a backward asks for the same two functions each time
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


OPERATIONS: dict[str, Operation] = {}
"""The operator table: every operation by its name."""

KNOWN_WHILE_TRACING: list[Callable[..., Any]] = []
"""Functions whose result a compiler keeps as a constant: it depends on no tensor."""


# Shape functions, for the field `shapes`. Their arguments have the order of the module.


def like_first(x: Any, *others: Any) -> tuple[Shape, ...]:
    """Return the shape of the first argument."""
    return (tuple(x.shape),)


def without_last_axis(x: Any, *others: Any) -> tuple[Shape, ...]:
    """Return (..., N) for (..., N, D)."""
    return (tuple(x.shape[:-1]),)


def without_two_axes(x: Any, *others: Any) -> tuple[Shape, ...]:
    """Return (...) for (..., N, D)."""
    return (tuple(x.shape[:-2]),)


def groups_of_tokens(x: Any, *others: Any) -> tuple[Shape, ...]:
    """Return (..., K) for (..., N); K is the last argument."""
    return ((*x.shape[:-1], others[-1]),)


def check_option(declared: str, value: Any) -> Any:
    """Return an option as a Python value of the declared type.

    A value that has the type already is not checked again: torch's compiler cannot
    follow the checks.
    """
    option_type, name = declared.split()
    if value is None and option_type.endswith("?"):
        return None
    if option_type == "bool" and not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    if option_type.startswith(("int", "uint64")):
        return plain_integer(name, value)
    if option_type.startswith("float") and type(value) is not float:
        return check_number(name, value, -np.inf, np.inf, "[]")
    if option_type == "str" and not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {type(value).__name__}")
    return value  # the function itself checks its range


def plain_integer(name: str, value: Any) -> int:
    """Return a Python integer; an `int` is not checked again, as in `check_option`."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain else check_integer(name, value)
