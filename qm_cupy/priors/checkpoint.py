"""Weights of priors: from state dicts, by declared shapes, or drawn at random."""

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

# Keys of the state dict of torch's `nn.Sequential(Linear, ReLU, Linear)`, and the axes
# of each weight. Module 1 is the ReLU, which has no weights.
_STATE = {"0.weight": "HD", "0.bias": "H", "2.weight": "DH", "2.bias": "D"}


def mlp_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays of a file with these settings."""
    widths = settings.get("dim"), settings.get("hidden_dim")
    # Settings come from a file: any JSON value may be here. 0 stands for a wrong one.
    dim, hidden_dim = (x if isinstance(x, int) and x > 0 else 0 for x in widths)
    if not dim or not hidden_dim or set(settings) != {"dim", "hidden_dim"}:
        raise ValueError(
            "its settings must be `dim` and `hidden_dim`, integers of at least 1, "
            f"got {settings}"
        )
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
        raise ValueError(f"`{name}` must have the keys {[*_STATE]}, got {[*state]}")
    _, *arrays = enter({f"{name}[{key!r}]": state[key] for key in _STATE})
    sizes: dict[str, int] = {}
    weights = []
    for (key, axes), weight in zip(_STATE.items(), arrays, strict=True):
        label = f"{name}[{key!r}]"
        check_values(label, weight, axes)
        # The first weight with an axis sets its size; later ones must agree.
        wanted = tuple(
            sizes.setdefault(axis, size)
            for axis, size in zip(axes, weight.shape, strict=True)
        )
        check_shape(label, weight, axes, wanted)
        # A copy, so that later training of the torch module does not change the prior.
        acc_dtype = accumulation_dtype(weight.dtype)
        weights.append(np.array(to_host(weight), dtype=acc_dtype, order="C"))
    return MLP(*weights)


def random_mlp(generator: "np.random.Generator", dim: int, hidden_dim: int) -> MLP:
    """Draw the weights of each layer uniformly within ±1/√(its number of inputs)."""

    def draw(inputs: int, *shape: int) -> NDArray[np.float32]:
        bound = inputs**-0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    # The order of the draws is part of the result of a seed.
    return MLP(
        draw(dim, hidden_dim, dim),  # (H, D)
        draw(dim, hidden_dim),
        draw(hidden_dim, dim, hidden_dim),  # (D, H)
        draw(hidden_dim, dim),
    )


def transformer_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays of a file with these settings."""
    names = Configuration._fields
    if set(settings) != set(names):
        raise ValueError(f"its settings must be {names}, got {settings}")
    try:
        shapes = Configuration(**settings).checked().shapes()
    except TypeError as error:  # a wrong type in a file is a wrong value of the file
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
    # Shapes are not known yet: `TransformerPrior` derives and checks them.
    for key, label, weight in zip(state, labelled, arrays, strict=True):
        check_values(label, weight, "X", "XY")
        acc_dtype = accumulation_dtype(weight.dtype)
        weights[key] = np.array(to_host(weight), dtype=acc_dtype, order="C")
    return weights


def random_transformer(
    generator: "np.random.Generator", settings: Configuration
) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of one network.

    Linear maps are uniform within ±1/√(inputs), learned positions are normal with
    standard deviation 0.02, and norms have weight 1 and bias 0.
    """
    shapes, weights = settings.shapes(), {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if "norm" in layer:
            weight = np.full(shape, part == "weight")  # weight 1, bias 0
        elif layer == "positions":
            weight = generator.normal(0, 0.02, shape)
        else:
            bound = shapes[f"{layer}.weight"][1] ** -0.5  # axis 1 is the inputs
            weight = generator.uniform(-bound, bound, shape)
        weights[name] = weight.astype(np.float32)
    return weights
