"""Running means: of tokens 1..t, or of t..K in reverse, for every t at once."""

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
    """Return the mean of tokens 1..t, or of t..K in reverse, for every t at once."""
    if is_cuda(tokens):
        return running_mean_cuda(tokens, counts, reverse)
    return _running_mean_reference(tokens, counts, reverse)


def _running_mean_reference(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    num_groups = tokens.shape[-2]
    place = np.arange(num_groups)[:, None]  # (K, 1)
    total = tokens.astype(np.float64, order="C")
    if not reverse:
        _sum_rows(total)
        total /= place + 1
        return total
    left = counts[..., None, None] - place  # tokens from here on: (B, K, 1)
    if (left <= 0).any():
        total = np.where(left > 0, total, 0)
    _sum_rows(total[..., ::-1, :])
    total /= np.maximum(left, 1)
    return total


def _sum_rows(x: NDArray[Any]) -> None:
    """Add to every row all rows above it: runs of rows side by side, then the runs.

    NumPy's cumsum goes by columns, which takes several times as long.
    """
    *batch, num_rows, dim = x.shape
    run = max(1, math.isqrt(num_rows))
    whole = num_rows // run * run
    runs = x[..., :whole, :].reshape(*batch, whole // run, run, dim)  # a view
    for t in range(1, run):
        runs[..., t, :] += runs[..., t - 1, :]
    for t in range(whole + 1, num_rows):  # the rows left over, fewer than a run
        x[..., t, :] += x[..., t - 1, :]
    for first in range(run, num_rows, run):
        x[..., first : first + run, :] += x[..., first - 1 : first, :]


def running_mean_cuda(tokens: Any, counts: NDArray[np.int64], reverse: bool) -> Any:
    num_groups, dim = tokens.shape[-2:]
    batch = math.prod(tokens.shape[:-2])
    out = empty(tokens.shape, accumulation_dtype(tokens.dtype))
    each, _ = device_counts(counts)
    sizes = batch, num_groups, dim, int(reverse)
    args = (contiguous(tokens), each, *sizes, out)
    kernel, blocks = ("running_mean", "prefix_means"), batch * -(-dim // WARP)
    launch(*kernel, tokens.dtype, args, outputs=batch * dim, blocks=blocks)
    return out


def running_mean_vjp_reference(
    gradient: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    """Return the sum, for every token, of the gradients of the means it is part of."""
    place = np.arange(gradient.shape[-2])[:, None]  # (K, 1)
    valid = counts[..., None, None] > place
    total = np.where(valid, gradient, 0).astype(np.float64)
    if reverse:
        total /= np.maximum(counts[..., None, None] - place, 1)
        _sum_rows(total)
    else:
        total /= place + 1
        _sum_rows(total[..., ::-1, :])
    return np.where(valid, total, 0)


def running_mean_vjp_cuda(gradient: Any, counts: Any, reverse: int) -> Any:
    num_groups, dim = gradient.shape[-2:]
    batch = math.prod(gradient.shape[:-2])
    out = empty(gradient.shape, gradient.dtype)
    args = (gradient, counts, batch, num_groups, dim, reverse, out)
    kernel, blocks = ("running_mean_vjp", "prefix_means_vjp"), batch * -(-dim // WARP)
    launch(*kernel, gradient.dtype, args, outputs=batch * dim, blocks=blocks)
    return out
