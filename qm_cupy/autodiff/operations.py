"""What a framework must know of an operation to differentiate and to trace it.

Pages declare their operations with `dispatch.operation`; `torch_operators` and
`jax_primitives` read the table. An operation's arguments have one order here: arrays
that gradients go to, arrays that are constants, ``counts`` and the options, with
``max_groups`` last.
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
    """A public function of arrays, and how gradients pass it."""

    name: str
    inputs: tuple[str, ...]
    """Arrays that gradients go to; "mass?" may be None."""
    constants: tuple[str, ...]
    """Arrays that have no gradient."""
    counts: str
    """The parameter that counts groups, "" if none does; "hard?" may be None.

    As an argument it is two: ``counts`` (B,), or None if all K are equal, and
    ``max_groups``. No shape depends on a count that may be None: of an array of these,
    ``max_groups`` is None, so that its values need not be known.
    """
    options: tuple[str, ...]
    """With their types: those of a torch schema, such as "float? scale", or "uint64?"
    (a seed, which torch passes as 64 bits with a sign)."""
    dtype: DtypeRule
    """Of the results: "stored" is that of the first input; "computed" is float32, or
    float64 for a float64 first input; "widest" likewise, but of all inputs."""
    shapes: Callable[..., tuple[Shape, ...]]
    """Returns the shapes of the results from the arguments."""
    results: int
    """How many arrays it returns."""
    function: Callable[..., Any]
    """The public function; takes the arguments by name."""
    find_vjp: Callable[[], Callable[..., Any]]
    """Returns its vector–Jacobian product, which takes the results' gradients, then
    those of the function's arguments that it has use for, by name."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of all array arguments, in their order."""
        return self.inputs + self.constants + (("counts?",) if self.counts else ())

    @property
    def typed_options(self) -> tuple[str, ...]:
        """All other arguments, in their order, with their types."""
        if not self.counts:
            return self.options
        optional = "?" if self.counts.endswith("?") else ""
        return (*self.options, f"SymInt{optional} max_groups")

    def run(self, *values: Any) -> Any:
        """Call the function with the values of all arguments."""
        return self.function(**self._by_name(values))

    def run_vjp(self, gradients: Sequence[Any], *values: Any) -> tuple[Any, ...]:
        """Return the gradients of the inputs, one for each."""
        if not self.inputs:
            return ()
        vjp = self.find_vjp()
        given = self._by_name(values)
        known = {name: given[name] for name in self.vjp_arguments(vjp) if name in given}
        result = vjp(*gradients, **known)
        return result if isinstance(result, tuple) else (result,)

    def vjp_arguments(self, vjp: Callable[..., Any]) -> tuple[str, ...]:
        """Return the arguments of the product behind its gradients; refuse others."""
        names = _parameters(vjp)[self.results :]
        unknown = set(names) - set(_parameters(self.function))
        if unknown:
            raise TypeError(
                f"`{vjp.__name__}` takes {sorted(unknown)}, and `{self.name}` does not"
            )
        return names

    def result_dtype(self, dtypes: Sequence[Any], float32: Any, float64: Any) -> Any:
        """Return the dtype of floating results, of the inputs' (not for "int32")."""
        if self.dtype == "stored":
            return dtypes[0]
        deciding = dtypes[:1] if self.dtype == "computed" else dtypes
        return float64 if float64 in deciding else float32

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the public function."""
        declared = (*self.arrays, *self.typed_options)
        names = (argument.split()[-1].rstrip("?") for argument in declared)
        given = dict(zip(names, values, strict=True))
        if self.counts:
            counts, max_groups = given.pop("counts"), given.pop("max_groups")
            name = self.counts.rstrip("?")
            given[name] = max_groups if counts is None else counts
        return given


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


OPERATIONS: dict[str, Operation] = {}
"""The operator table: every operation by its name."""

KNOWN_WHILE_TRACING: list[Callable[..., Any]] = []
"""Functions whose result a compiler takes as a constant: no tensor decides it."""


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
    kind, name = declared.split()
    if value is None and kind.endswith("?"):
        return None
    if kind == "bool" and not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    if kind.startswith(("int", "uint64")):
        return plain_integer(name, value)
    if kind.startswith("float") and type(value) is not float:
        return check_number(name, value, -np.inf, np.inf, "[]")
    if kind == "str" and not isinstance(value, str):
        raise TypeError(f"`{name}` must be a word, got {type(value).__name__}")
    return value


def plain_integer(name: str, value: Any) -> int:
    """Return a Python integer, as `check_option` does."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain else check_integer(name, value)
