"""What the functions return: named tuples of arrays."""

from typing import Generic, NamedTuple

from .arrays.conversion import Array, FloatArray, IntArray


class Merged(NamedTuple, Generic[Array]):
    """Result of `quickmerge`, of the caller's own kind; without B for one sequence.

    ``merge_tokens(values, m.labels, m.sizes.shape[-1], mass=m.mass)`` merges any other
    array over the same tokens, keys and values of a cache for example, the same way.
    """

    tokens: Array
    """(B, K, D), the dtype of the input: the merged tokens."""
    labels: IntArray
    """(B, N) int32: the group of each token, -1 for padding."""
    sizes: IntArray
    """(B, K) int32: the tokens in each group."""
    positions: IntArray
    """(B, K) int32: the position of each group's last token, -1 for padding."""
    saliency: FloatArray
    """(B, N): the saliency of each token."""
    mass: FloatArray
    """(B, N): the weights of the merge."""


class AlignmentLoss(NamedTuple, Generic[Array]):
    """Losses of `alignment_loss`, each of shape () or (B,)."""

    forward: Array
    backward: Array
    total: Array


class Choice(NamedTuple, Generic[Array]):
    """Result of `choose_merge`, in the caller's kind; without B for one sequence."""

    merged: Merged[Array]
    """What the best candidate of each sequence gave, padded to the largest K of all."""
    scores: Array
    """(C, B), float32 or float64: the score of every candidate; less is better."""
    best: Array
    """(B,) int32: the candidate that each sequence took."""
