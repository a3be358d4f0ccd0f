"""What priors are made of: state dicts, declared shapes, and random networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import enter
from ..arrays.dtypes import accumulation_dtype
from ..cuda.device import to_host
from .configuration import Configuration
from .mlp import MLP

_STATE = {"0.weight": "HD", "0.bias": "H", "2.weight": "DH", "2.bias": "D"}


def mlp_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a file of these settings must hold."""
    widths = settings.get("dim"), settings.get("hidden_dim")
    dim, hidden_dim = (x if isinstance(x, int) and x > 0 else 0 for x in widths)
    if not dim or not hidden_dim or set(settings) != {"dim", "hidden_dim"}:
        raise ValueError(f"`dim` and `hidden_dim` must be at least 1, got {settings}")
    shapes = {
        "weight_in": (hidden_dim, dim),
        "bias_in": (hidden_dim,),
        "weight_out": (dim, hidden_dim),
        "bias_out": (dim,),
    }
    return {
        f"{direction}.{name}": shape
        for direction in ("forward", "backward")
        for name, shape in shapes.items()
    }


def read_mlp(name: str, state: Mapping[str, Any]) -> MLP:
    """Return copies of a state dict's weights, in float32 or float64."""
    if set(state) != set(_STATE):
        raise ValueError(f"`{name}` must hold {[*_STATE]}, got {[*state]}")
    _, *arrays = enter({f"{name}[{key!r}]": state[key] for key in _STATE})
    sizes: dict[str, int] = {}
    weights = []
    for (key, axes), weight in zip(_STATE.items(), arrays, strict=True):
        label = f"{name}[{key!r}]"
        check_values(label, weight, axes)
        wanted = tuple(
            sizes.setdefault(axis, size)
            for axis, size in zip(axes, weight.shape, strict=True)
        )
        check_shape(label, weight, axes, wanted)
        acc_dtype = accumulation_dtype(weight.dtype)
        weights.append(np.array(to_host(weight), dtype=acc_dtype, order="C"))
    return MLP(*weights)


def random_mlp(generator: "np.random.Generator", dim: int, hidden_dim: int) -> MLP:
    """Draw weights uniformly within ±1/√(inputs) of each layer."""

    def draw(inputs: int, *shape: int) -> NDArray[np.float32]:
        bound = inputs**-0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    return MLP(
        draw(dim, hidden_dim, dim),
        draw(dim, hidden_dim),
        draw(hidden_dim, dim, hidden_dim),
        draw(hidden_dim, dim),
    )


def transformer_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a file of these settings must hold."""
    names = Configuration._fields
    if set(settings) != set(names):
        raise ValueError(f"its settings must be {names}, got {settings}")
    try:
        shapes = Configuration(**settings).checked().shapes()
    except TypeError as error:
        raise ValueError(str(error)) from error
    return {
        f"{direction}.{name}": shape
        for direction in ("forward", "backward")
        for name, shape in shapes.items()
    }


def read_transformer(name: str, state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return copies of a state dict's weights, in float32 or float64."""
    if not state:
        raise ValueError(f"`{name}` must hold weights, got none")
    labelled = {f"{name}[{key!r}]": weight for key, weight in state.items()}
    _, *arrays = enter(labelled)
    weights = {}
    for key, label, weight in zip(state, labelled, arrays, strict=True):
        check_values(label, weight, "X", "XY")
        acc_dtype = accumulation_dtype(weight.dtype)
        weights[key] = np.array(to_host(weight), dtype=acc_dtype, order="C")
    return weights


def random_transformer(
    generator: "np.random.Generator", settings: Configuration
) -> dict[str, NDArray[np.float32]]:
    """Draw weights: of linear maps, uniformly within ±1/√(inputs)."""
    shapes, weights = settings.shapes(), {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if "norm" in layer:
            weight = np.full(shape, part == "weight")
        elif layer == "positions":
            weight = generator.normal(0, 0.02, shape)
        else:
            bound = shapes[f"{layer}.weight"][1] ** -0.5
            weight = generator.uniform(-bound, bound, shape)
        weights[name] = weight.astype(np.float32)
    return weights
