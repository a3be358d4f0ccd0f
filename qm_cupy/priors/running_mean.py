"""Running means of tokens 1..t, or of tokens t..K in reverse, for every t at once.

The mean c_t is in row t of the result (B, K, D), for B sequences of K tokens of width
D. A separate sum for each t would need O(K² D) additions; prefix sums need O(K D). A
letter d before a name means the gradient of a loss with respect to the quantity.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.constants import WARP
from ..cuda.device import empty
from ..cuda.launch import contiguous, counts_on_device, launch


def running_mean(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[Any]:
    """Return the running means (B, K, D), one row for each t.

    With `reverse`, row t is the mean of tokens t..K, otherwise of tokens 1..t.
    `counts` (B,) is the number of valid tokens of each sequence. Later tokens are
    padding. In `t..K`, K is the count of the sequence; in (B, K, D), it is the length
    of the axis.
    """
    if is_cuda(tokens):
        return running_mean_cuda(tokens, counts, reverse)
    return _running_mean_reference(tokens, counts, reverse)


def _running_mean_reference(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    num_groups = tokens.shape[-2]
    index = np.arange(num_groups)[:, None]  # (K, 1), t - 1
    # Sums are in float64: the rounding error of a float32 sum would grow with K.
    total = tokens.astype(np.float64, order="C")
    if not reverse:
        # Padding comes last, so no mean of valid tokens contains it.
        _sum_rows(total)
        total /= index + 1
        return total
    # In reverse, every sum starts at the padding, which must be 0.
    num_read = counts[..., None, None] - index  # number of tokens t..K, (B, K, 1)
    if (num_read <= 0).any():
        total = np.where(num_read > 0, total, 0)
    _sum_rows(total[..., ::-1, :])
    total /= np.maximum(num_read, 1)  # the mean of padding stays 0
    return total


def _sum_rows(x: NDArray[Any]) -> None:
    """Replace every row of x (..., K, D) by the sum of the rows up to it, in place.

    The rows are cut into runs of √K rows. The first loop sums within the runs, and each
    of its steps adds one row in all runs at once. The last loop adds the total of the
    previous runs to each run. These two loops have about √K steps. A short loop between
    them sums the rows after the last run. NumPy's cumsum works column by column, which
    takes several times as long.
    """
    *batch, num_rows, dim = x.shape
    run_rows = max(1, math.isqrt(num_rows))
    rows_in_runs = num_rows // run_rows * run_rows
    runs = x[..., :rows_in_runs, :].reshape(
        *batch, rows_in_runs // run_rows, run_rows, dim
    )  # a view of x
    for t in range(1, run_rows):
        runs[..., t, :] += runs[..., t - 1, :]
    for t in range(rows_in_runs + 1, num_rows):  # the remaining rows, fewer than a run
        x[..., t, :] += x[..., t - 1, :]
    # Row `first - 1` is the last row of the previous run. Its sum is already complete.
    for first in range(run_rows, num_rows, run_rows):
        x[..., first : first + run_rows, :] += x[..., first - 1 : first, :]


def running_mean_cuda(tokens: Any, counts: NDArray[np.int64], reverse: bool) -> Any:
    """Launch the kernel of `running_mean`."""
    num_groups, dim = tokens.shape[-2:]
    batch = math.prod(tokens.shape[:-2])
    out = empty(tokens.shape, accumulation_dtype(tokens.dtype))
    gpu_counts, _ = counts_on_device(counts, num_groups)
    sizes = batch, num_groups, dim, int(reverse)
    args = (contiguous(tokens), gpu_counts, *sizes, out)
    # In the optimized kernel, a block sums 32 columns of one sequence. Each warp of the
    # block sums a run of rows, and the sums of the runs are added in order. So the bits
    # of the result are the same every time.
    kernel, blocks = ("running_mean", "prefix_means"), batch * -(-dim // WARP)
    launch(*kernel, tokens.dtype, args, outputs=batch * dim, blocks=blocks)
    return out


def running_mean_vjp_reference(
    gradient: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    """Return the gradients of the tokens from the gradients of the means, (B, K, D).

    Token x_i is part of the means c_t of tokens 1..t for t ≥ i, with weight 1 / t. So
    dx_i = Σ_{t ≥ i} dc_t / t. In reverse, the sum is over t ≤ i, with weight
    1 / (K - t + 1). In this weight, K is the number of valid tokens from `counts`.
    """
    index = np.arange(gradient.shape[-2])[:, None]  # (K, 1), t - 1
    valid = counts[..., None, None] > index  # (B, K, 1)
    total = np.where(valid, gradient, 0).astype(np.float64)
    if reverse:
        total /= np.maximum(counts[..., None, None] - index, 1)
        _sum_rows(total)
    else:
        total /= index + 1
        _sum_rows(total[..., ::-1, :])  # sums over later rows
    return np.where(valid, total, 0)


def running_mean_vjp_cuda(gradient: Any, counts: Any, reverse: int) -> Any:
    """Compute `running_mean_vjp_reference` by a kernel; `counts` are on the GPU."""
    num_groups, dim = gradient.shape[-2:]
    batch = math.prod(gradient.shape[:-2])
    out = empty(gradient.shape, gradient.dtype)
    args = (gradient, counts, batch, num_groups, dim, reverse, out)
    # The optimized kernel has a block for 32 columns of one sequence.
    kernel, blocks = ("running_mean_vjp", "prefix_means_vjp"), batch * -(-dim // WARP)
    launch(*kernel, gradient.dtype, args, outputs=batch * dim, blocks=blocks)
    return out
