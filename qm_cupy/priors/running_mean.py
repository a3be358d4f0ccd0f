"""Running means of tokens 1..t, or of tokens t..K in reverse, for every t at once.

Prefix sums give all K means of a sequence in O(K D), instead of O(K² D) for a sum of
its own for each t.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.constants import WARP
from ..cuda.device import empty
from ..cuda.launch import contiguous, device_counts, launch


def running_mean(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[Any]:
    """Return the mean of tokens 1..t, or of t..K in reverse, in row t: (B, K, D)."""
    if is_cuda(tokens):
        return running_mean_cuda(tokens, counts, reverse)
    return _running_mean_reference(tokens, counts, reverse)


def _running_mean_reference(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    num_groups = tokens.shape[-2]
    index = np.arange(num_groups)[:, None]  # (K, 1), t - 1
    # Sums in float64: the rounding of a long float32 sum would grow with K.
    total = tokens.astype(np.float64, order="C")
    if not reverse:
        # Padding comes last, so it is part of no mean of valid tokens.
        _sum_rows(total)
        total /= index + 1
        return total
    # In reverse, every sum starts at padding, which must be 0.
    left = counts[..., None, None] - index  # tokens t..K: (B, K, 1)
    if (left <= 0).any():
        total = np.where(left > 0, total, 0)
    _sum_rows(total[..., ::-1, :])
    total /= np.maximum(left, 1)  # max only for padding, whose mean stays 0
    return total


def _sum_rows(x: NDArray[Any]) -> None:
    """Replace every row by the sum of the rows up to it, in place.

    The rows are cut into runs of √K rows. First, all runs are summed side by side; then
    the total of the previous runs is added to each run. Both loops have about √K steps.
    NumPy's cumsum works column by column, which takes several times as long.
    """
    *batch, num_rows, dim = x.shape
    run = max(1, math.isqrt(num_rows))  # rows of a run
    whole = num_rows // run * run
    runs = x[..., :whole, :].reshape(*batch, whole // run, run, dim)  # a view
    for t in range(1, run):
        runs[..., t, :] += runs[..., t - 1, :]
    for t in range(whole + 1, num_rows):  # the remaining rows, fewer than a run
        x[..., t, :] += x[..., t - 1, :]
    # Row first - 1 is final here: it ends the previous run.
    for first in range(run, num_rows, run):
        x[..., first : first + run, :] += x[..., first - 1 : first, :]


def running_mean_cuda(tokens: Any, counts: NDArray[np.int64], reverse: bool) -> Any:
    num_groups, dim = tokens.shape[-2:]
    batch = math.prod(tokens.shape[:-2])
    out = empty(tokens.shape, accumulation_dtype(tokens.dtype))
    valid, _ = device_counts(counts)
    sizes = batch, num_groups, dim, int(reverse)
    args = (contiguous(tokens), valid, *sizes, out)
    # In the optimized kernel, a block sums 32 columns of one sequence. Each warp of the
    # block sums a run of rows, and the runs are added in order: the float sums are the
    # same bit for bit every time.
    kernel, blocks = ("running_mean", "prefix_means"), batch * -(-dim // WARP)
    launch(*kernel, tokens.dtype, args, outputs=batch * dim, blocks=blocks)
    return out


def running_mean_vjp_reference(
    gradient: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    """Return, for every token, the sum of the gradients of the means that contain it.

    Token i is part of the means of tokens 1..t with t ≥ i, with weight 1/t each:
    dx_i = Σ_{t ≥ i} dc_t / t. In reverse, the sum is over t ≤ i, with weight
    1 / (K - t + 1).
    """
    index = np.arange(gradient.shape[-2])[:, None]  # (K, 1), t - 1
    valid = counts[..., None, None] > index  # (B, K, 1)
    total = np.where(valid, gradient, 0).astype(np.float64)
    if reverse:
        total /= np.maximum(counts[..., None, None] - index, 1)
        _sum_rows(total)
    else:
        total /= index + 1
        _sum_rows(total[..., ::-1, :])  # suffix sums
    return np.where(valid, total, 0)


def running_mean_vjp_cuda(gradient: Any, counts: Any, reverse: int) -> Any:
    num_groups, dim = gradient.shape[-2:]
    batch = math.prod(gradient.shape[:-2])
    out = empty(gradient.shape, gradient.dtype)
    args = (gradient, counts, batch, num_groups, dim, reverse, out)
    kernel, blocks = ("running_mean_vjp", "prefix_means_vjp"), batch * -(-dim // WARP)
    launch(*kernel, gradient.dtype, args, outputs=batch * dim, blocks=blocks)
    return out
