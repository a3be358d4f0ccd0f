"""The results of functions: named tuples of arrays.

Axes: B sequences of N tokens of width D are merged to K groups each.
"""

from typing import Generic, NamedTuple

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
