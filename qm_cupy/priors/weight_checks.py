"""Checks of the weights of priors, and their conversion to NumPy or CuPy arrays.

A prior is a model that predicts a merged token from the tokens before it. A NaN or Inf
in its weights would make its predictions and losses NaN without an error. NumPy arrays
are checked when a prior is made. Arrays of torch and JAX may be traced, or may change
later, so they are checked whenever they are converted. Arrays on a GPU are not read.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ..arrays.checks import check_finite_values, check_floating, check_shape
from ..arrays.conversion import convert_inputs
from .configuration import Configuration, Weights, shortened
from .mlp import MLP

_LETTERS = "HD", "H", "DH", "D"  # axes of the weights, in the order of the fields
_SHOWN = 3  # names that an error message lists


def check_networks(forward: MLP, backward: MLP) -> None:
    """Raise unless two MLPs have matching shapes and finite weights.

    Both read the same tokens, so they have the same width D. Files of weights store one
    hidden width H, so both networks have the same H.
    """
    named = {"forward": forward, "backward": backward}
    for direction, network in named.items():
        if not isinstance(network, MLP):
            raise TypeError(
                f"`{direction}` must be an MLP, got {type(network).__name__}"
            )
        for field, weight in network._asdict().items():
            _check_is_weight(f"{direction}.{field}", weight)
        shape = tuple(network.weight_in.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"`{direction}.weight_in` must have shape (H, D), got {shape}"
            )
    hidden_dim, dim = tuple(forward.weight_in.shape)
    other_hidden_dim, other_dim = tuple(backward.weight_in.shape)
    for name, width, other in (
        ("width D", dim, other_dim),
        ("hidden width H", hidden_dim, other_hidden_dim),
    ):
        if width != other:
            raise ValueError(
                f"`forward` and `backward` must have the same {name}, "
                f"got {width} and {other}"
            )
    sizes = {"D": dim, "H": hidden_dim}
    for direction, network in named.items():
        for letters, (field, weight) in zip(
            _LETTERS, network._asdict().items(), strict=True
        ):
            wanted = tuple(sizes[letter] for letter in letters)
            check_weight(f"{direction}.{field}", weight, letters, wanted)


def check_weight(name: str, weight: Any, letters: str, wanted: tuple[int, ...]) -> None:
    """Raise if a weight has a wrong shape or, as a NumPy array, a NaN or Inf."""
    _check_is_weight(name, weight)
    check_shape(name, weight, letters, wanted)
    if isinstance(weight, np.ndarray):
        check_floating(name, weight)
        check_finite_values(name, weight)


def _check_is_weight(name: str, weight: Any) -> None:
    if not hasattr(weight, "shape"):
        raise TypeError(f"`{name}` must be an array, got {type(weight).__name__}")


def check_transformer(name: str, weights: Weights, settings: Configuration) -> None:
    """Raise unless a network has exactly the weights of the settings, all finite."""
    shapes = settings.shapes()
    if set(weights) != set(shapes):
        absent, unknown = set(shapes) - set(weights), set(weights) - set(shapes)
        raise ValueError(
            f"`{name}` must hold the weights of {settings.num_layers} blocks: "
            f"missing are {listed(absent)}, unknown are {listed(unknown)}"
        )
    for key, shape in shapes.items():
        check_weight(f"{name}[{key!r}]", weights[key], "XY", shape)


def listed(names: Collection[str]) -> str:
    """Return the first names of a set for an error message, and how many follow."""
    ordered = sorted(names)
    shown = [shortened(name) for name in ordered[:_SHOWN]]
    more = len(ordered) - len(shown)
    return f"[{', '.join(shown)}]" + (f" and {more} more" if more else "")


def converted_weights(named: Mapping[str, Any]) -> list[Any]:
    """Return weights as NumPy or CuPy arrays; raise if one is not finite.

    The keys are the names that error messages use.
    """
    _, *arrays = convert_inputs(named)
    for name, weight in zip(named, arrays, strict=True):
        check_floating(name, weight)
        check_finite_values(name, weight)
    return arrays


def converted_network(direction: str, network: MLP) -> MLP:
    """Return a network with NumPy or CuPy arrays; raise if one is not finite.

    `direction` is "forward" or "backward", for error messages.
    """
    named = {f"{direction}.{name}": w for name, w in network._asdict().items()}
    return MLP(*converted_weights(named))
