"""Entropy of a softmax whose scores come in parts.

The state of a row of scores s is (m, r, t), with m = max s and the sums over all scores
except one that equals m:

    r = Σ e^(s - m),    t = Σ e^(s - m) (s - m),    H = log(1 + r) - t / (1 + r)

Both terms of H are ≥ 0, so nothing cancels. The usual form log Σ e^s - Σ p s subtracts
two numbers of the size of m. Where one score dominates, H is smaller than their
rounding error and is lost. `log1p` keeps the digits of a tiny r for the same reason.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_scores

BLOCK_ROWS = 256  # rows of scores in flight: a block and its exponentials stay in cache

SoftmaxState = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def score_dtype(query: NDArray[Any], key: NDArray[Any], scale: float) -> np.dtype[Any]:
    """Return float32 if it can hold every score, else float64."""
    # |q · k| is at most d times the largest |q| times the largest |k|.
    peaks = (max(float(x.max()), -float(x.min())) for x in (query, key) if x.size)
    largest = math.prod(peaks) * query.shape[-1] * scale
    check_scores(largest)
    # float32 ends at 3.4e38, and its masked score is -4e37: 1e30 is far from both.
    narrow = query.dtype.itemsize < 8 and largest < 1e30
    return np.dtype(np.float32 if narrow else np.float64)


def masked_score(dtype: np.dtype[Any]) -> Any:
    """Return a score whose softmax weight is 0, for masked tokens.

    It is finite, so that 0 · (score - m) is 0 and not NaN.
    """
    # An eighth of the range: the difference to any score is finite too.
    return np.finfo(dtype).min / 8


def softmax_state(scores: NDArray[Any], axis: int) -> SoftmaxState:
    """Return the state (m, r, t) along an axis; `scores` become s - m in place."""
    m = scores.max(axis=axis, keepdims=True)
    scores -= m
    top = scores == 0
    weights = np.exp(scores)
    # Terms of 1 next to a tiny r would erase its digits: the maxima are left out here
    # and counted. One of them stays out of r; each further one adds 1.
    np.copyto(weights, 0, where=top)
    ties = np.count_nonzero(top, axis=axis) - 1
    r = weights.sum(axis=axis) + ties.astype(weights.dtype)
    t = np.einsum("ij,ij->i" if axis else "ij,ij->j", weights, scores)
    return m.squeeze(axis), r, t


def add_states(a: tuple[NDArray[Any], ...], b: SoftmaxState) -> SoftmaxState:
    """Return the state of the scores of both `a` and `b`.

    The larger maximum m stays. With (m', r', t') the other state and w = e^(m' - m),
    the sums are r + w (1 + r') and t + w (t' + (m' - m)(1 + r')).
    """
    # Choose the state with the larger maximum for each row.
    first = a[0] >= b[0]
    m, r, t = (np.where(first, x, y) for x, y in zip(a, b, strict=True))
    low, r_low, t_low = (np.where(first, y, x) for x, y in zip(a, b, strict=True))
    weight = np.exp(low - m)
    # 1 + r': the maximum of the lower state is now one of the other scores.
    return m, r + weight * (1 + r_low), t + weight * (t_low + (low - m) * (1 + r_low))


def entropy_of_state(state: SoftmaxState) -> NDArray[Any]:
    """Return H = log(1 + r) - t / (1 + r), in nats."""
    _, r, t = state
    entropy: NDArray[Any] = np.log1p(r) - t / (1 + r)
    return entropy
