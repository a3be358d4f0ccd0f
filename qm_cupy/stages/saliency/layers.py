"""Tuples of layers, such as models return, where a function has an array of one layer.

The operator table (autodiff/operations.py) has arrays only. So these decorators stand
in front of the dispatch to torch and JAX, and pass it one array at a time.

There are L layers, B sequences of N tokens, and H heads. The layers of a tuple may have
different numbers of heads.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ...arrays.checks import check_is_array
from ...arrays.conversion import convert_inputs, scope_of
from ...arrays.dtypes import narrow
from ...arrays.finite import finite_mean
from ...arrays.shapes import masked_copy, saliency_shape
from ...autodiff.dispatch import modules_of, renamed, tracing_framework

P = ParamSpec("P")
Result = TypeVar("Result")
Layers = Mapping[str, tuple[Any, ...]]  # the layers of each argument


def over_layers(*names: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Call a function once for each layer if the arguments `names` are tuples.

    The results are a tuple of L results. If the function returns a tuple, such as the
    gradients of queries and of keys, there is a tuple of layers for each of them.
    """

    def each_layer(function: Any, arguments: dict[str, Any], layers: Layers) -> Any:
        check_single_layers(layers)
        results = []
        for layer in zip(*layers.values(), strict=True):
            arguments.update(zip(layers, layer, strict=True))
            results.append(function(**arguments))
        return _by_result(results)

    return _with_layers(names, each_layer)


def _by_result(results: list[Any]) -> Any:
    """Return the results of all layers as a tuple, or as one tuple for each result."""
    if not isinstance(results[0], tuple):
        return tuple(results)
    # An argument that is absent has the gradient None in every layer.
    return tuple(
        None if layers[0] is None else layers for layers in zip(*results, strict=True)
    )


