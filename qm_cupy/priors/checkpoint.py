"""Weights of priors: read from state dicts, drawn at random, and their shapes.

A prior is a model that predicts a merged token from the tokens before it. It has two
networks: ``forward`` reads the tokens from the left, and ``backward`` from the right.
In the MLP prior, D is the width of a token, and H is the width of the hidden layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_shape, check_values
from ..arrays.conversion import convert_inputs
from ..arrays.dtypes import accumulation_dtype
from ..cuda.device import to_host
from .configuration import MAX_WIDTH, Configuration, shortened
from .mlp import MLP

# Keys of the state dict of torch's `nn.Sequential(Linear, ReLU, Linear)`, and the axes
# of each weight: H and D are the hidden width and the width of a token. Module 1 is the
# ReLU, which has no weights.
_STATE = {"0.weight": "HD", "0.bias": "H", "2.weight": "DH", "2.bias": "D"}


def mlp_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array in a file of an `MLPPrior` with these settings."""
    widths = settings.get("dim"), settings.get("hidden_dim")
    # Settings come from a file, so a width may be any JSON value, and True is an int. 0
    # marks a wrong value.
    dim, hidden_dim = (
        x if type(x) is int and 0 < x <= MAX_WIDTH else 0 for x in widths
    )
    # `load_weights` puts the path of the file before the message: "its" is this file.
    if not dim or not hidden_dim or set(settings) != {"dim", "hidden_dim"}:
        raise ValueError(
            "its settings must be `dim` and `hidden_dim`, integers of at least 1 "
            f"(and at most 2**31 - 1), got {shortened(settings)}"
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
    """Return copies of the weights of an MLP's state dict, in float32 or float64.

    `name` is the name of the argument `state`, for error messages.
    """
    if set(state) != set(_STATE):
        raise ValueError(f"`{name}` must have the keys {[*_STATE]}, got {[*state]}")
    _, *arrays = convert_inputs({f"{name}[{key!r}]": state[key] for key in _STATE})
    sizes: dict[str, int] = {}
    weights = []
    for (key, axes), weight in zip(_STATE.items(), arrays, strict=True):
        label = f"{name}[{key!r}]"
        check_values(label, weight, axes)
        # The first weight that has an axis determines its size. Later weights must have
        # the same size.
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
    """Draw the weights of each layer uniformly within ±1/√(number of its inputs)."""

    def draw(inputs: int, *shape: int) -> NDArray[np.float32]:
        bound = inputs**-0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    # A seed gives the same weights only if the order of these draws does not change.
    return MLP(
        draw(dim, hidden_dim, dim),  # (H, D)
        draw(dim, hidden_dim),
        draw(hidden_dim, dim, hidden_dim),  # (D, H)
        draw(hidden_dim, dim),
    )


def transformer_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array in a file of a `TransformerPrior`."""
    names = Configuration._fields
    if set(settings) != set(names):
        raise ValueError(f"its settings must be {names}, got {shortened(settings)}")
    try:
        shapes = Configuration(**settings).checked().shapes()
    # For the caller, a setting of a wrong type is a wrong value of the file.
    except TypeError as error:
        raise ValueError(str(error)) from error
    return {
        f"{direction}.{name}": shape
        for direction in ("forward", "backward")
        for name, shape in shapes.items()
    }


def read_transformer(name: str, state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return copies of the weights of a transformer's state dict, at least float32.

    `name` is the name of the argument `state`, for error messages.
    """
    if not state:
        raise ValueError(f"`{name}` must hold weights, got none")
    labelled = {f"{name}[{key!r}]": weight for key, weight in state.items()}
    _, *arrays = convert_inputs(labelled)
    weights = {}
    # `TransformerPrior` derives the shapes and checks them. Here a weight only needs
    # one or two axes, of any size (X and Y).
    for key, label, weight in zip(state, labelled, arrays, strict=True):
        check_values(label, weight, "X", "XY")
        acc_dtype = accumulation_dtype(weight.dtype)
        weights[key] = np.array(to_host(weight), dtype=acc_dtype, order="C")
    return weights


def random_transformer(
    generator: "np.random.Generator", settings: Configuration
) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of one network.

    The weights and biases of linear maps are uniform within ±1/√(number of inputs),
    learned positions are normal with standard deviation 0.02, and norms have weight 1
    and bias 0.
    """
    shapes, weights = settings.shapes(), {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if "norm" in layer:
            weight = np.full(shape, part == "weight")  # True is 1, False is 0
        elif layer == "positions":
            weight = generator.normal(0, 0.02, shape)
        else:
            bound = shapes[f"{layer}.weight"][1] ** -0.5  # shape (outputs, inputs)
            weight = generator.uniform(-bound, bound, shape)
        weights[name] = weight.astype(np.float32)
    return weights
