"""Axes: which of them an array has, and masks that fit them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import any_of, check_mask

_LAYOUTS = {
    "hidden_states": ("BND", "LBND"),
    "attention": ("BNN", "LBNN", "LBHNN"),
    "query": ("BNd", "LBNd", "LBHNd"),
    "key": ("BNd", "LBNd", "LBHNd"),
}


def layer_axes(leading: Sequence[int]) -> tuple[int, int, int]:
    """Return L, B and H of leading axes (), (B), (L, B) or (L, B, H)."""
    layers = leading[0] if len(leading) > 1 else 1
    batch = leading[1] if len(leading) > 1 else math.prod(leading)
    return layers, batch, leading[2] if len(leading) > 2 else 1


def expand_mask(
    mask: NDArray[np.bool_] | None, shape: tuple[int, ...]
) -> NDArray[np.bool_] | None:
    """Return a (B, N) mask as one of shape (N), (B, N), (L, B, N) or (L, B, H, N)."""
    if mask is None:
        return None
    batch = shape[-2:-1] if len(shape) < 4 else shape[1:2]
    check_mask(mask, (*batch, shape[-1]))
    if len(shape) == 4:
        mask = mask[:, None]
    return np.broadcast_to(mask, shape)


def saliency_shape(entropy: NDArray[Any]) -> tuple[int, ...]:
    """Return (N,) or (B, N)."""
    leading = entropy.shape[1:2] if entropy.ndim > 2 else entropy.shape[:-1]
    return (*leading, entropy.shape[-1])


def iter_sequences(
    leading: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> Iterator[tuple[tuple[int, ...], NDArray[np.bool_] | None]]:
    """Yield the index of every sequence with its tokens' mask."""
    for index in np.ndindex(leading):
        yield index, None if mask is None else mask[index]


def rows_of(x: Any) -> tuple[int, int]:
    return x.size // x.shape[-1], x.shape[-1]


def num_valid(shape: tuple[int, ...], mask: NDArray[np.bool_] | None) -> Any:
    """Return the number of tokens of (B, N): N, or per sequence under a mask."""
    return shape[-1] if mask is None else mask.sum(axis=-1)


def check_source(
    name: str,
    source: NDArray[Any],
    lifted: NDArray[Any],
    tokens: tuple[int, ...],
    layouts: Sequence[str],
) -> None:
    """Refuse a source of saliency whose B and N are not those of the tokens."""
    batch = tokens[0] if len(tokens) == 3 else 1
    if lifted.ndim in map(len, layouts):
        found = lifted.shape[0 if lifted.ndim == 3 else 1], lifted.shape[-2]
        if found == (batch, tokens[-2]):
            return
    axes = "BN" if len(tokens) == 3 else "N"
    spelled = [
        layout if len(tokens) == 3 else layout.replace("B", "") for layout in layouts
    ]
    wanted = any_of([f"({', '.join(layout)})" for layout in spelled])
    raise ValueError(
        f"`{name}` must have shape {wanted} with ({', '.join(axes)}) = "
        f"{tuple(tokens[:-1])}, got {tuple(source.shape)}"
    )


def lift_source(name: str, source: NDArray[Any], tokens: NDArray[Any]) -> NDArray[Any]:
    """Put in the batch axis that one sequence leaves out, after that of layers."""
    single = tokens.ndim == 2
    lifted = source
    if single and source.ndim > 1:
        lifted = source[None] if source.ndim == 2 else source[:, None]
    check_source(name, source, lifted, tokens.shape, _LAYOUTS[name])
    return lifted
