"""Softmax in parts: the maximum of a row, and sums without it."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_scores

BLOCK_ROWS = 256  # rows of scores in flight: a block and its exponentials stay in cache

SoftmaxState = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def score_dtype(query: NDArray[Any], key: NDArray[Any], scale: float) -> np.dtype[Any]:
    """Return the dtype that holds every score: float32 where it does."""
    peaks = (max(float(x.max()), -float(x.min())) for x in (query, key) if x.size)
    largest = math.prod(peaks) * query.shape[-1] * scale
    check_scores(largest)
    narrow = query.dtype.itemsize < 8 and largest < 1e30
    return np.dtype(np.float32 if narrow else np.float64)


def masked_score(dtype: np.dtype[Any]) -> Any:
    """Return a score no softmax sees, finite so that 0 · (score - max) is 0."""
    return np.finfo(dtype).min / 8


def softmax_state(scores: NDArray[Any], axis: int) -> SoftmaxState:
    """Return (m, r, t): the maximum, and the sums without it. Takes m off `scores`."""
    m = scores.max(axis=axis, keepdims=True)
    scores -= m
    top = scores == 0
    weights = np.exp(scores)
    np.copyto(weights, 0, where=top)
    ties = np.count_nonzero(top, axis=axis) - 1
    r = weights.sum(axis=axis) + ties.astype(weights.dtype)
    t = np.einsum("ij,ij->i" if axis else "ij,ij->j", weights, scores)
    return m.squeeze(axis), r, t


def add_states(a: tuple[NDArray[Any], ...], b: SoftmaxState) -> SoftmaxState:
    """Return (m, r, t) over the scores of both."""
    first = a[0] >= b[0]
    m, r, t = (np.where(first, x, y) for x, y in zip(a, b, strict=True))
    low, r_low, t_low = (np.where(first, y, x) for x, y in zip(a, b, strict=True))
    weight = np.exp(low - m)
    return m, r + weight * (1 + r_low), t + weight * (t_low + (low - m) * (1 + r_low))


def entropy_of_state(state: SoftmaxState) -> NDArray[Any]:
    _, r, t = state
    entropy: NDArray[Any] = np.log1p(r) - t / (1 + r)
    return entropy
