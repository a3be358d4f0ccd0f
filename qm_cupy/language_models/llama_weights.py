"""The weights of a Llama model: names, shapes and checks, and reading of state dicts.

A model has V tokens in its vocabulary, the width D, and L layers. A layer has H heads
of queries and H_k heads of keys, all of width d, and an MLP of width M.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_finite_values,
    check_floating,
    check_integer,
    check_number,
    check_shape,
)
from ..arrays.conversion import convert_inputs
from ..arrays.dtypes import accumulation_dtype
from ..cuda.device import to_host
from ..priors.configuration import shortened
from ..priors.weight_checks import listed

Weights = Mapping[str, Any]

EMBEDDING, HEAD, NORM = "embed_tokens.weight", "lm_head.weight", "norm.weight"
# The weights of a layer, without the suffix ".weight", and their axes. E = H d are all
# queries, and F = H_k d are all keys.
PARTS = {
    "input_layernorm": "D",
    "self_attn.q_proj": "ED",
    "self_attn.k_proj": "FD",
    "self_attn.v_proj": "FD",
    "self_attn.o_proj": "DE",
    "post_attention_layernorm": "D",
    "mlp.gate_proj": "MD",
    "mlp.up_proj": "MD",
    "mlp.down_proj": "DM",
}


class Settings(NamedTuple):
    """What determines the network besides the values of its weights."""

    num_tokens: int  # V
    dim: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_key_heads: int  # H_k
    head_dim: int  # d
    mlp_dim: int  # M
    tied: bool  # whether the embedding is the head too
    rope_base: float
    epsilon: float  # ε of the norms

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by its name."""
        sizes = {"D": self.dim, "M": self.mlp_dim, "V": self.num_tokens}
        sizes["E"] = self.num_heads * self.head_dim
        sizes["F"] = self.num_key_heads * self.head_dim
        shapes = {EMBEDDING: "VD", NORM: "D"}
        if not self.tied:
            shapes[HEAD] = "VD"
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{name}.weight": x for name, x in PARTS.items()}
        return {name: tuple(sizes[x] for x in axes) for name, axes in shapes.items()}

    def inv_freq(self) -> NDArray[np.float64]:
        """Return the angles (d / 2,) of the rotation for one position, in radians.

        They are computed in float32, as in the models' training.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32)
        exponent /= np.float32(self.head_dim)
        angles: NDArray[np.float64] = 1 / np.float32(self.rope_base) ** exponent
        return angles.astype(np.float64)


def settings_of(
    weights: Weights,
    num_heads: Any,
    num_key_heads: Any,
    rope_base: Any,
    epsilon: Any,
) -> Settings:
    """Return the settings of weights; raise if names or shapes do not fit."""
    heads = _count("num_heads", num_heads)
    key_heads = _count("num_key_heads", num_key_heads)
    if heads % key_heads:
        raise ValueError(
            f"`num_heads` must be a multiple of `num_key_heads` = {key_heads}, "
            f"got {heads}"
        )
    rope_base = check_number("rope_base", rope_base, 0, np.inf, "()")
    epsilon = check_number("epsilon", epsilon, 0, np.inf, "[)")
    num_tokens, dim = _matrix(weights, EMBEDDING, "(V, D)")
    queries, _ = _matrix(weights, "layers.0.self_attn.q_proj.weight", "(H d, D)")
    mlp_dim, _ = _matrix(weights, "layers.0.mlp.gate_proj.weight", "(M, D)")
    if queries % (2 * heads):
        raise ValueError(
            "the rows of `layers.0.self_attn.q_proj.weight` must be `num_heads` heads "
            f"of an even width, got {queries} rows for {heads} heads"
        )
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    sizes = num_tokens, dim, len(layers), heads, key_heads, queries // heads, mlp_dim
    return Settings(*sizes, HEAD not in weights, rope_base, epsilon)


def check_weights(weights: Weights, settings: Settings) -> None:
    """Raise unless there are exactly the weights of the settings, all finite."""
    shapes = settings.shapes()
    if set(weights) != set(shapes):
        absent, unknown = set(shapes) - set(weights), set(weights) - set(shapes)
        raise ValueError(
            f"`weights` must be those of {settings.num_layers} layers: "
            f"missing are {listed(absent)}, unknown are {listed(unknown)}"
        )
    for name, shape in shapes.items():
        weight = weights[name]
        if not hasattr(weight, "shape"):
            raise TypeError(f"`{name}` must be an array, got {type(weight).__name__}")
        check_shape(name, weight, "XY", shape)
        check_floating(name, weight)
        check_finite_values(name, weight)


def read_state(state: Any) -> dict[str, NDArray[Any]]:
    """Return copies of the weights of a state dict, by names without "model.".

    They are float32, or float64 for float64 weights.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"`state` must be a mapping of names to weights, got {type(state).__name__}"
        )
    named = {}
    for name, weight in state.items():
        short = str(name).removeprefix("model.")
        # Old files have a buffer for the rotation, which follows from `rope_base`.
        if not short.endswith("rotary_emb.inv_freq"):
            named[short] = weight
    _, *arrays = convert_inputs(named)
    weights = {}
    for name, weight in zip(named, arrays, strict=True):
        check_floating(name, weight)
        dtype = accumulation_dtype(weight.dtype)
        weights[name] = np.array(to_host(weight), dtype=dtype, order="C")
    return untied(weights)


def random_weights(
    num_tokens: Any,
    dim: Any,
    num_layers: Any,
    num_heads: Any,
    num_key_heads: Any,
    mlp_dim: Any,
    *,
    tied: bool,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """Return normal weights of standard deviation 1/√inputs; those of norms are 1."""
    sizes = {
        name: _count(name, x)
        for name, x in (
            ("num_tokens", num_tokens),
            ("dim", dim),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
            ("num_key_heads", num_key_heads),
            ("mlp_dim", mlp_dim),
        )
    }
    if sizes["dim"] % (2 * sizes["num_heads"]):
        raise ValueError(
            f"`dim` must be a multiple of 2 · num_heads = {2 * sizes['num_heads']}, "
            f"got {sizes['dim']}"
        )
    head_dim = sizes["dim"] // sizes["num_heads"]
    settings = Settings(**sizes, head_dim=head_dim, tied=tied, rope_base=1, epsilon=0)
    generator, weights = np.random.default_rng(seed), {}
    for name, shape in settings.shapes().items():
        # Norms have one axis.
        deviation = shape[-1] ** -0.5
        draw = generator.normal(0, deviation, shape) if shape[1:] else np.ones(shape)
        weights[name] = draw.astype(np.float32)
    return weights


def untied(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the weights without a head that is the embedding again."""
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    if head is not None and embedding is not None and np.array_equal(head, embedding):
        return {name: x for name, x in weights.items() if name != HEAD}
    return weights


def _count(name: str, value: Any) -> int:
    count = check_integer(name, value)
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}")
    return count


def _matrix(weights: Weights, name: str, axes: str) -> tuple[int, int]:
    """Return the shape of a weight that must be a matrix without empty axes."""
    if name not in weights:
        have = listed([str(key) for key in weights])
        raise ValueError(
            f"`weights` must be those of a Llama model, but `{name}` is missing in "
            f"{shortened(have)}"
        )
    shape = tuple(getattr(weights[name], "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`{name}` must have shape {axes}, got {shape}")
    rows, columns = shape
    return int(rows), int(columns)
