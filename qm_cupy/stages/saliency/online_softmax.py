"""Entropy of a softmax whose scores are computed in parts.

p = softmax(s) of a row of scores s has the entropy H = -Σ p log p. The state of the row
is (m, r, t), with m = max s and two sums over all scores except one that equals m:

    r = Σ e^(s - m),    t = Σ e^(s - m) (s - m),    H = log(1 + r) - t / (1 + r)

log(1 + r) and -t / (1 + r) are both ≥ 0, so their sum loses no digits. The usual form
log Σ e^s - Σ p s subtracts two numbers of the size of m. Where one score dominates, H
is smaller than the rounding error of these numbers, so all digits of H are lost.
`log1p` computes log(1 + r), because the sum 1 + r would lose the digits of a tiny r.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rows of scores that the references compute at once. A block of this many rows and its
# exponentials stay in cache.
BLOCK_ROWS = 256

SoftmaxState = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # m, r, t of rows


def score_dtype(query: NDArray[Any], key: NDArray[Any], scale: float) -> np.dtype[Any]:
    """Return float64 for float64 inputs or huge scores, else float32.

    The scores are scale · q · k for queries q and keys k of width d.
    """
    # |q · k| is at most d times the largest entry of |q| times the largest of |k|.
    peaks = (max(float(x.max()), -float(x.min())) for x in (query, key) if x.size)
    largest = math.prod(peaks) * query.shape[-1] * scale
    if largest >= 1e300:
        raise ValueError(
            "the values are too large: their attention scores overflow; scale the "
            "values down"
        )
    # The range of float32 ends at 3.4e38, and its masked score is -4e37: 1e30 is far
    # from both.
    fits_float32 = query.dtype.itemsize < 8 and largest < 1e30
    return np.dtype(np.float32 if fits_float32 else np.float64)


def masked_score(dtype: np.dtype[Any]) -> Any:
    """Return the score of masked tokens, whose softmax weight is 0.

    The score is finite. With -inf, the product 0 · (score - m) would be NaN.
    """
    # An eighth of the range, so that the difference to any real score is finite too.
    return np.finfo(dtype).min / 8


def score_blocks(
    query: NDArray[Any], key: NDArray[Any], causal: bool
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield blocks of rows of the scores of one head: (rows, scores).

    Queries and keys are (N, d), and the queries are multiplied by the scale. `scores`
    are (block, N) or, with a causal mask, (block, rows.stop): no row of the block needs
    the keys after the block. The caller may overwrite them.
    """
    for start in range(0, len(query), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(query)))
        scores = query[rows] @ key[: rows.stop if causal else None].T
        if causal:
            # Within the block, mask the keys after the row's own token: the entries
            # above the diagonal of the last square.
            above_diagonal = np.triu_indices(rows.stop - start, 1)
            scores[:, start:][above_diagonal] = masked_score(scores.dtype)
        yield rows, scores


def softmax_state(scores: NDArray[Any], axis: int) -> SoftmaxState:
    """Return the states of a matrix of scores along an axis, which is 0 or 1.

    m, r and t have the length of the other axis. `scores` become s - m in place.
    """
    m = scores.max(axis=axis, keepdims=True)
    scores -= m
    is_max = scores == 0
    weights = np.exp(scores)  # e^(s - m)
    # A term e^0 = 1 in the sum would erase the digits of a tiny r. So set the terms of
    # the maxima to 0 and count the maxima. One of them is not in r by definition; each
    # further maximum adds 1.
    np.copyto(weights, 0, where=is_max)
    num_ties = np.count_nonzero(is_max, axis=axis) - 1
    r = weights.sum(axis=axis) + num_ties.astype(weights.dtype)
    # The maxima add nothing to t, because s - m = 0.
    t = np.einsum("ij,ij->i" if axis else "ij,ij->j", weights, scores)
    return m.squeeze(axis), r, t


def add_states(a: tuple[NDArray[Any], ...], b: SoftmaxState) -> SoftmaxState:
    """Return the state (m, r, t) of all scores of two states, for each row.

    The state with the larger maximum is (m, r, t). With (m', r', t') the other state
    and w = e^(m' - m), the sums become r + w (1 + r') and
    t + w (t' + (m' - m)(1 + r')).
    """
    # Sort the two states by their maxima, for each row.
    a_is_high = a[0] >= b[0]
    m, r, t = (np.where(a_is_high, x, y) for x, y in zip(a, b, strict=True))
    # (m', r', t')
    m_low, r_low, t_low = (np.where(a_is_high, y, x) for x, y in zip(a, b, strict=True))
    w = np.exp(m_low - m)
    # r' leaves out one score that equals m'. The new sums leave out only one score that
    # equals m, so they contain the term of m': 1 + r' and not r'.
    return m, r + w * (1 + r_low), t + w * (t_low + (m_low - m) * (1 + r_low))


def entropy_of_state(state: SoftmaxState) -> NDArray[Any]:
    """Return H = log(1 + r) - t / (1 + r), in nats."""
    _, r, t = state
    entropy: NDArray[Any] = np.log1p(r) - t / (1 + r)
    return entropy
