"""Attention entropy of attention probabilities that the caller has computed.

A_ij is the attention of token i to token j. A is a matrix (N, N) for each of L layers,
B sequences and H heads. P_ij = A_ij / Σ_k A_ik is the same row with sum 1, and
H_i = -Σ_j P_ij log P_ij is its entropy. Below, an array (..., N) has one number for
each row of each matrix.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_finite_values, check_mask, check_not_negative
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import all_finite
from ...arrays.libraries import is_cuda
from ...arrays.shapes import (
    check_square,
    expand_mask,
    iter_sequences,
    layer_axes,
    saliency_shape,
)
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...progress import report
from .layers import over_layers
from .online_softmax import BLOCK_ROWS
from .score_gradients import (
    check_row_gradient,
    in_accumulation_dtype,
    masked_gradient,
)


@over_layers("attention")
@operation(
    differentiable=("attention",),
    constants=("mask?",),
    dtype="computed",  # float64 for float64, else float32
    shapes=without_last_axis,
)
def attention_entropy(attention: Array, *, mask: BoolArray | None = None) -> Array:
    r"""Return the Shannon entropy of each row of attention probabilities, in nats.

    .. math:: H_i = -\sum_j P_{ij} \log P_{ij}, \qquad
        P_{ij} = A_{ij} \Big/ \sum_k A_{ik}, \qquad 0 \log 0 = 0

    Parameters
    ----------
    attention : ndarray of shape (N, N), (B, N, N), (B, H, N, N) or (L, B, H, N, N)
        Attention probabilities, non-negative; float16, bfloat16, float32 or float64.
        Each row is divided by its sum. Or a tuple of layers, such as the
        ``attentions`` of a model.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded rows have entropy 0. Padded columns are left out, and
        the rest of the row is divided by its own sum. Padding is not read.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input. A tuple for a tuple.

    Raises
    ------
    TypeError
        If `attention` is not floating, `mask` is neither boolean nor integer, or a
        layer is None.
    ValueError
        If a shape does not fit, or `attention` has negative or non-finite entries.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> attention_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4)
    array([0.    , 0.6931])
    """
    convert_back, attention, mask = convert_inputs(
        {"attention": attention, "mask": mask}
    )
    return convert_back(compute_attention_entropy(attention, mask=mask))


def compute_attention_entropy(attention: Any, *, mask: Any = None) -> Any:
    """Return the entropy of converted arrays, after checking them."""
    mask = _check_attention(attention, mask)  # (B, N)
    if is_cuda(attention):
        return _attention_entropy_cuda(attention, mask)
    # The kernels find the sequence of a row themselves. The reference needs one mask
    # (N,) for each matrix, (..., N).
    matrix_mask = expand_mask(mask, attention.shape[:-1])
    return _attention_entropy_reference(attention, matrix_mask)


def _check_attention(
    attention: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Raise if an argument is not valid; return the mask (B, N)."""
    check_square("attention", attention)
    mask = check_mask(mask, saliency_shape(attention.shape[:-1]))
    check_probabilities(attention, mask)
    return mask


