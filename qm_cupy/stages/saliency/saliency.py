"""Saliency: how much each token matters, from its attention entropy."""

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

Salient = Literal["low", "high"]  # which entropy is salient


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
    r"""Saliency of each token from its attention entropy in every layer.

    .. math:: s_i = 1 - \frac{1}{L} \sum_l \operatorname{Normalize}(H_i^{(l)})

    with Normalize the min–max scaling over the tokens of a sequence.

    Parameters
    ----------
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        Attention entropy; heads are averaged first, layers after normalisation.
    salient : {"low", "high"}, default "low"
        Which entropy is salient. "low", as the authors' code computes it: a token
        that knows where to look. "high" leaves out the "1 -", as they print it.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens have saliency 0 and set no extreme.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. A sequence whose
        entropies are all equal normalises to 0.

    Raises
    ------
    TypeError
        If `entropy` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or `salient` is another word.

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
    """Return the saliency of arrays that are converted and checked."""
    if is_cuda(entropy):
        return saliency_cuda(entropy, salient, mask)
    return _saliency_reference(entropy, salient, mask)


def _saliency_reference(
    entropy: NDArray[Any], salient: str, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    entropy = entropy.astype(np.result_type(entropy.dtype, np.float32), copy=False)
    if entropy.ndim == 4:
        entropy = entropy.mean(axis=2)  # (L, B, N)
    scaled = scale_min_max(entropy, mask)
    if scaled.ndim == 3:
        scaled = scaled.mean(axis=0)  # (B, N)
    if salient == "low":
        scaled = 1 - scaled
    return scaled if mask is None else scaled * mask


def saliency_cuda(entropy: Any, salient: str, mask: Any) -> Any:
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    acc_dtype = accumulation_dtype(entropy.dtype)
    out = empty((batch, num_tokens) if leading else (num_tokens,), acc_dtype)
    entropy, mask = contiguous(entropy), contiguous(mask)
    sizes, high = (layers, batch, heads, num_tokens), int(salient == "high")
    page, dtype = "saliency", entropy.dtype
    if implementation() == "basic":
        lowest, highest = (empty((layers, batch), acc_dtype) for _ in range(2))
        args: tuple[Any, ...] = (entropy, mask, *sizes, lowest, highest)
        launch(page, "entropy_range", dtype, args, outputs=lowest.size)
        args = (entropy, mask, lowest, highest, *sizes, high, out)
        launch(page, "saliency", dtype, args, outputs=out.size)
        return out
    parts = -(-num_tokens // (THREAD_TOKENS * BLOCK))
    lowest, highest = (empty((layers, batch, parts), acc_dtype) for _ in range(2))
    # The heads are read once: the second kernel takes their means.
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
    r"""Vector–Jacobian product of `saliency`.

    .. math:: \frac{\partial \mathcal{L}}{\partial H_i} = \mp \frac{1}{L\,w} \Bigl(g_i
        - \frac{[i \in \min]}{n_{\min}} \sum_k g_k (1 - y_k)
        - \frac{[i \in \max]}{n_{\max}} \sum_k g_k y_k \Bigr)

    for each layer, with y its normalised entropies and w = max - min.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient g of a loss with respect to the saliency, floating.
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        As `saliency` took it.
    salient : {"low", "high"}, default "low"
        As `saliency` took it: the sign is - for "low".
    mask : ndarray of shape (N,) or (B, N), optional
        As `saliency` took it. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `entropy`
        Gradient of the loss with respect to the entropies; 0 for padded tokens. The
        heads of a layer share alike in that of their mean.

    Raises
    ------
    TypeError
        If `gradient` or `entropy` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or `salient` is another word.

    Notes
    -----
    A subgradient where min–max has no gradient: tokens that tie at the least or the
    greatest entropy share equally, and all of a constant row get 0.

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
        gradient = -gradient
    if entropy.ndim > 2:
        gradient = gradient / shape[0]  # of the mean over layers
    if entropy.ndim == 4:
        entropy = entropy.mean(axis=2)  # (L, B, N)
    slope = scale_min_max_vjp(gradient, entropy, mask)
    if len(shape) == 4:
        slope = np.broadcast_to(slope[:, :, None] / shape[2], shape)
    return narrow(slope, dtype)


def saliency_vjp_cuda(gradient: Any, entropy: Any, salient: str, mask: Any) -> Any:
    """Return the gradient of the entropies."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    gradient = as_computed(gradient, entropy)
    entropy, mask = contiguous(entropy), contiguous(mask)
    extremes = empty((layers, batch, EXTREMES), gradient.dtype)
    out = empty(entropy.shape, entropy.dtype)
    sizes = layers, batch, heads, num_tokens
    args: tuple[Any, ...] = (gradient, entropy, mask, *sizes, extremes)
    kernel = "saliency_vjp", "entropy_extremes"
    launch(*kernel, entropy.dtype, args, blocks=layers * batch)
    args = (gradient, entropy, mask, extremes, *sizes, int(salient == "high"), out)
    launch("saliency_vjp", "saliency_vjp", entropy.dtype, args, outputs=out.size)
    return out
