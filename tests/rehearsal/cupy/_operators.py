"""Operators and reductions of CuPy's array."""

from typing import Any

import numpy as np

from cupy import _compute


class Operators:
    """The arithmetic of an array. A result is a new array, or `self` in place."""

    __slots__ = ()

    # Reductions.

    def sum(self, axis=None, dtype=None, out=None, keepdims=False) -> Any:
        return self._reduce("sum", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False) -> Any:
        return self._reduce("mean", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis=None, out=None, keepdims=False) -> Any:
        return self._reduce("max", out, axis=axis, keepdims=keepdims)

    def min(self, axis=None, out=None, keepdims=False) -> Any:
        return self._reduce("min", out, axis=axis, keepdims=keepdims)

    def any(self, axis=None, out=None, keepdims=False) -> Any:
        return self._reduce("any", out, axis=axis, keepdims=keepdims)

    def all(self, axis=None, out=None, keepdims=False) -> Any:
        return self._reduce("all", out, axis=axis, keepdims=keepdims)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False) -> Any:
        return self._reduce("argmax", out or dtype, axis=axis, keepdims=keepdims)

    def argmin(self, axis=None, out=None, dtype=None, keepdims=False) -> Any:
        return self._reduce("argmin", out or dtype, axis=axis, keepdims=keepdims)

    def cumsum(self, axis=None, dtype=None, out=None) -> Any:
        return self._reduce("cumsum", out, axis=axis, dtype=dtype)

    def _reduce(self, name: str, out: Any, **options: Any) -> Any:
        if out is not None:
            raise NotImplementedError(f"the stand-in's {name}() has no `out`")
        # These keep the dtype of a bfloat16 array.
        kept = self.dtype if name in ("sum", "mean", "cumsum") else None

        def reduce(x: np.ndarray) -> Any:
            if x.dtype.name != "bfloat16":
                return getattr(np, name)(x, **options)
            result = getattr(np, name)(x.astype(np.float32), **options)
            # CuPy computes sums of bfloat16 in float32 and rounds once.
            short = result.dtype == np.float32 and options.get("dtype") is None
            return result.astype(x.dtype if kept is None else kept) if short else result

        return _compute.compute(reduce, self, order="C")

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> Any:
        if out is not None:
            raise NotImplementedError("the stand-in's clip() has no `out`")
        return _compute.compute(lambda x: np.clip(x, min, max), self)


# Operators by the functions that they call. Comparisons have no reflected methods:
# Python calls the opposite comparison, such as __gt__ for __lt__.
_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "matmul": "matmul",
}
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_UNARY = {"neg": "negative", "abs": "absolute", "invert": "invert"}


def _called(function: str, *, reflected: bool = False, in_place: bool = False) -> Any:
    """Return a method that calls one of CuPy's functions."""

    def method(self: Any, *others: Any) -> Any:
        # Imported here, because `cupy` is not complete when this module is imported.
        import cupy

        args = (*others, self) if reflected else (self, *others)
        options = {"out": self} if in_place else {}
        return getattr(cupy, function)(*args, **options)

    return method


for _name, _function in _OPERATORS.items():
    setattr(Operators, f"__{_name}__", _called(_function))
    setattr(Operators, f"__r{_name}__", _called(_function, reflected=True))
    if _name != "matmul":  # CuPy has no @=
        setattr(Operators, f"__i{_name}__", _called(_function, in_place=True))
for _name, _function in (_COMPARISONS | _UNARY).items():
    setattr(Operators, f"__{_name}__", _called(_function))
