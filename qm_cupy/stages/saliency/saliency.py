"""Saliency: how important each token is, from its attention entropy."""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_choice, check_gradient, check_mask, check_values
from ...arrays.conversion import Array, BoolArray, FloatArray, enter, on_callers_stream
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import layer_axes, saliency_shape
from ...autodiff.dispatch import operation
from ...cuda.constants import BLOCK, EXTREMES, THREAD_TOKENS
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .min_max import scale_min_max, scale_min_max_vjp
from .score_gradients import as_computed, masked_gradient

Salient = Literal["low", "high"]  # the entropy that is salient


@operation(
    inputs=("entropy",),
    constants=("mask?",),
    options=("str salient",),
    dtype="computed",
    shapes=lambda entropy, *_: (saliency_shape(entropy),),
)
def saliency(
    entropy: Array, *, salient: Salient = "low", mask: BoolArray | None = None
) -> Array:
    r"""Return the saliency of each token from its attention entropy in every layer.

    .. math:: s_i = 1 - \frac{1}{L} \sum_l \operatorname{Normalize}(H_i^{(l)})

    Normalize is min–max scaling over the tokens of a sequence.

    Parameters
    ----------
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        Attention entropy. Heads are averaged first; layers are averaged after the
        normalisation.
    salient : {"low", "high"}, default "low"
        Which entropy is salient. "low" is what the authors' code computes: a token with
        concentrated attention is salient. "high" leaves out the "1 -", which is the
        formula that the authors print.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens have saliency 0. They do not count for the
        minimum and the maximum.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. If all entropies
        of a sequence are equal, they normalise to 0.

    Raises
    ------
    TypeError
        If `entropy` is not floating or `mask` is not boolean.
    ValueError
        If a shape does not fit, an entry is not finite, or `salient` is another word.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> saliency(np.array([0.5, 2.5, 1.5]))
    array([1. , 0. , 0.5])
    """
    leave, entropy, mask = enter({"entropy": entropy, "mask": mask})
    check_values("entropy", entropy, "N", "BN", "LBN", "LBHN")
    check_choice("salient", salient, get_args(Salient))
    check_mask(mask, saliency_shape(entropy))
    return leave(compute_saliency(entropy, salient=salient, mask=mask))


def compute_saliency(entropy: Any, *, salient: str = "low", mask: Any = None) -> Any:
    """Return the saliency of arrays that are already converted and checked."""
    if is_cuda(entropy):
        return saliency_cuda(entropy, salient, mask)
    return _saliency_reference(entropy, salient, mask)


