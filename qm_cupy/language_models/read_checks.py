"""Checks of what a language model reads: ids, widths, positions, sizes and states."""

from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import check_axes, check_positions, check_sizes, check_values
from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..caches.cache_checks import check_not_empty
from .llama_weights import Settings
from .model_state import ModelState


def check_ids(name: str, ids: Any, settings: Settings) -> None:
    """Raise unless ids are integers (N,) or (B, N) of the vocabulary."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got {ids.dtype}")
    check_axes(name, ids.shape, "N", "BN")
    check_not_empty(name, ids.shape)
    if is_cuda(ids) or not ids.size:
        return
    wrong = (ids < 0) | (ids >= settings.num_tokens)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(
            f"`{name}` must lie in 0..{settings.num_tokens - 1}, got {ids[at]} at "
            f"index {at}"
        )


def check_embeddings(name: str, x: Any, settings: Settings, *layouts: str) -> None:
    """Raise unless embeddings are floating, finite, and have the model's width."""
    check_values(name, x, *layouts)
    check_not_empty(name, x.shape)
    if x.shape[-1] != settings.dim:
        raise ValueError(
            f"`{name}` must have width D = {settings.dim} like the model, got "
            f"{x.shape[-1]}"
        )


def check_state(state: Any, x: Any, settings: Settings) -> None:
    """Raise unless tokens x (B, T, D) can be read after a state."""
    if not isinstance(state, ModelState):
        raise TypeError(
            "`state` must be a ModelState, which `read` and `step` return, got "
            f"{type(state).__name__}"
        )
    keys, layers = state.entries[0].keys, len(state.entries)
    batch, heads, _, dim = keys.shape
    wanted = settings.num_layers, settings.num_key_heads, settings.head_dim
    if (layers, heads, dim) != wanted:
        raise ValueError(
            f"`state` is of another model: it has {layers} layers of {heads} heads of "
            f"width {dim}, and not {wanted[0]} of {wanted[1]} of width {wanted[2]}"
        )
    if batch != len(x):
        raise ValueError(
            f"the state has B = {batch} sequences, but the tokens have {len(x)}"
        )
    dtype = accumulation_dtype(x.dtype)
    if keys.dtype != dtype:
        raise TypeError(
            f"tokens must keep the precision of the state ({keys.dtype}), got {dtype}"
        )
    if is_cuda(keys) != is_cuda(x):
        raise ValueError("tokens and `state` must be on one device")


class Inputs(NamedTuple):
    """Checked tokens in the dtype of the computation."""

    x: Any
    """(B, T, D)"""
    positions: Any
    """Integers (B, T), or None."""
    bias: Any
    """The logarithms of the sizes, (B, 1, T), or None."""


def inputs_of(
    tokens: Any, positions: Any, sizes: Any, names: tuple[str, str]
) -> Inputs:
    """Return tokens (T, D) or (B, T, D) with positions and sizes, or raise for these.

    `names` are those of the positions and the sizes.
    """
    check_positions(names[0], positions, tokens.shape[:-1], 0)
    check_sizes(names[1], sizes, tokens.shape[:-1])
    dtype = accumulation_dtype(tokens.dtype)
    x = tokens.reshape(-1, *tokens.shape[-2:]).astype(dtype, order="C", copy=False)
    if positions is not None:
        positions = positions.reshape(x.shape[:2]).astype(np.int64)
    bias = None
    if sizes is not None:
        sizes = sizes.reshape(x.shape[:2]).astype(dtype)
        with np.errstate(divide="ignore"):  # size 0: -inf
            bias = np.log(sizes)[:, None]
    return Inputs(x, positions, bias)
