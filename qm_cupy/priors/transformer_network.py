"""The network of a transformer prior: blocks of attention and an MLP, before a head."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..cuda.launch import contiguous
from .attention import Span, attend, split_heads
from .linear import Norm, linear


def run_transformer(
    tokens: Any,
    span: Span,
    caches: list[tuple[Any, Any]],
    weights: Mapping[str, Any],
) -> NDArray[Any]:
    """Return predictions (B, T, D); keys and values go to each layer's cache."""

    def of(name: str) -> tuple[Any, Any]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm_of(name: str) -> Norm:
        return Norm(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    span, added = _placed(tokens, span, weights)
    x = tokens.astype(accumulation_dtype(tokens.dtype), copy=False)
    x = linear(x, *of("embed"), residual=added)
    for i, cache in enumerate(caches):
        block = f"blocks.{i}"
        heads = linear(x, *of(f"{block}.qkv"), norm=norm_of(f"{block}.norm1"))
        heads = heads.reshape(*x.shape[:2], 3, *cache[0].shape[1::2])
        query = split_heads(heads, span, weights.get("turns"), *cache)
        read = attend(query, *cache, span).reshape(x.shape)
        x = linear(read, *of(f"{block}.out"), residual=x)
        norm = norm_of(f"{block}.norm2")
        hidden = linear(x, *of(f"{block}.mlp_in"), norm=norm, activation="gelu")
        x = linear(hidden, *of(f"{block}.mlp_out"), residual=x)
    return linear(x, *of("head"), norm=norm_of("norm"))


def _placed(tokens: Any, span: Span, weights: Mapping[str, Any]) -> tuple[Span, Any]:
    """Return positions as kernels take them, and what learned ones add.

    Learned positions are added here, so that no kernel has a use for them.
    """
    positions, learned = span.positions, weights.get("positions.weight")
    if learned is None:
        positions = contiguous(positions, np.int64)
        return span._replace(positions=positions), None
    if positions is None:
        end = span.start + tokens.shape[1]
        rows = np.arange(span.start, end, like=learned)  # no copy from the CPU
        positions = rows + np.zeros(tokens.shape[:2], np.int64, like=learned)
    return span._replace(positions=None), learned[positions.clip(0, len(learned) - 1)]
