"""Saliency: how important each token is, from its attention entropy.

H_i is the attention entropy of token i of N tokens, for each of L layers, B sequences
and H heads (H without an index is the number of heads). y_i is H_i of one layer (the
mean over its heads), scaled to [0, 1] over the tokens of a sequence (min_max.py). w is
the greatest entropy minus the least entropy. s_i is the saliency, and g_i is the
gradient of a loss ℒ with respect to s_i.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_choice,
    check_finite_values,
    check_gradient,
    check_mask,
)
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import finite_mean
from ...arrays.libraries import is_cuda
from ...arrays.shapes import (
    check_heads,
    expand_mask,
    layer_axes,
    masked_copy,
    saliency_shape,
)
from ...autodiff.dispatch import operation
from ...cuda.constants import BLOCK, EXTREMES, THREAD_TOKENS
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .layers import stacked_layers
from .min_max import scale_min_max, scale_min_max_vjp
from .score_gradients import in_accumulation_dtype, masked_gradient

Salient = Literal["low", "high"]  # which entropy makes a token salient


@stacked_layers("entropy")
@operation(
    differentiable=("entropy",),
    constants=("mask?",),
    options=("str salient",),
    dtype="computed",  # float64 for float64, else float32
    shapes=lambda entropy, *_: (saliency_shape(entropy.shape),),
)
def saliency(
    entropy: Array, *, salient: Salient = "low", mask: BoolArray | None = None
) -> Array:
    r"""Return the saliency of each token from its attention entropy in every layer.

    .. math:: s_i = 1 - \frac{1}{L} \sum_l \operatorname{Normalize}(H_i^{(l)})

    Normalize is min–max scaling over the tokens of a sequence.

    Parameters
    ----------
    entropy : ndarray of shape (N,), (B, N), (B, H, N) or (L, B, H, N)
        Attention entropy, or a tuple of layers. Heads are averaged first; layers are
        averaged after the normalisation.
    salient : {"low", "high"}, default "low"
        Which entropy is salient. With "low", a token with concentrated attention is
        salient; the authors' code computes this. With "high", the formula has no
        "1 -"; the authors print this form.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens have saliency 0. They do not count for the
        minimum and the maximum, and their values are not read.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. If all entropies
        of a sequence are equal, they normalise to 0.

    Raises
    ------
    TypeError
        If `entropy` is not floating or `mask` is neither boolean nor integer.
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
    convert_back, entropy, mask = convert_inputs({"entropy": entropy, "mask": mask})
    mask = _check_inputs(entropy, salient, mask)
    return convert_back(compute_saliency(entropy, salient=salient, mask=mask))


