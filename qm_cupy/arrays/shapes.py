"""The axes of arrays, and masks that are broadcast to all axes of an array.

B is the number of sequences, N is the number of tokens in a sequence, and D is the
width of a token. L is the number of layers, H is the number of heads in a layer, and d
is the width of a head. An array of one sequence has no axis B.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import any_of, check_mask

# Shapes of the sources from which saliency is computed, with one letter for each axis.
_LAYOUTS = {
    "hidden_states": ("BND", "LBND"),
    "attention": ("BNN", "LBNN", "LBHNN"),
    "query": ("BNd", "LBNd", "LBHNd"),
    "key": ("BNd", "LBNd", "LBHNd"),
}


def layer_axes(leading: Sequence[int]) -> tuple[int, int, int]:
    """Return L, B and H of leading axes (), (B,), (L, B) or (L, B, H).

    An axis that is absent counts as 1.
    """
    layers = leading[0] if len(leading) > 1 else 1
    batch = leading[1] if len(leading) > 1 else math.prod(leading)
    return layers, batch, leading[2] if len(leading) > 2 else 1


def expand_mask(
    mask: NDArray[np.bool_] | None, shape: tuple[int, ...]
) -> NDArray[np.bool_] | None:
    """Broadcast a (B, N) mask to (N,), (B, N), (L, B, N) or (L, B, H, N)."""
    if mask is None:
        return None
    # (B,), or () for one sequence
    batch = shape[-2:-1] if len(shape) < 4 else shape[1:2]
    check_mask(mask, (*batch, shape[-1]))
    if len(shape) == 4:
        mask = mask[:, None]  # (B, 1, N)
    return np.broadcast_to(mask, shape)  # a view: every layer and head has this mask


def saliency_shape(entropy: NDArray[Any]) -> tuple[int, ...]:
    """Return the shape of the saliency, (N,) or (B, N), without layers and heads."""
    # B is the second axis of (L, B, N) and (L, B, H, N), and the first axis of (B, N).
    leading = entropy.shape[1:2] if entropy.ndim > 2 else entropy.shape[:-1]
    return (*leading, entropy.shape[-1])


def iter_sequences(
    leading: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> Iterator[tuple[tuple[int, ...], NDArray[np.bool_] | None]]:
    """Yield the index of every sequence and the mask of its tokens."""
    for index in np.ndindex(leading):
        yield index, None if mask is None else mask[index]


def rows_of(x: Any) -> tuple[int, int]:
    """Return how many rows an array has along its last axis, and their length."""
    return x.size // x.shape[-1], x.shape[-1]


def num_valid(shape: tuple[int, ...], mask: NDArray[np.bool_] | None) -> Any:
    """Return the number of tokens that are not padding: N, or (B,) with a mask."""
    return shape[-1] if mask is None else mask.sum(axis=-1)


def check_source(
    name: str,
    source: NDArray[Any],
    lifted: NDArray[Any],
    tokens: tuple[int, ...],
    layouts: Sequence[str],
) -> None:
    """Raise if B and N of a source of saliency differ from those of the tokens.

    `source` is the caller's array. `lifted` is this array with the axis B, which
    `lift_source` inserts for one sequence. `tokens` is the shape of the tokens.
    """
    batch = tokens[0] if len(tokens) == 3 else 1
    if lifted.ndim in map(len, layouts):
        # B is the first axis, or the second after L; N is the last axis but one.
        actual = lifted.shape[0 if lifted.ndim == 3 else 1], lifted.shape[-2]
        if actual == (batch, tokens[-2]):
            return
    # In the error message, the layouts of one sequence have no B, like the caller's
    # arrays.
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
    """Insert the axis B into a source of one sequence, after the axis of layers.

    A source of several sequences has this axis and is returned unchanged.
    """
    single = tokens.ndim == 2
    lifted = source
    if single and source.ndim > 1:  # (N, D) -> (1, N, D), (L, N, D) -> (L, 1, N, D)
        lifted = source[None] if source.ndim == 2 else source[:, None]
    check_source(name, source, lifted, tokens.shape, _LAYOUTS[name])
    return lifted
