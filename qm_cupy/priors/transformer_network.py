"""The network of a transformer prior: an embedding, blocks, and a linear head."""

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
    """Return predictions (B, T, D); write keys and values to the cache of each layer.

    A block is pre-norm: x += attention(norm1(x)), then x += MLP(norm2(x)).
    """

    def of(name: str) -> tuple[Any, Any]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm_of(name: str) -> Norm:
        return Norm(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    span, added = _positioned(tokens, span, weights)
    x = tokens.astype(accumulation_dtype(tokens.dtype), copy=False)
    # `added` is None for rotary positions, which only rotate queries and keys.
    x = linear(x, *of("embed"), residual=added)  # (B, T, E)
    for i, cache in enumerate(caches):
        block = f"blocks.{i}"
        # One GEMM for queries, keys and values, with the norm before it.
        heads = linear(x, *of(f"{block}.qkv"), norm=norm_of(f"{block}.norm1"))
        heads = heads.reshape(*x.shape[:2], 3, *cache[0].shape[1::2])  # (B, T, 3, H, d)
        query = split_heads(heads, span, weights.get("turns"), *cache)
        read = attend(query, *cache, span).reshape(x.shape)  # (B, T, E), E = H d
        x = linear(read, *of(f"{block}.out"), residual=x)
        norm = norm_of(f"{block}.norm2")
        hidden = linear(x, *of(f"{block}.mlp_in"), norm=norm, activation="gelu")
        x = linear(hidden, *of(f"{block}.mlp_out"), residual=x)
    return linear(x, *of("head"), norm=norm_of("norm"))


def _positioned(
    tokens: Any, span: Span, weights: Mapping[str, Any]
) -> tuple[Span, Any]:
    """Return the span with positions for the kernels, and the learned embeddings.

    Rotary positions go to the kernels, and the second result is None. Learned positions
    become vectors (B, T, E), which are added to the embeddings of the tokens. Then the
    kernels need no positions.
    """
    positions, learned = span.positions, weights.get("positions.weight")
    if learned is None:
        positions = contiguous(positions, np.int64)
        return span._replace(positions=positions), None
    if positions is None:
        end = span.start + tokens.shape[1]
        rows = np.arange(span.start, end, like=learned)  # no copy from the CPU
        positions = rows + np.zeros(tokens.shape[:2], np.int64, like=learned)  # (B, T)
    # Positions on a GPU are not checked before. Clipping keeps the index in bounds.
    return span._replace(positions=None), learned[positions.clip(0, len(learned) - 1)]