def _check_inputs(
    entropy: NDArray[Any], salient: str, mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Raise if an argument is not valid; return the mask (B, N)."""
    check_heads("entropy", entropy, "N")
    check_choice("salient", salient, get_args(Salient))
    mask = check_mask(mask, saliency_shape(entropy.shape))
    check_finite_values("entropy", entropy, expand_mask(mask, entropy.shape))
    return mask


def compute_saliency(entropy: Any, *, salient: str = "low", mask: Any = None) -> Any:
    """Return the saliency of arrays that are already converted and checked."""
    if is_cuda(entropy):
        return saliency_cuda(entropy, salient, mask)
    return _saliency_reference(entropy, salient, mask)


def _saliency_reference(
    entropy: NDArray[Any], salient: str, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    entropy = _mean_of_heads(entropy, mask)  # (L, B, N), (B, N) or (N,)
    scaled = scale_min_max(entropy, mask)  # y
    if scaled.ndim == 3:
        # Every layer has the range [0, 1] now, so all layers count equally.
        scaled = scaled.mean(axis=0)  # (B, N)
    if salient == "low":
        scaled = 1 - scaled
    return scaled if mask is None else scaled * mask


def _mean_of_heads(
    entropy: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return (N,), (B, N) or (L, B, N) in float32 or float64, with 0 for padding."""
    entropy = masked_copy(entropy, expand_mask(mask, entropy.shape))
    return finite_mean(entropy, axis=-2) if entropy.ndim > 2 else entropy


def saliency_cuda(entropy: Any, salient: str, mask: Any) -> Any:
    """Return the saliency (B, N) in two launches.

    The first launch computes the range (minimum and maximum) of each layer of a
    sequence. The second launch computes the mean of the scaled layers.
    """
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    acc_dtype = accumulation_dtype(entropy.dtype)
    # The result has no axes of layers and heads: (B, N), or (N,) for one sequence.
    out = empty((batch, num_tokens) if leading else (num_tokens,), acc_dtype)
    entropy, mask = contiguous(entropy), contiguous(mask)
    # Kernels have no strings: 1 stands for "high".
    sizes, high = (layers, batch, heads, num_tokens), int(salient == "high")
    file, dtype = "saliency", entropy.dtype
    if implementation() == "basic":
        # A thread for each layer of a sequence, then a thread for each token.
        lowest, highest = (empty((layers, batch), acc_dtype) for _ in range(2))
        args: tuple[Any, ...] = (entropy, mask, *sizes, lowest, highest)
        launch(file, "entropy_range", dtype, args, outputs=lowest.size)
        args = (entropy, mask, lowest, highest, *sizes, high, out)
        launch(file, "saliency", dtype, args, outputs=out.size)
        return out
    # In both launches a block processes a part of a row: THREAD_TOKENS tokens for each
    # of its BLOCK threads. So the first kernel writes a range for each part, and the
    # second one joins the ranges of the parts of a layer.
    parts = -(-num_tokens // (THREAD_TOKENS * BLOCK))
    lowest, highest = (empty((layers, batch, parts), acc_dtype) for _ in range(2))
    # The first kernel stores the means over the heads, so that the second one reads one
    # value for each layer and token instead of H. A single head is its own mean.
    means = empty((layers, batch, num_tokens), acc_dtype) if heads > 1 else None
    args = (entropy, mask, *sizes, lowest, highest, means)
    launch(file, "entropy_range", dtype, args, blocks=lowest.size)
    means = entropy if means is None else means
    args = (means, mask, lowest, highest, layers, batch, num_tokens, high, out)
    # A block for each part of a sequence goes through all layers.
    launch(file, "saliency", means.dtype, args, blocks=batch * parts)
    return out


@stacked_layers("entropy", gradients=True)
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

    The formula is true for each layer. H are the entropies of the layer (the means over
    its heads), y are the normalised entropies, and w is the greatest entropy minus the
    least entropy. The sets min and max contain the tokens with the least and the
    greatest entropy, and :math:`n_{\min}` and :math:`n_{\max}` are their sizes.
    :math:`[\cdot]` is 1 if the condition is true and 0 otherwise.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient g of a loss with respect to the saliency; any float dtype.
    entropy : ndarray of shape (N,), (B, N), (B, H, N) or (L, B, H, N)
        The argument of `saliency`, which may be a tuple.
    salient : {"low", "high"}, default "low"
        The argument of `saliency`. The sign ∓ is - for "low" and + for "high".
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `saliency`. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `entropy`
        Gradient of the loss with respect to the entropies; 0 for padded tokens. The H
        heads of a layer each get 1/H of the gradient of their mean. A tuple for a
        tuple.

    Raises
    ------
    TypeError
        If `gradient` or `entropy` is not floating, or `mask` is neither boolean nor
        integer.
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
    convert_back, entropy, mask, gradient = convert_inputs(
        {"entropy": entropy, "mask": mask}, gradients={"gradient": gradient}
    )
    mask = _check_inputs(entropy, salient, mask)
    # The gradient of padded tokens may be NaN, so the mask is part of this check.
    check_gradient(gradient, saliency_shape(entropy.shape), "BN", mask=mask)
    if is_cuda(entropy):
        return convert_back(saliency_vjp_cuda(gradient, entropy, salient, mask))
    return convert_back(_saliency_vjp_reference(gradient, entropy, salient, mask))


def _saliency_vjp_reference(
    gradient: NDArray[Any],
    entropy: NDArray[Any],
    salient: str,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    dtype, shape = entropy.dtype, entropy.shape
    # Go back through the steps of `_saliency_reference`, from the last to the first.
    # The forward pass scaled the mean over the heads. Compute this mean again.
    means = _mean_of_heads(entropy, mask)  # (N,), (B, N) or (L, B, N)
    gradient = masked_gradient(gradient, means.dtype, mask)
    if salient == "low":
        gradient = -gradient  # s = 1 - (mean over layers)
    if len(shape) == 4:
        gradient = gradient / shape[0]  # ∂ℒ/∂y: each layer gets 1/L, (B, N)
    entropy_gradient = scale_min_max_vjp(gradient, means, mask)
    if len(shape) > 2:
        # Each head gets 1/H of the gradient of the mean: (..., N) -> (..., H, N).
        by_head = entropy_gradient[..., None, :] / shape[-2]
        entropy_gradient = np.broadcast_to(by_head, shape)
    return narrow(entropy_gradient, dtype)


def saliency_vjp_cuda(gradient: Any, entropy: Any, salient: str, mask: Any) -> Any:
    """Return the gradient with respect to the entropies."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    gradient = in_accumulation_dtype(gradient, entropy)
    entropy, mask = contiguous(entropy), contiguous(mask)
    # Four values for each layer of a sequence: the least and the greatest entropy, and
    # the two sums of the formula in `saliency_vjp`, each divided by its number of tied
    # tokens.
    extremes = empty((layers, batch, EXTREMES), gradient.dtype)
    out = empty(entropy.shape, entropy.dtype)
    sizes = layers, batch, heads, num_tokens
    # A block for each layer of a sequence. The basic kernel has a thread for each layer
    # of a sequence.
    args: tuple[Any, ...] = (gradient, entropy, mask, *sizes, extremes)
    kernel = "saliency_vjp", "entropy_extremes"
    launch(*kernel, entropy.dtype, args, blocks=layers * batch)
    args = (gradient, entropy, mask, extremes, *sizes, int(salient == "high"), out)
    # With `extremes`, the gradients of the tokens do not depend on each other, so this
    # launch has a thread for each entropy.
    launch("saliency_vjp", "saliency_vjp", entropy.dtype, args, outputs=out.size)
    return out
