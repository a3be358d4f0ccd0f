"""The network of a language model: blocks of attention and an MLP, and a linear head.

A pass reads T tokens of width D of each of B sequences. A layer has H heads of queries
and H_k heads of keys of width d.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays.libraries import is_cuda
from ..caches.rotary import rotate
from ..cuda.device import to_device
from ..cuda.launch import contiguous
from ..priors.linear import Norm, linear
from .llama_weights import EMBEDDING, HEAD, NORM, Settings

# Attention of a layer: from its number, rotated queries (B, H, T, d) and keys, and
# values (B, H_k, T, d), to the output (B, H, T, d).
Attention = Callable[[int, Any, Any, Any], Any]


def run_layers(
    x: Any,
    positions: Any,
    weights: Mapping[str, Any],
    settings: Settings,
    attention: Attention,
) -> Any:
    """Return the hidden states (B, T, D) of embeddings x (B, T, D).

    A block computes x += attention(norm(x)), then x += W_d (silu(W_g y) · W_u y) with
    y = norm(x). `positions` are integers (T,) or (B, T).
    """
    heads = settings.num_heads, settings.num_key_heads
    inv_freq = settings.inv_freq()
    if positions.ndim > 1:
        positions = positions[:, None]  # (B, 1, T): those of every head

    def norm_of(name: str) -> Norm:
        return Norm(weights[name], None, settings.epsilon)

    for i in range(settings.num_layers):
        block = f"layers.{i}"
        norm = norm_of(f"{block}.input_layernorm.weight")
        # One GEMM computes queries, keys and values.
        rows = linear(x, weights[f"{block}.qkv"], None, norm=norm)
        rows = rows.reshape(*x.shape[:2], -1, settings.head_dim)
        rows = rows.transpose(0, 2, 1, 3)  # (B, H + 2 H_k, T, d)
        values = rows[:, sum(heads) :]
        rotated = rotate(rows[:, : sum(heads)], positions, inv_freq)
        query, keys = rotated[:, : heads[0]], rotated[:, heads[0] :]
        attended = attention(i, query, keys, values).transpose(0, 2, 1, 3)
        attended = contiguous(attended).reshape(*x.shape[:2], -1)  # (B, T, H d)
        weight = weights[f"{block}.self_attn.o_proj.weight"]
        x = linear(attended, weight, None, residual=x)
        norm = norm_of(f"{block}.post_attention_layernorm.weight")
        weight = weights[f"{block}.mlp.gate_proj.weight"]
        hidden = linear(x, weight, None, norm=norm, activation="silu")
        hidden *= linear(x, weights[f"{block}.mlp.up_proj.weight"], None, norm=norm)
        x = linear(hidden, weights[f"{block}.mlp.down_proj.weight"], None, residual=x)
    return x


def run_head(x: Any, weights: Mapping[str, Any], settings: Settings) -> Any:
    """Return the logits (..., V) of hidden states (..., D)."""
    norm = Norm(weights[NORM], None, settings.epsilon)
    return linear(x, weights[EMBEDDING if settings.tied else HEAD], None, norm=norm)


def prepared(
    weights: Mapping[str, Any], settings: Settings, dtype: Any, on_gpu: bool
) -> dict[str, Any]:
    """Return weights ready for use in a dtype: on the device, and W_q, W_k, W_v joined.

    The other weights are not copied if they have this dtype already.
    """

    def moved(x: Any) -> Any:
        x = to_device(x) if on_gpu and not is_cuda(x) else x
        return contiguous(x, dtype)

    result = {}
    for i in range(settings.num_layers):
        parts = [f"layers.{i}.self_attn.{name}_proj.weight" for name in "qkv"]
        result[f"layers.{i}.qkv"] = np.concatenate([moved(weights[x]) for x in parts])
    joined = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
    for name, weight in weights.items():
        if not name.endswith(joined):
            result[name] = moved(weight)
    return result