def stacked_layers(
    *names: str, gradients: bool = False
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Pass one array (L, B, H, N) to a function if the arguments `names` are tuples.

    If the numbers of heads differ, the array has the means over the heads, and H is 1.
    With `gradients`, the first argument is the gradient of the result, and the results
    are the gradients of the arguments `names`, which become tuples.
    """

    def one_array(function: Any, arguments: dict[str, Any], layers: Layers) -> Any:
        check_alike(layers)
        single = next(iter(layers.values()))[0].ndim == 1
        stacked = {name: _stacked(name, x) for name, x in layers.items()}
        if not gradients:
            result = function(**{**arguments, **stacked})
            return result[0, ...] if single else result
        if single:  # (N,) becomes a batch of one, like the layers
            arguments["gradient"] = arguments["gradient"][None, ...]
        result = function(**{**arguments, **stacked})
        several = result if isinstance(result, tuple) else (result,)
        pairs = zip(several, layers.values(), strict=True)
        by_name = tuple(_unstacked(x, y) for x, y in pairs)
        return by_name if isinstance(result, tuple) else by_name[0]

    return _with_layers(names, one_array)


def _with_layers(
    names: tuple[str, ...], call: Callable[[Any, dict[str, Any], Layers], Any]
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Use `call` instead of a function if the arguments `names` are tuples of layers.

    `call` gets the function, all its arguments by name, and the tuples.
    """

    def declare(function: Callable[P, Result]) -> Callable[P, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def with_layers(*args: P.args, **kwargs: P.kwargs) -> Result:
            if not _has_layers((*args, *kwargs.values())):
                return function(*args, **kwargs)
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            layers = layers_of({x: arguments.get(x) for x in names})
            if not layers:  # another argument is a tuple: the function refuses it
                return function(*args, **kwargs)
            result: Result = call(function, arguments, layers)
            return result

        return renamed(with_layers, function.__name__)

    return declare


def check_single_layers(layers: Layers) -> None:
    """Raise if an array of a tuple has an axis of layers, the fifth axis from the end.

    The arrays are matrices (..., N, N), (..., N, d) or (..., N, D).
    """
    for name, several in layers.items():
        for i, x in enumerate(several):
            if len(x.shape) > 4:
                raise ValueError(
                    f"`{name}[{i}]` must be one layer, with at most 4 axes, got shape "
                    f"{tuple(x.shape)}"
                )


def _has_layers(values: Iterable[Any]) -> bool:
    return any(isinstance(x, tuple | list) for x in values)


def layers_of(arguments: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the arguments that are not None, if they are tuples of layers, or {}.

    Raise if a tuple is not valid, or if only some of the arguments are tuples.
    """
    passed = {name: x for name, x in arguments.items() if x is not None}
    layers = {name: x for name, x in passed.items() if _is_tuple(name, x)}
    if not layers:
        return {}
    first, wanted = next((name, len(x)) for name, x in layers.items())
    for name, x in passed.items():
        if name not in layers:
            raise TypeError(
                f"`{name}` must be a tuple of {wanted} layers like `{first}`, got "
                f"{type(x).__name__}"
            )
        if len(x) != wanted:
            raise ValueError(
                f"`{name}` must have {wanted} layers like `{first}`, got {len(x)}"
            )
    return layers


def _is_tuple(name: str, x: Any) -> bool:
    """Return whether an argument is a tuple of layers; raise if it is not valid."""
    if isinstance(x, list):
        raise TypeError(
            f"`{name}` must be an array or a tuple of layers, got a list: pass "
            f"`tuple({name})`"
        )
    if not isinstance(x, tuple):
        return False
    if not x:
        raise ValueError(f"`{name}` must have at least one layer, got an empty tuple")
    for i, layer in enumerate(x):
        if layer is None:
            raise TypeError(
                f"`{name}[{i}]` must be an array, got None: a model returns its "
                'attention only if it is loaded with `attn_implementation="eager"`'
            )
        check_is_array(f"{name}[{i}]", layer)
    return True


def check_alike(layers: Layers) -> None:
    """Raise unless each layer is (N,), (B, N) or (B, H, N), with one B and one N.

    Layer l must have one shape in all arguments.
    """
    first, reference = next(iter(layers.items()))
    wanted = saliency_shape(tuple(reference[0].shape))  # (N,) or (B, N)
    for name, several in layers.items():
        for i, (x, like) in enumerate(zip(several, reference, strict=True)):
            shape = tuple(x.shape)
            if len(shape) not in (1, 2, 3):
                raise ValueError(
                    f"`{name}[{i}]` must be one layer, of shape (N), (B, N) or "
                    f"(B, H, N), got {shape}"
                )
            if saliency_shape(shape) != wanted:
                axes = "(B, N)" if len(wanted) > 1 else "(N)"
                raise ValueError(
                    f"`{name}[{i}]` must have {axes} = {wanted} like `{first}[0]`, got "
                    f"shape {shape}"
                )
            if shape != tuple(like.shape):
                raise ValueError(
                    f"`{name}[{i}]` must have shape {tuple(like.shape)} like "
                    f"`{first}[{i}]`, got {shape}"
                )


def _stacked(name: str, layers: tuple[Any, ...]) -> Any:
    """Return one array (L, B, H, N) of the caller's library, with its gradients."""
    names = [f"{name}[{i}]" for i in range(len(layers))]
    framework = tracing_framework(layers)
    if framework is not None:
        xp, operators = modules_of(framework)
        layers = tuple(map(operators.check_array, names, layers))
        return stack_layers(layers, xp.stack, operators.masked_copy)
    with scope_of(layers) or nullcontext():
        arrays = dict(zip(names, layers, strict=True))
        convert_back, *converted = convert_inputs(arrays)
        return convert_back(stack_layers(converted, np.stack, masked_copy))


def stack_layers(
    layers: Sequence[Any], stack: Callable[..., Any], copy: Callable[..., Any]
) -> Any:
    """Return (L, B, H, N) of layers that are checked; `copy` is `masked_copy`.

    `stack` and `copy` are functions of the arrays' library.
    """
    lifted = [x[None, None] if x.ndim == 1 else x for x in layers]
    lifted = [x[:, None] if x.ndim == 2 else x for x in lifted]  # (B, H, N)
    if len({x.shape[1] for x in lifted}) > 1:
        # The functions of entropies average the heads first, so their means are enough.
        lifted = [_mean_of_heads(copy(x, None))[:, None] for x in lifted]  # (B, 1, N)
    return stack(lifted, 0)


def _mean_of_heads(x: Any) -> Any:
    """Return the mean (B, N) over the heads of an array (B, H, N) of any library."""
    if isinstance(x, np.ndarray):
        return finite_mean(x, 1)
    # NumPy adds the heads one by one. A mean of torch or JAX would have other bits.
    total = x[:, 0]
    for head in range(1, x.shape[1]):
        total = total + x[:, head]
    return total / x.shape[1]


def _unstacked(gradient: Any, layers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the gradient of each layer from that of their stack, (L, B, H, N)."""
    arrays = {f"layer {i}": x for i, x in enumerate(layers)}
    with scope_of(layers) or nullcontext():
        convert_back, gradient, *converted = convert_inputs(
            {"gradient": gradient, **arrays}
        )
        parts = []
        for x, by_layer in zip(converted, gradient, strict=True):
            heads = x.shape[1] if x.ndim == 3 else 1
            if heads != by_layer.shape[1]:
                # The stack has the mean over the heads. Each head gets 1/H of its
                # gradient.
                by_layer = np.repeat(by_layer / heads, heads, axis=1)
            part = by_layer.reshape(x.shape)
            parts.append(
                convert_back(part if part.dtype == x.dtype else narrow(part, x.dtype))
            )
        return tuple(parts)
