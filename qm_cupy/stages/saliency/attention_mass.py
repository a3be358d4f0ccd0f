"""Attention mass: the weights of tokens in a merge, from the attention of a model.

There are L layers, B sequences and H heads. r_i is the attention that token i receives,
and H_i is the entropy of its own attention, each the mean over layers and heads.
m_i = r_i e^(-H_i) is the mass, or m_i = r_i n_i e^(-H_i) with a causal mask, where
token i attends to n_i tokens at most. A bar means the gradient of a loss with respect
to the quantity, such as m̄_i.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_finite_values,
    check_gradient,
    check_mask,
    check_not_negative,
    check_shape,
)
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import all_finite, finite_mean, of_finite_gradient
from ...arrays.libraries import is_cuda
from ...arrays.shapes import (
    check_heads,
    expand_mask,
    layer_axes,
    layout_of,
    masked_copy,
    saliency_shape,
)
from ...autodiff.dispatch import operation
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from .layers import stacked_layers
from .query_key_entropy import check_causal
from .score_gradients import masked_gradient


@stacked_layers("received", "entropy")
@operation(
    differentiable=("received", "entropy"),
    constants=("mask?",),
    options=("bool causal",),
    dtype="widest",  # float64 if an array is float64, else float32
    shapes=lambda received, *_: (saliency_shape(received.shape),),
)
def attention_mass(
    received: Array,
    entropy: FloatArray,
    *,
    causal: bool = False,
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the attention received, divided by the perplexity of a token's own.

    .. math:: m_i = r_i\,e^{-H_i}

    A token has a large mass if other tokens attend to it, and if it attends to few
    tokens itself: :math:`e^{H_i}`, the perplexity, is the number of tokens that it
    attends to, in effect. If attention is causal, token i attends to at most
    :math:`n_i` tokens, and the perplexity is divided by :math:`n_i`. Otherwise early
    tokens, which attend to few, would have the largest masses.

    Parameters
    ----------
    received : ndarray of shape (N,), (B, N), (B, H, N) or (L, B, H, N)
        Attention received r ≥ 0, the result of `attention_received`. Heads are
        averaged, then layers. Or a tuple of layers.
    entropy : ndarray of the shape of `received`, or a tuple of them
        Attention entropy H ≥ 0 in nats, for example the result of `attention_entropy`.
        Heads and layers are averaged.
    causal : bool, default False
        Whether token i attends only to tokens 0..i.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens have mass 0. They do not count in
        :math:`n_i`, and their values are not read.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Mass; float32, or float64 if an array is float64.

    Raises
    ------
    TypeError
        If an array is not floating, or `mask` is neither boolean nor integer.
    ValueError
        If the shapes differ, or an entry is negative or not finite.

    See Also
    --------
    quickmerge : ``weights="attention"`` uses this mass.

    Notes
    -----
    Only the ratios of the masses of a sequence matter in a merge. The formula is that
    of ``benchmarks/quality.py`` with the least error.

    Examples
    --------
    >>> import numpy as np
    >>> received, perplexity = np.array([0.75, 0.25]), np.array([1.0, 2.0])
    >>> attention_mass(received, np.log(perplexity))
    array([0.75 , 0.125])
    """
    convert_back, received, entropy, mask = convert_inputs(
        {"received": received, "entropy": entropy, "mask": mask}
    )
    mask = _check_inputs(received, entropy, causal, mask)
    return convert_back(
        compute_attention_mass(received, entropy, causal=causal, mask=mask)
    )


def _check_inputs(
    received: NDArray[Any], entropy: NDArray[Any], causal: Any, mask: Any
) -> NDArray[np.bool_] | None:
    """Raise if an argument is not valid; return the mask (B, N)."""
    check_heads("received", received, "N")
    check_heads("entropy", entropy, "N")
    axes = layout_of(received.ndim, "N")
    check_shape("entropy", entropy, axes, received.shape)
    check_causal(causal)
    mask = check_mask(mask, saliency_shape(received.shape))
    read = expand_mask(mask, received.shape)  # padding may be NaN
    for name, x in (("received", received), ("entropy", entropy)):
        check_finite_values(name, x, read)
        check_not_negative(name, x, read)
    return mask


def compute_attention_mass(
    received: Any, entropy: Any, *, causal: bool = False, mask: Any = None
) -> Any:
    """Return the mass of arrays that are already converted and checked."""
    if is_cuda(received):
        return _attention_mass_cuda(received, entropy, causal, mask)
    return _attention_mass_reference(received, entropy, causal, mask)