def check_probabilities(
    attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> None:
    """Raise if an entry of attention (..., N, N) is negative, NaN or infinite.

    Padded rows and columns may have any values.
    """
    masks: tuple[Any, ...] = ()
    matrix_mask = expand_mask(mask, attention.shape[:-1])  # (..., N)
    if matrix_mask is not None:
        masks = matrix_mask[..., :, None], matrix_mask[..., None, :]
    check_finite_values("attention", attention, *masks)
    check_not_negative("attention", attention, *masks)


def _attention_entropy_reference(
    attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    entropy = np.zeros(attention.shape[:-1], dtype)  # (..., N)
    count = math.prod(entropy.shape[:-1])
    sequences = iter_sequences(entropy.shape[:-1], mask)
    for number, (index, valid) in enumerate(sequences):
        # `valid` is the mask (N,) of one matrix, or None. Without the padding, the sums
        # have the same bits as those of the sequence alone. Rows are processed in
        # blocks, so that a block and its logarithms stay in cache.
        token = np.flatnonzero(np.ones(attention.shape[-1]) if valid is None else valid)
        for start in range(0, len(token), BLOCK_ROWS):
            rows = token[start : start + BLOCK_ROWS]
            a = attention[index][start : start + BLOCK_ROWS]  # A, (block, N)
            if valid is not None:
                a = attention[index][rows[:, None], token]
            h = _row_entropy(a.astype(dtype, order="C"))
            # Sums of very large A overflow. H does not depend on the scale of a row.
            if not all_finite(h):
                wrong = np.flatnonzero(~np.isfinite(h))
                peak = a[wrong].max(axis=-1, keepdims=True).astype(dtype)
                h[wrong] = _row_entropy(a[wrong] / peak)
            entropy[index][rows] = h
            report((number + (start + len(rows)) / len(token)) / count)
    # Rounding can leave a tiny negative number where the entropy is 0.
    return np.maximum(entropy, 0)


def _row_entropy(a: NDArray[Any]) -> NDArray[Any]:
    """Return the entropy of each row of A (block, N); it is not finite for huge A."""
    # The smallest normal number: a positive lower limit for divisors and logarithms.
    tiny = np.finfo(a.dtype).tiny
    with np.errstate(over="ignore", invalid="ignore"):
        # H = -Σ P log P = log Σ A - (Σ A log A) / Σ A, because P = A / Σ A.
        total = np.maximum(a.sum(axis=-1), tiny)  # Σ A, (block,)
        log_a = np.log(np.maximum(a, tiny))  # finite, so that 0 · log 0 gives 0
        mean_log = np.einsum("ij,ij->i", a, log_a) / total  # (Σ A log A) / Σ A
        # A row without attention has entropy 0.
        return np.where(total > tiny, np.log(total) - mean_log, 0)


def _attention_entropy_cuda(attention: Any, mask: Any) -> Any:
    *leading, num_tokens, _ = attention.shape
    out = empty((*leading, num_tokens), accumulation_dtype(attention.dtype))
    arrays = contiguous(attention), contiguous(mask)
    # The kernel computes from B and H which row of the mask (B, N) belongs to a row of
    # the attention (L, B, H, N, N).
    _, batch, heads = layer_axes(leading)
    args = (*arrays, math.prod(leading), batch, heads, num_tokens, out)
    kernel = "attention_entropy", "attention_entropy"
    # In the optimized kernel, the threads of a warp together add up the N entries of a
    # row. The basic kernel (see `use_kernels`) has one thread for each row.
    launch(*kernel, attention.dtype, args, rows=out.size)
    return out


@over_layers("gradient", "attention")
@on_callers_stream
def attention_entropy_vjp(
    gradient: FloatArray, attention: Array, *, mask: BoolArray | None = None
) -> Array:
    r"""Return the vector–Jacobian product of `attention_entropy`.

    .. math:: \frac{\partial \mathcal{L}}{\partial A_{ij}} =
        -g_i \, \frac{\log P_{ij} + H_i}{\sum_k A_{ik}}, \qquad
        P_{ij} = \frac{A_{ij}}{\sum_k A_{ik}}

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies; any float dtype.
    attention : ndarray of shape (N, N), (B, N, N), (B, H, N, N) or (L, B, H, N, N)
        The argument of `attention_entropy`; if it is a tuple, `gradient` is a tuple
        too.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `attention_entropy`. The gradient of padded rows is not read.

    Returns
    -------
    ndarray of the shape and dtype of `attention`
        Gradient of the loss with respect to the attention; 0 in padded rows and
        columns. A tuple for a tuple.

    Raises
    ------
    TypeError
        If `gradient` or `attention` is not floating, or `mask` is neither boolean nor
        integer.
    ValueError
        If a shape does not fit, `attention` has negative entries, or an entry is not
        finite.

    Notes
    -----
    The derivative of the entropy is infinite where a probability is 0. This function
    returns 0 there, and also for a row without attention. With m the largest entry of
    the row,
    :math:`\log P_{ij} + H_i = \log(A_{ij}/m) - \sum_k P_{ik} \log(A_{ik}/m)`. If one
    entry dominates, :math:`\log P_{ij}` and :math:`-H_i` are nearly equal, and their
    difference loses digits. The form with m does not.

    Examples
    --------
    >>> import numpy as np
    >>> attention = np.array([[0.25, 0.75], [0.5, 0.5]])
    >>> attention_entropy_vjp(np.ones(2), attention).round(4)
    array([[ 0.824 , -0.2747],
           [ 0.    ,  0.    ]])
    """
    convert_back, attention, mask, gradient = convert_inputs(
        {"attention": attention, "mask": mask}, gradients={"gradient": gradient}
    )
    mask = _check_attention(attention, mask)  # (B, N)
    matrix_mask = expand_mask(mask, attention.shape[:-1])  # (..., N)
    check_row_gradient(gradient, attention.shape[:-1], matrix_mask)
    if is_cuda(attention):
        return convert_back(_attention_entropy_vjp_cuda(gradient, attention, mask))
    return convert_back(
        _attention_entropy_vjp_reference(gradient, attention, matrix_mask)
    )


def _attention_entropy_vjp_reference(
    gradient: NDArray[Any], attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    tiny = np.finfo(dtype).tiny  # a positive lower limit for divisors
    gradient = masked_gradient(gradient, dtype, mask)  # g, (..., N)
    out = np.zeros(attention.shape, attention.dtype)  # (..., N, N)
    for index, valid in iter_sequences(gradient.shape[:-1], mask):
        # Without the padding, the sums have the bits of the sequence alone.
        token = np.flatnonzero(np.ones(attention.shape[-1]) if valid is None else valid)
        for start in range(0, len(token), BLOCK_ROWS):
            rows = token[start : start + BLOCK_ROWS]
            entries: Any = slice(start, start + BLOCK_ROWS)
            if valid is not None:
                entries = rows[:, None], token
            a = attention[index][entries].astype(dtype, order="C")  # A, (block, N)
            m = a.max(axis=-1, keepdims=True)  # the largest entry, (block, 1)
            a /= np.maximum(m, tiny)  # A / m
            # All logs are ≤ 0, so nothing cancels in the sum of P log(A/m). The term of
            # the largest entry is exactly 0, because log(m/m) = 0. So the small terms
            # are not added to a large one, and keep their digits.
            log_a = np.log(a, out=np.zeros_like(a), where=a > 0)  # log(A / m)
            # Σ A / m is at least 1, because the largest entry gives 1. In a row without
            # attention, Σ A / m is 0.
            total = a.sum(axis=-1, keepdims=True)  # (block, 1)
            mean_log = np.einsum("ij,ij->i", a, log_a)[:, None] / np.maximum(total, 1)
            # The result is -g (log P + H) / Σ A, with Σ A = `total` · m. A row with
            # m < tiny counts as a row without attention. If Σ A is very small, the
            # result is too large for the dtype, and ±inf is right.
            with np.errstate(over="ignore", invalid="ignore"):
                factor = gradient[index][rows, None] / np.maximum(total * m, tiny)
                if not all_finite(total * m):  # Σ A overflows, but g / Σ A does not
                    factor = gradient[index][rows, None] / total / np.maximum(m, tiny)
                factor = np.where(m >= tiny, factor, 0)  # g / Σ A, (block, 1)
                row_gradient = np.where(a > 0, (mean_log - log_a) * factor, 0)
                if not all_finite(factor):  # 0 · inf is NaN, but the gradient is 0
                    row_gradient[np.isnan(row_gradient)] = 0
            out[index][entries] = narrow(row_gradient, out.dtype)
    return out


def _attention_entropy_vjp_cuda(gradient: Any, attention: Any, mask: Any) -> Any:
    """Return the gradient with respect to the attention."""
    *leading, num_tokens, _ = attention.shape
    out = empty(attention.shape, attention.dtype)
    # outer = L · B · H matrices. The kernel computes from B and H which row of the mask
    # (B, N) belongs to a matrix.
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    arrays = map(contiguous, (attention, mask))
    sizes = outer, batch, heads, num_tokens
    args = (in_accumulation_dtype(gradient, attention), *arrays, *sizes, out)
    # The optimized kernel has a warp for each row, the basic kernel one thread.
    kernel = "attention_entropy_vjp", "attention_entropy_vjp"
    launch(*kernel, attention.dtype, args, rows=outer * num_tokens)
    return out
