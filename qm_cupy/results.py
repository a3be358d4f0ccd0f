"""The results of functions: named tuples of arrays.

Axes: B sequences of N tokens of width D are merged to K groups each.
"""

from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import check_out
from .arrays.conversion import Array, FloatArray, IntArray


class Merged(NamedTuple, Generic[Array]):
    """Result of `quickmerge`, as arrays of the caller's library.

    The axis B is absent for one sequence. To merge another array over the same tokens
    in the same way, such as the keys and values of a cache, call
    ``merge_tokens(values, m.labels, m.sizes.shape[-1], mass=m.mass)``.
    """

    tokens: Array
    """(B, K, D), the dtype of the input: the merged tokens."""
    labels: IntArray
    """(B, N) int32: the group of each token, -1 for padding."""
    sizes: IntArray
    """(B, K) int32: the number of tokens in each group, 0 for padding."""
    positions: IntArray
    """(B, K) int32: the position of each group's last token, -1 for padding."""
    mass: FloatArray
    """(B, N): the weights that were used: 1 for uniform weights, 0 for padding. They
    are float64 if they are computed from a float64 array, otherwise float32."""


def arrays_of(out: Any) -> dict[str, Any]:
    """Return the arrays of `out` by the names that error messages use."""
    if out is None:
        return {}
    if not isinstance(out, Merged):
        raise TypeError(
            f"`out` must be a Merged, got {type(out).__name__}: pass the result of an "
            "earlier call"
        )
    return {f"out.{field}": x for field, x in out._asdict().items()}


def check_target(
    target: Merged[Any],
    max_groups: int,
    inputs: list[NDArray[Any]],
    mass_dtype: np.dtype[Any],
) -> None:
    """Raise if an array of `out` has the wrong shape or dtype, or overlaps an input.

    The first of the inputs are the tokens.
    """
    tokens = inputs[0]
    *leading, num_tokens, dim = tokens.shape
    per_token, per_group = (*leading, num_tokens), (*leading, max_groups)
    wanted: tuple[tuple[str, tuple[int, ...], Any], ...] = (  # fields of `Merged`
        ("BKD", (*per_group, dim), tokens.dtype),  # tokens
        ("BN", per_token, np.dtype(np.int32)),  # labels
        ("BK", per_group, np.dtype(np.int32)),  # sizes
        ("BK", per_group, np.dtype(np.int32)),  # positions
        ("BN", per_token, mass_dtype),  # mass
    )
    for name, x, (axes, shape, dtype) in zip(
        target._fields, target, wanted, strict=True
    ):
        check_out(x, shape, dtype, *inputs, name=f"out.{name}", axes=axes)


class AlignmentLoss(NamedTuple, Generic[Array]):
    """Losses of `alignment_loss`, each of shape () or (B,)."""

    forward: Array  # each token is predicted from the tokens before it
    backward: Array  # each token is predicted from the tokens after it
    total: Array  # forward + backward


class Choice(NamedTuple, Generic[Array]):
    """Result of `choose_merge` for C candidates, as arrays of the caller's library.

    The axis B is absent for one sequence.
    """

    merged: Merged[Array]
    """The result of the best candidate of each sequence, padded to the largest K."""
    scores: Array
    """(C, B), float32 or float64: the score of every candidate; lower is better."""
    best: Array
    """(B,) int32: the index of the selected candidate of each sequence."""
