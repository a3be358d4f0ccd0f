"""The axes of arrays, and masks that are broadcast to all axes of an array.

B is the number of sequences, N is the number of tokens in a sequence, and D is the
width of a token. L is the number of layers, H is the number of heads in a layer, and d
is the width of a head. An array of one sequence has no axis B. Arrays of heads have
these leading axes, before the axes of a matrix or of a row:

    (), (B,), (B, H), (L, B, H)

One layer of heads is (B, H), as models return it, and several layers are (L, B, H).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_layout, check_shape

_LEADING = "", "B", "BH", "LBH"  # one letter for each leading axis


def layout_of(ndim: int, last: str) -> str:
    """Return the letters of all axes of an array; `last` has those of a matrix or row.

    For four axes and "NN", they are "BHNN".
    """
    return _LEADING[ndim - len(last)] + last


def check_heads(name: str, x: NDArray[Any], last: str) -> None:
    """Raise unless the array is floating and has leading axes as above."""
    check_layout(name, x, *[leading + last for leading in _LEADING])


def check_square(name: str, x: NDArray[Any]) -> None:
    """Raise unless the array has matrices (..., N, N) of floating numbers."""
    check_heads(name, x, "NN")
    # The number of axes does not say whether the last two have one length.
    check_shape(name, x, layout_of(x.ndim, "NN"), (*x.shape[:-1], x.shape[-2]))


def layer_axes(leading: Sequence[int]) -> tuple[int, int, int]:
    """Return L, B and H of leading axes (), (B,), (B, H) or (L, B, H).

    An axis that is absent counts as 1.
    """
    if len(leading) < 2:
        return 1, math.prod(leading), 1
    *layers, batch, heads = leading
    return math.prod(layers), batch, heads


def saliency_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (N,) or (B, N) for entropies (N,), (B, N), (B, H, N) or (L, B, H, N)."""
    batch = shape[:1] if len(shape) < 4 else shape[1:2]
    return (*batch, shape[-1]) if len(shape) > 1 else tuple(shape)


def expand_mask(mask: Any, shape: Sequence[int]) -> Any:
    """Broadcast a mask (N,) or (B, N) to (N,), (B, N), (B, H, N) or (L, B, H, N).

    None stays None.
    """
    if mask is None:
        return None
    if len(shape) > 2:
        mask = mask[..., None, :]  # (B, 1, N)
    return np.broadcast_to(
        mask, tuple(shape)
    )  # a view: every layer and head has this mask


def masked_copy(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return a copy in float32 or float64 that is 0 where a mask is False."""
    x = x.astype(np.result_type(x.dtype, np.float32), order="C")
    # Padding may be NaN, and NaN times 0 is NaN.
    return x if mask is None else np.where(mask, x, x.dtype.type(0))


def sum_of_tokens(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return the sums (..., 1) over the tokens of x (..., N), without padding.

    NumPy adds the halves of a long row separately, so zeros in place of the padding
    would change the bits.
    """
    if mask is None:
        return x.sum(axis=-1, keepdims=True)
    mask = np.broadcast_to(mask, x.shape)
    total = np.empty((*x.shape[:-1], 1), x.dtype)
    for index in np.ndindex(x.shape[:-1]):
        total[index] = x[index][mask[index]].sum()
    return total


def iter_sequences(
    leading: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> Iterator[tuple[tuple[int, ...], NDArray[np.bool_] | None]]:
    """Yield the index of every sequence and the mask of its tokens."""
    for index in np.ndindex(leading):
        yield index, None if mask is None else mask[index]


def row_blocks(num_rows: int, length: int, entries: int = 1 << 16) -> Iterator[slice]:
    """Yield slices of the rows of a matrix: blocks of at most `entries` entries.

    Code that needs temporary arrays needs little memory for one block at a time, and
    the block stays in cache. A row longer than `entries` is a block of its own.
    """
    step = max(1, entries // max(length, 1))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def rows_of(x: Any) -> tuple[int, int]:
    """Return how many rows an array has along its last axis, and their length."""
    return x.size // x.shape[-1], x.shape[-1]


def num_valid(shape: tuple[int, ...], mask: NDArray[np.bool_] | None) -> Any:
    """Return the number of tokens that are not padding: N, or (B,) with a mask."""
    return shape[-1] if mask is None else mask.sum(axis=-1)


def check_key(query: Sequence[int], key: Sequence[int]) -> None:
    """Raise unless the shape of the keys is that of the queries.

    The number of heads of the queries may be a multiple of that of the keys.
    """
    layout = layout_of(len(query), "Nd")
    pairs = zip(layout, query, key, strict=False)
    fits = len(query) == len(key) and all(
        q == k or (axis == "H" and k > 0 and q % k == 0) for axis, q, k in pairs
    )
    if not fits:
        heads = ", or a number of heads that divides H" if "H" in layout else ""
        raise ValueError(
            f"`key` must have shape ({', '.join(layout)}) = {tuple(query)} like "
            f"`query`{heads}, got {tuple(key)}"
        )


def repeat_heads(key: Any, query: Any) -> Any:
    """Return keys with one head for each head of the queries.

    If there are fewer, each head serves a group of heads that follow one another: head
    h of the queries has head h // (H / H_k) of the H_k heads of the keys.
    """
    if key.shape == query.shape:
        return key
    *outer, num_heads, num_tokens, dim = key.shape
    shape = (*outer, num_heads, query.shape[-3] // num_heads, num_tokens, dim)
    return np.broadcast_to(key[..., None, :, :], shape).reshape(query.shape)
