"""The operator table: what a framework needs to differentiate and trace an operation.

The module of each operation declares it with `dispatch.operation`. `torch_operators`
and `jax_operators` read the table. In the table, the arguments of an operation have
one order: differentiable arrays, constants (arrays without a gradient), ``counts``, the
options, and ``max_groups`` last.

Axes: there are B sequences of N tokens of width D, with K groups of tokens in a
sequence.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..arrays.checks import check_integer, check_number
from ..arrays.protect import position

Shape = tuple[int, ...]
# How the dtype of a result follows from the arguments; see `Operation.dtype`.
DtypeRule = Literal["int32", "stored", "computed", "widest"]


class Operation(NamedTuple):
    """A public function of arrays, with its gradients, shapes and dtypes."""

    name: str
    differentiable: tuple[str, ...]
    """Arrays that receive gradients. A "?", as in "mass?", means that None is
    allowed."""
    constants: tuple[str, ...]
    """Arrays that have no gradient, such as labels and masks."""
    count_parameter: str
    """The parameter that gives K, such as "num_groups", or "" if there is none.

    It becomes two arguments: ``counts`` (B,), which is None if the caller passed one
    number for all sequences, and ``max_groups``, the largest K. A "?", as in "hard?",
    means that the parameter may be None and that no shape depends on it. Then a torch
    tensor or JAX array of K is passed as ``counts`` without reading its values, and
    ``max_groups`` is None.
    """
    options: tuple[str, ...]
    """All other parameters except `out`, with their types. Types are those of a torch
    schema, such as "float? scale", or "uint64?" for a seed, which torch passes as
    signed 64 bits."""
    dtype: DtypeRule
    """The dtype of the results. "stored" is the dtype of the first differentiable
    array. "computed" is float64 if the first differentiable array is float64, else
    float32. "widest" is float64 if any differentiable array is float64, else
    float32."""
    shapes: Callable[..., tuple[Shape, ...]]
    """Returns the shapes of the results from the arguments, without computing them."""
    results: int
    """The number of arrays that the function returns."""
    lists: tuple[str, ...]
    """Array arguments that may also be lists of integers, such as positions."""
    function: Callable[..., Any]
    """The public function; it accepts all arguments by name."""
    find_vjp: Callable[[], Callable[..., Any]]
    """Returns the function that computes the vector–Jacobian product (VJP). The first
    arguments of the VJP are the gradients of the results. The arguments of the
    operation that the VJP needs follow; they are passed by name."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of all array arguments, in their order."""
        return (
            self.differentiable
            + self.constants
            + (("counts?",) if self.count_parameter else ())
        )

    @property
    def options_and_max_groups(self) -> tuple[str, ...]:
        """The arguments that are not arrays, in their order, with their types."""
        if not self.count_parameter:
            return self.options
        # If the parameter may be None, `max_groups` may be None too.
        optional = "?" if self.count_parameter.endswith("?") else ""
        # Shapes depend on `max_groups`. With the type SymInt, torch can trace without
        # its value.
        return (*self.options, f"SymInt{optional} max_groups")

    def array_arguments(
        self, arguments: dict[str, Any], from_list: Callable[[list[Any]], Any]
    ) -> list[tuple[str, Any]]:
        """Return the declared name and the value of each array argument.

        `from_list` makes an array of a list of integers, where a list is allowed.
        """
        pairs = []
        for declared in self.arrays:
            name = declared.rstrip("?")
            x = arguments[name]
            if name in self.lists and isinstance(x, list | tuple | range):
                x = from_list([position(y) for y in x])
            pairs.append((declared, x))
        return pairs

    def run(self, *values: Any) -> Any:
        """Call the function with the values of all arguments."""
        return self.function(**self._by_name(values))

    def run_vjp(self, gradients: Sequence[Any], *values: Any) -> tuple[Any, ...]:
        """Return one gradient for each differentiable array."""
        if not self.differentiable:
            return ()
        vjp = self.find_vjp()
        arguments = self._by_name(values)
        # Pass only the arguments that the VJP has. Here no array is written, so a VJP
        # that has a parameter `out` gets its default.
        needed = {
            name: arguments[name]
            for name in self.vjp_arguments(vjp)
            if name in arguments
        }
        result = vjp(*gradients, **needed)
        return result if isinstance(result, tuple) else (result,)

    def vjp_arguments(self, vjp: Callable[..., Any]) -> tuple[str, ...]:
        """Return the names of the VJP's arguments that follow the gradients.

        Raise if the operation does not have one of them.
        """
        names = _parameters(vjp)[self.results :]  # after one gradient for each result
        unknown = set(names) - set(_parameters(self.function))
        if unknown:
            raise TypeError(
                f"`{vjp.__name__}` takes {sorted(unknown)}, but `{self.name}` has no "
                "such parameter"
            )
        return names

    def result_dtype(self, dtypes: Sequence[Any], float32: Any, float64: Any) -> Any:
        """Return the dtype of the results from the dtypes of the differentiable arrays.

        Do not call it for the rule "int32". `float32` and `float64` are the dtypes
        with these names of NumPy or torch.
        """
        if self.dtype == "stored":  # for tokens: the dtype of the caller's tokens
            return dtypes[0]
        # The rule is "computed", which the first array decides, or "widest".
        deciding = dtypes[:1] if self.dtype == "computed" else dtypes
        return float64 if float64 in deciding else float32

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the public function by their names."""
        # "float? scale" and "mass?" become "scale" and "mass".
        declared = (*self.arrays, *self.options_and_max_groups)
        names = (argument.split()[-1].rstrip("?") for argument in declared)
        arguments = dict(zip(names, values, strict=True))
        if self.count_parameter:  # join `counts` and `max_groups` again
            counts, max_groups = arguments.pop("counts"), arguments.pop("max_groups")
            name = self.count_parameter.rstrip("?")
            arguments[name] = max_groups if counts is None else counts
        return arguments


# Cached, because every backward pass needs the parameters of a VJP and its operation.
@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


OPERATIONS: dict[str, Operation] = {}
"""The operator table: every operation by its name."""

KNOWN_WHILE_TRACING: list[Callable[..., Any]] = []
"""Functions that torch's compiler calls while it traces.

Their results do not depend on the values of a tensor, so the compiler keeps them as
constants.
"""


# Functions for the field `shapes`. Their arguments have the order of the table. Here
# (...) stands for any leading axes.


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
    """Return (..., K) for (..., N); K is the last argument, ``max_groups``."""
    return ((*x.shape[:-1], others[-1]),)


def check_option(declared: str, value: Any) -> Any:
    """Return an option as a Python value of the declared type.

    A value that already has the type is not checked further, because torch's compiler
    cannot trace the checks.
    """
    option_type, name = declared.split()  # "float? scale": "float?" and "scale"
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
    return value  # the operation checks its range


def plain_integer(name: str, value: Any) -> int:
    """Return a Python integer; an `int` is not checked, as in `check_option`."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain else check_integer(name, value)
