"""The network of a transformer prior: an embedding, blocks, and a linear head.

A prior is a model that predicts a merged token from the tokens before it. A pass of the
network reads T tokens of width D of each of B sequences. The network has the width E,
and each block has H attention heads of width d = E / H.
"""

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
    """Return predictions (B, T, D); write keys and values to the cache of each block.

    A block has a norm before the attention and before the MLP:
    x += attention(norm1(x)), then x += MLP(norm2(x)). `caches` has the keys and the
    values of each block. If positions are rotary, `weights` also has "turns", the
    result of `rotary_turns`.
    """

    def linear_of(name: str) -> tuple[Any, Any]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm_of(name: str) -> Norm:
        return Norm(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    span, embedded_positions = _positioned(tokens, span, weights)
    # In C order: BLAS rounds products of other layouts differently.
    x = tokens.astype(accumulation_dtype(tokens.dtype), order="C", copy=False)
    # Learned positions are added to the embeddings. Rotary positions only rotate
    # queries and keys; then `embedded_positions` is None, and nothing is added.
    x = linear(x, *linear_of("embed"), residual=embedded_positions)  # (B, T, E)
    for i, cache in enumerate(caches):
        block = f"blocks.{i}"
        # One GEMM computes queries, keys and values.
        heads = linear(x, *linear_of(f"{block}.qkv"), norm=norm_of(f"{block}.norm1"))
        heads = heads.reshape(*x.shape[:2], 3, *cache[0].shape[1::2])  # (B, T, 3, H, d)
        query = split_heads(heads, span, weights.get("turns"), *cache)
        attended = attend(query, *cache, span).reshape(x.shape)  # (B, T, E), E = H d
        x = linear(attended, *linear_of(f"{block}.out"), residual=x)
        norm = norm_of(f"{block}.norm2")
        hidden = linear(x, *linear_of(f"{block}.mlp_in"), norm=norm, activation="gelu")
        x = linear(hidden, *linear_of(f"{block}.mlp_out"), residual=x)
    return linear(x, *linear_of("head"), norm=norm_of("norm"))


def _positioned(
    tokens: Any, span: Span, weights: Mapping[str, Any]
) -> tuple[Span, Any]:
    """Return the span for the attention, and the embedded positions (B, T, E) or None.

    Rotary positions stay in the span, because the attention rotates by them. Nothing is
    added to the embeddings. Learned positions become vectors that are added to the
    embeddings of the tokens. The span that is returned then has no positions.
    """
    positions, learned = span.positions, weights.get("positions.weight")
    if learned is None:
        positions = contiguous(positions, np.int64)
        return span._replace(positions=positions), None
    if positions is None:
        end = span.start + tokens.shape[1]
        # `like` makes the array on the device of the weights, without a copy.
        position_range = np.arange(span.start, end, like=learned)
        positions = position_range + np.zeros(
            tokens.shape[:2], np.int64, like=learned
        )  # (B, T)
    # The checks do not reject negative positions, and on a GPU they do not read the
    # positions at all. So clip them to the range of the learned positions.
    return span._replace(positions=None), learned[positions.clip(0, len(learned) - 1)]
