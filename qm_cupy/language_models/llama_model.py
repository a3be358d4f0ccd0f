"""The weights and settings of a Llama model, and where they come from.

The vocabulary has V tokens, and a token has the width D.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..arrays.checks import check_seed
from ..arrays.libraries import is_cuda
from ..cuda.device import to_host
from .gguf_file import read_gguf
from .llama_config import read_config
from .llama_weights import (
    NORM,
    Settings,
    Weights,
    check_weights,
    random_weights,
    read_state,
    settings_of,
)
from .network import prepared


@dataclass(frozen=True, eq=False, repr=False)
class LlamaModel:
    """What a `LanguageModel` is made of; it adds the computations."""

    weights: Weights
    num_heads: int  # the shapes of the weights do not depend on it
    num_key_heads: int
    rope_base: float = 10_000.0
    epsilon: float = 1e-5
    _settings: Settings = field(init=False)  # from all of these
    # Weights ready for use, by device and dtype.
    _copies: dict[tuple[str, np.dtype[Any]], dict[str, Any]] = field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        """Raise unless the weights are those of a model with these heads."""
        heads = self.num_heads, self.num_key_heads
        settings = settings_of(self.weights, *heads, self.rope_base, self.epsilon)
        check_weights(self.weights, settings)
        object.__setattr__(self, "_settings", settings)  # the dataclass is frozen

    def __reduce__(self) -> tuple[Any, ...]:
        """Exclude the converted weights when the model is pickled or copied."""
        options = self.num_heads, self.num_key_heads, self.rope_base, self.epsilon
        return type(self), (dict(self.weights), *options)

    def __repr__(self) -> str:
        """Return the sizes in one line."""
        s = self._settings
        return (
            f"LanguageModel({s.num_layers} layers, width {s.dim}, {s.num_heads} heads "
            f"({s.num_key_heads} of keys), {s.num_tokens} tokens)"
        )

    @classmethod
    def init(
        cls,
        num_tokens: int,
        dim: int,
        *,
        num_heads: int,
        num_key_heads: int | None = None,
        num_layers: int = 2,
        mlp_dim: int | None = None,
        tied: bool = True,
        seed: int = 0,
    ) -> Self:
        """Draw a random model: weights are normal with standard deviation 1/√inputs.

        Parameters
        ----------
        num_tokens : int
            Size V of the vocabulary.
        dim : int
            Width D, a multiple of 2 · `num_heads`.
        num_heads : int
            Number of heads of queries.
        num_key_heads : int, optional
            Number of heads of keys; by default `num_heads`.
        num_layers : int, default 2
            Number of layers.
        mlp_dim : int, optional
            Hidden width of the MLP; by default 4 D.
        tied : bool, default True
            Whether the embedding is also the matrix of the head.
        seed : int, default 0
            Seed of the random weights.

        Returns
        -------
        LanguageModel
            It has float32 weights.

        Raises
        ------
        ValueError
            If a number is out of range.
        """
        key_heads = num_heads if num_key_heads is None else num_key_heads
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        sizes = num_tokens, dim, num_layers, num_heads, key_heads, mlp_dim
        weights = random_weights(*sizes, tied=tied, seed=check_seed(seed))
        return cls(weights, num_heads, key_heads)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Self:
        """Read a model from a GGUF file, the format of llama.cpp.

        Parameters
        ----------
        path : str or path-like
            A file with the architecture "llama", with weights of any type that the
            gguf package can read.

        Returns
        -------
        LanguageModel
            With the weights in float32: 4 bytes for each, even if the file has fewer.

        Raises
        ------
        ImportError
            If the gguf package (the extra ``lm``) is not installed.
        OSError
            If the file cannot be read.
        ValueError
            If it is not a GGUF file or is damaged; if it has another architecture,
            other weights, a scaled rotation, experts or sliding windows.
        """
        weights, arguments = read_gguf(Path(path))
        return cls(weights, *arguments)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        *,
        num_heads: int,
        num_key_heads: int,
        rope_base: float = 10_000.0,
        epsilon: float = 1e-5,
    ) -> Self:
        """Make a model from the weights of a Llama model of transformers.

        Parameters
        ----------
        state : mapping of str to ndarray
            The ``state_dict()`` of a LlamaForCausalLM, with arrays of any library. It
            has "model.embed_tokens.weight" (V, D), "model.norm.weight" (D,), and
            "lm_head.weight" (V, D) unless it equals the embedding. Layer i has, with
            the prefix "model.layers.i." and the suffix ".weight": "input_layernorm",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj",
            "mlp.up_proj" and "mlp.down_proj".
        num_heads, num_key_heads, rope_base, epsilon
            As in the class.

        Returns
        -------
        LanguageModel
            It holds copies of the weights, in float32 or float64.

        Raises
        ------
        TypeError
            If a weight is not floating.
        ValueError
            If names or shapes do not fit, or an entry is not finite.
        """
        heads = num_heads, num_key_heads
        return cls(read_state(state), *heads, rope_base, epsilon)

    @classmethod
    def from_transformers(cls, model: Any) -> Self:
        """Make a model from a LlamaForCausalLM of transformers.

        Parameters
        ----------
        model : transformers.LlamaForCausalLM
            The model. Its configuration and its weights are read.

        Returns
        -------
        LanguageModel
            It holds copies of the weights, in float32 or float64.

        Raises
        ------
        TypeError
            If `model` has no configuration or weights.
        ValueError
            If it is another network, with a scaled rotation or biases for example.
        """
        arguments = read_config(model)
        return cls(read_state(model.state_dict()), *arguments)

    def prepared_weights(self, x: Any, dtype: Any = None) -> dict[str, Any]:
        """Return the weights on the device of x, in a dtype or that of x."""
        on_gpu, dtype = is_cuda(x), np.dtype(dtype or x.dtype)
        key = str(x.device) if on_gpu else "NumPy", dtype
        # Convert once for each device and dtype, and not at every step.
        if key not in self._copies:
            copies = prepared(self.weights, self._settings, dtype, on_gpu)
            if on_gpu:
                # Wait for the copies, because other streams may read them next.
                to_host(copies[NORM])
            self._copies[key] = copies
        return self._copies[key]