def _attention_mass_reference(
    received: NDArray[Any],
    entropy: NDArray[Any],
    causal: bool,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    shape, dtype = saliency_shape(received.shape), _mass_dtype(received, entropy)
    r, focus = _mean(received, mask), _focus(entropy, causal, mask)  # (B, N)
    with np.errstate(over="ignore"):
        mass: NDArray[Any] = (r * focus).astype(dtype).reshape(shape)
    if not all_finite(mass):  # r is at most 1 if rows of the attention sum to 1
        raise ValueError(
            f"`received` must have masses below {np.finfo(dtype).max:.3g}, got entries "
            f"up to {r.max():.3g}: scale it down; only ratios of masses matter"
        )
    return mass


def _focus(
    entropy: NDArray[Any], causal: bool, mask: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    """Return e^(-H_i) (B, N), times n_i if attention is causal."""
    h = _mean(entropy, mask)
    if not causal:
        return np.exp(-h)
    tokens = np.ones(h.shape[-1:], np.bool_) if mask is None else mask
    return np.exp(-h) * np.cumsum(tokens, axis=-1)  # n_i counts tokens 0..i


def _mean(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Return the mean (B, N) over layers and heads, 0 for padding."""
    *leading, num_tokens = x.shape
    x = masked_copy(x, expand_mask(mask, x.shape))
    layers, batch, heads = layer_axes(leading)
    rows = x.reshape(layers, batch, heads, num_tokens)
    # One layer and head at a time, so that the bits of a token do not depend on B or N.
    total = np.zeros((batch, num_tokens))
    with np.errstate(over="ignore"):
        for layer in rows:
            for h in range(heads):
                total += layer[:, h]
    if all_finite(total):
        return total / (layers * heads)
    return finite_mean(rows.transpose(0, 2, 1, 3).reshape(-1, batch, num_tokens), 0)


def _mass_dtype(received: Any, entropy: Any) -> np.dtype[Any]:
    """Return float64 if one of the arrays is float64, else float32."""
    return np.result_type(*(accumulation_dtype(x.dtype) for x in (received, entropy)))


def _attention_mass_cuda(received: Any, entropy: Any, causal: bool, mask: Any) -> Any:
    dtype, leading = _mass_dtype(received, entropy), received.shape[:-1]
    out = empty(saliency_shape(received.shape), dtype)
    # The kernel is compiled for `dtype`, so it reads both inputs in this dtype.
    arrays = contiguous(received, dtype), contiguous(entropy, dtype), contiguous(mask)
    args = (*arrays, *layer_axes(leading), received.shape[-1], int(causal), out)
    # The work is elementwise: a thread for each token.
    launch("attention_mass", "attention_mass", dtype, args, outputs=out.size)
    return out


@stacked_layers("received", "entropy", gradients=True)
@on_callers_stream
def attention_mass_vjp(
    gradient: FloatArray,
    received: Array,
    entropy: FloatArray,
    *,
    causal: bool = False,
    mask: BoolArray | None = None,
) -> tuple[Array, Array]:
    r"""Return the gradients of `attention_mass` for attention received and entropy.

    .. math:: \bar r_i = \bar m_i\,e^{-H_i}, \qquad
        \bar H_i = -\bar m_i\,r_i\,e^{-H_i}

    With `causal`, both are multiplied by :math:`n_i`. For L layers of H heads, each of
    them gets 1 / (L H) of these gradients.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient m̄ of a loss with respect to the mass; any float dtype.
    received, entropy : ndarray of shape (N,), (B, N), (B, H, N) or (L, B, H, N)
        The arguments of `attention_mass`, which may be tuples.
    causal : bool, default False
        The argument of `attention_mass`.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `attention_mass`. The gradient of padded tokens is not read.

    Returns
    -------
    received, entropy : ndarray of the shape of `received`
        Gradients of the loss with respect to the two arguments, each in the dtype of
        its argument; 0 for padded tokens. Tuples for tuples.

    Raises
    ------
    TypeError
        If an array is not floating, or `mask` is neither boolean nor integer.
    ValueError
        If the shapes do not fit, or an entry is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> received, entropy = np.array([0.75, 0.25]), np.log([1.0, 2.0])
    >>> attention_mass_vjp(np.array([1.0, 4.0]), received, entropy)
    (array([1., 2.]), array([-0.75, -0.5 ]))
    """
    convert_back, received, entropy, mask, gradient = convert_inputs(
        {"received": received, "entropy": entropy, "mask": mask},
        gradients={"gradient": gradient},
    )
    mask = _check_inputs(received, entropy, causal, mask)
    shape = saliency_shape(received.shape)
    gradient = check_gradient(gradient, shape, "BN", received, mask=mask)
    args = gradient, received, entropy, causal, mask
    if is_cuda(received):
        results = _attention_mass_vjp_cuda(*args)
    else:
        results = _attention_mass_vjp_reference(*args)
    return convert_back(results[0]), convert_back(results[1])  # r̄ and H̄


def _attention_mass_vjp_reference(
    gradient: NDArray[Any],
    received: NDArray[Any],
    entropy: NDArray[Any],
    causal: bool,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    shape, num_tokens = received.shape, received.shape[-1]
    layers, batch, heads = layer_axes(shape[:-1])
    g = masked_gradient(gradient, np.dtype(np.float64), mask)
    g = g.reshape(batch, num_tokens)
    focus, r = _focus(entropy, causal, mask), _mean(received, mask)  # (B, N)
    by_received, by_entropy = (
        of_finite_gradient(vjp, g)
        for vjp in (
            lambda g: g * focus / (layers * heads),
            lambda g: -(g * focus / (layers * heads)) * r,
        )
    )

    def narrowed(x: NDArray[Any], dtype: Any) -> NDArray[Any]:
        # Every layer and head gets the same gradient.
        copies = np.broadcast_to(x[:, None], (layers, batch, heads, num_tokens))
        return narrow(copies.reshape(shape), dtype)

    return narrowed(by_received, received.dtype), narrowed(by_entropy, entropy.dtype)


def _attention_mass_vjp_cuda(
    gradient: Any, received: Any, entropy: Any, causal: bool, mask: Any
) -> tuple[Any, Any]:
    dtype, leading = _mass_dtype(received, entropy), received.shape[:-1]
    # The kernel has one dtype for all arrays; results are converted back below.
    arrays = [contiguous(x, dtype) for x in (gradient, received, entropy)]
    outs = [empty(received.shape, dtype) for _ in range(2)]
    sizes = *layer_axes(leading), received.shape[-1]
    args = (*arrays, contiguous(mask), *sizes, int(causal), *outs)
    outputs = math.prod(saliency_shape(received.shape))  # a thread for each token
    launch("attention_mass_vjp", "attention_mass_vjp", dtype, args, outputs=outputs)
    # An argument may be narrower than the kernel's dtype.
    return (
        outs[0].astype(received.dtype, copy=False),
        outs[1].astype(entropy.dtype, copy=False),
    )