def _saliency_reference(
    entropy: NDArray[Any], salient: str, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    # Means and differences are in float32 at least.
    entropy = entropy.astype(np.result_type(entropy.dtype, np.float32), copy=False)
    if entropy.ndim == 4:
        entropy = entropy.mean(axis=2)  # (L, B, N)
    scaled = scale_min_max(entropy, mask)
    if scaled.ndim == 3:
        # Every layer has the range [0, 1] now, so all layers count equally.
        scaled = scaled.mean(axis=0)  # (B, N)
    if salient == "low":
        scaled = 1 - scaled
    return scaled if mask is None else scaled * mask


def saliency_cuda(entropy: Any, salient: str, mask: Any) -> Any:
    """Return the saliency (B, N) in two launches: ranges of layers, then the means."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    acc_dtype = accumulation_dtype(entropy.dtype)
    # The result has no axes of layers and heads: (B, N), or (N,) for one sequence.
    out = empty((batch, num_tokens) if leading else (num_tokens,), acc_dtype)
    entropy, mask = contiguous(entropy), contiguous(mask)
    # Kernels have no strings: 1 stands for "high".
    sizes, high = (layers, batch, heads, num_tokens), int(salient == "high")
    page, dtype = "saliency", entropy.dtype
    if implementation() == "basic":
        # One thread for each layer of a sequence, then one thread for each token.
        lowest, highest = (empty((layers, batch), acc_dtype) for _ in range(2))
        args: tuple[Any, ...] = (entropy, mask, *sizes, lowest, highest)
        launch(page, "entropy_range", dtype, args, outputs=lowest.size)
        args = (entropy, mask, lowest, highest, *sizes, high, out)
        launch(page, "saliency", dtype, args, outputs=out.size)
        return out
    # A block has THREAD_TOKENS tokens for each thread; a layer may need several blocks,
    # whose ranges the second kernel joins.
    parts = -(-num_tokens // (THREAD_TOKENS * BLOCK))
    lowest, highest = (empty((layers, batch, parts), acc_dtype) for _ in range(2))
    # The heads are read only once: the first kernel stores their means.
    means = empty((layers, batch, num_tokens), acc_dtype) if heads > 1 else None
    args = (entropy, mask, *sizes, lowest, highest, means)
    launch(page, "entropy_range", dtype, args, blocks=lowest.size)
    means = entropy if means is None else means
    args = (means, mask, lowest, highest, layers, batch, num_tokens, high, out)
    launch(page, "saliency", means.dtype, args, blocks=batch * parts)
    return out


@on_callers_stream
def saliency_vjp(
    gradient: FloatArray,
    entropy: Array,
    *,
    salient: Salient = "low",
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the vector–Jacobian product of `saliency`.

    .. math:: \frac{\partial \mathcal{L}}{\partial H_i} = \mp \frac{1}{L\,w} \Bigl(g_i
        - \frac{[i \in \min]}{n_{\min}} \sum_k g_k (1 - y_k)
        - \frac{[i \in \max]}{n_{\max}} \sum_k g_k y_k \Bigr)

    This holds for each layer, with y its normalised entropies and w = max - min.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient g of a loss with respect to the saliency; any float dtype.
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        The argument of `saliency`.
    salient : {"low", "high"}, default "low"
        The argument of `saliency`. The sign is - for "low".
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `saliency`. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `entropy`
        Gradient of the loss with respect to the entropies; 0 for padded tokens. The H
        heads of a layer each get 1/H of the gradient of their mean.

    Raises
    ------
    TypeError
        If `gradient` or `entropy` is not floating, or `mask` is not boolean.
    ValueError
        If a shape does not fit, an entry is not finite, or `salient` is another word.

    Notes
    -----
    Min–max scaling has no gradient at a tie, and this function returns a subgradient:
    tokens that tie at the least or the greatest entropy get equal parts, and all tokens
    of a constant row get 0.

    Examples
    --------
    >>> import numpy as np
    >>> saliency_vjp(np.array([0.0, 0.0, 1.0]), np.array([0.5, 2.5, 1.5]))
    array([ 0.25,  0.25, -0.5 ])
    """
    leave, entropy, mask, gradient = enter(
        {"entropy": entropy, "mask": mask}, gradients={"gradient": gradient}
    )
    check_values("entropy", entropy, "N", "BN", "LBN", "LBHN")
    check_choice("salient", salient, get_args(Salient))
    shape = saliency_shape(entropy)
    check_mask(mask, shape)
    # The gradient of padded tokens may be NaN.
    check_gradient(gradient, shape, "BN", mask=mask)
    if is_cuda(entropy):
        return leave(saliency_vjp_cuda(gradient, entropy, salient, mask))
    return leave(_saliency_vjp_reference(gradient, entropy, salient, mask))


def _saliency_vjp_reference(
    gradient: NDArray[Any],
    entropy: NDArray[Any],
    salient: str,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    dtype, shape = entropy.dtype, entropy.shape
    entropy = entropy.astype(np.result_type(dtype, np.float32), copy=False)
    gradient = masked_gradient(gradient, entropy.dtype, mask)
    if salient == "low":
        gradient = -gradient  # of 1 - y
    if entropy.ndim > 2:
        gradient = gradient / shape[0]  # of the mean over layers, (B, N)
    if entropy.ndim == 4:  # the mean that was normalised is computed again
        entropy = entropy.mean(axis=2)  # (L, B, N)
    slope = scale_min_max_vjp(gradient, entropy, mask)
    if len(shape) == 4:
        # The mean over heads: each head gets 1/H. (L, B, H, N)
        slope = np.broadcast_to(slope[:, :, None] / shape[2], shape)
    return narrow(slope, dtype)


def saliency_vjp_cuda(gradient: Any, entropy: Any, salient: str, mask: Any) -> Any:
    """Return the gradient with respect to the entropies."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    gradient = as_computed(gradient, entropy)
    entropy, mask = contiguous(entropy), contiguous(mask)
    # For each layer of a sequence: min, max, and the two sums of the formula, each
    # divided by its number of tied tokens.
    extremes = empty((layers, batch, EXTREMES), gradient.dtype)
    out = empty(entropy.shape, entropy.dtype)
    sizes = layers, batch, heads, num_tokens
    # One block for each layer of a sequence; the basic kernel has one thread for each.
    args: tuple[Any, ...] = (gradient, entropy, mask, *sizes, extremes)
    kernel = "saliency_vjp", "entropy_extremes"
    launch(*kernel, entropy.dtype, args, blocks=layers * batch)
    args = (gradient, entropy, mask, extremes, *sizes, int(salient == "high"), out)
    # With the extremes known, the rest is elementwise: one thread for each entropy.
    launch("saliency_vjp", "saliency_vjp", entropy.dtype, args, outputs=out.size)
    return out
