"""Attention mass: the weights of tokens in a merge, from the attention of a model.

There are L layers, B sequences and H heads. r_i is the attention that token i receives,
and H_i is the entropy of its own attention, each the mean over layers and heads.
m_i = r_i e^(-H_i) is the mass. A bar means the gradient of a loss with respect to the
quantity, such as m̄_i.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_gradient,
    check_not_negative,
    check_shape,
    check_values,
)
from ...arrays.conversion import Array, FloatArray, convert_inputs, on_callers_stream
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import layer_axes, saliency_shape
from ...autodiff.dispatch import operation
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch


@operation(
    differentiable=("received", "entropy"),
    dtype="widest",  # float64 if an array is float64, else float32
    shapes=lambda received, *_: (saliency_shape(received),),
)
def attention_mass(received: Array, entropy: FloatArray) -> Array:
    r"""Return the attention received, divided by the perplexity of a token's own.

    .. math:: m_i = r_i\,e^{-H_i}

    A token has a large mass if other tokens attend to it, and if it attends to few
    tokens itself: :math:`e^{H_i}`, the perplexity, is the number of tokens that it
    attends to, in effect.

    Parameters
    ----------
    received : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        Attention received r ≥ 0, the result of `attention_received`. Heads and layers
        are averaged.
    entropy : ndarray of the shape of `received`
        Attention entropy H in nats, for example the result of `attention_entropy`.
        Heads and layers are averaged.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Mass; float32, or float64 if an array is float64. It is 0 for padding, because
        padding receives no attention.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes differ, an entry is not finite, or `received` has negative
        entries.

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
    convert_back, received, entropy = convert_inputs(
        {"received": received, "entropy": entropy}
    )
    _check_inputs(received, entropy)
    return convert_back(compute_attention_mass(received, entropy))


def _check_inputs(received: NDArray[Any], entropy: NDArray[Any]) -> None:
    check_values("received", received, "N", "BN", "LBN", "LBHN")
    check_values("entropy", entropy, "N", "BN", "LBN", "LBHN")
    check_shape("entropy", entropy, "LBHN", received.shape)
    check_not_negative("received", received)


def compute_attention_mass(received: Any, entropy: Any) -> Any:
    """Return the mass of arrays that are already converted and checked."""
    if is_cuda(received):
        return _attention_mass_cuda(received, entropy)
    return _attention_mass_reference(received, entropy)


def _attention_mass_reference(
    received: NDArray[Any], entropy: NDArray[Any]
) -> NDArray[Any]:
    shape, dtype = saliency_shape(received), _mass_dtype(received, entropy)
    r, h = _mean(received), _mean(entropy)  # (B, N)
    mass: NDArray[Any] = (r * np.exp(-h)).astype(dtype).reshape(shape)
    return mass


def _mean(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean (B, N) over layers and heads."""
    *leading, num_tokens = x.shape
    layers, batch, heads = layer_axes(leading)
    rows = x.reshape(layers, batch, heads, num_tokens)
    # One layer and head at a time, so that the bits of a token do not depend on B or N.
    total = np.zeros((batch, num_tokens))
    for layer in rows:
        for h in range(heads):
            total += layer[:, h]
    return total / (layers * heads)


def _mass_dtype(received: Any, entropy: Any) -> np.dtype[Any]:
    """Return float64 if one of the arrays is float64, else float32."""
    return np.result_type(*(accumulation_dtype(x.dtype) for x in (received, entropy)))


def _attention_mass_cuda(received: Any, entropy: Any) -> Any:
    dtype, leading = _mass_dtype(received, entropy), received.shape[:-1]
    out = empty(saliency_shape(received), dtype)
    # The kernel is compiled for `dtype`, so it reads both inputs in this dtype.
    arrays = contiguous(received, dtype), contiguous(entropy, dtype)
    args = (*arrays, *layer_axes(leading), received.shape[-1], out)
    # The work is elementwise: a thread for each token.
    launch("attention_mass", "attention_mass", dtype, args, outputs=out.size)
    return out


@on_callers_stream
def attention_mass_vjp(
    gradient: FloatArray, received: Array, entropy: FloatArray
) -> tuple[Array, Array]:
    r"""Return the gradients of `attention_mass` for attention received and entropy.

    .. math:: \bar r_i = \bar m_i\,e^{-H_i}, \qquad
        \bar H_i = -\bar m_i\,r_i\,e^{-H_i}

    For L layers of H heads, each of them gets 1 / (L H) of these gradients.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient m̄ of a loss with respect to the mass; any float dtype.
    received, entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        The arguments of `attention_mass`.

    Returns
    -------
    received, entropy : ndarray of the shape of `received`
        Gradients of the loss with respect to the two arguments, each in the dtype of
        its argument.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes do not fit, an entry is not finite, or `received` has negative
        entries.

    Examples
    --------
    >>> import numpy as np
    >>> received, entropy = np.array([0.75, 0.25]), np.log([1.0, 2.0])
    >>> attention_mass_vjp(np.array([1.0, 4.0]), received, entropy)
    (array([1., 2.]), array([-0.75, -0.5 ]))
    """
    convert_back, received, entropy, gradient = convert_inputs(
        {"received": received, "entropy": entropy}, gradients={"gradient": gradient}
    )
    _check_inputs(received, entropy)
    gradient = check_gradient(gradient, saliency_shape(received), "BN", received)
    args = gradient, received, entropy
    if is_cuda(received):
        results = _attention_mass_vjp_cuda(*args)
    else:
        results = _attention_mass_vjp_reference(*args)
    return convert_back(results[0]), convert_back(results[1])  # r̄ and H̄


def _attention_mass_vjp_reference(
    gradient: NDArray[Any], received: NDArray[Any], entropy: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    shape, num_tokens = received.shape, received.shape[-1]
    layers, batch, heads = layer_axes(shape[:-1])
    g = gradient.astype(np.float64).reshape(batch, num_tokens)
    by_received = g * np.exp(-_mean(entropy)) / (layers * heads)  # (B, N)
    by_entropy = -by_received * _mean(received)

    def narrowed(x: NDArray[Any], dtype: Any) -> NDArray[Any]:
        # Every layer and head gets the same gradient.
        copies = np.broadcast_to(x[:, None], (layers, batch, heads, num_tokens))
        return narrow(copies.reshape(shape), dtype)

    return narrowed(by_received, received.dtype), narrowed(by_entropy, entropy.dtype)


def _attention_mass_vjp_cuda(
    gradient: Any, received: Any, entropy: Any
) -> tuple[Any, Any]:
    dtype, leading = _mass_dtype(received, entropy), received.shape[:-1]
    # The kernel has one dtype for all arrays; results are converted back below.
    arrays = [contiguous(x, dtype) for x in (gradient, received, entropy)]
    outs = [empty(received.shape, dtype) for _ in range(2)]
    args = (*arrays, *layer_axes(leading), received.shape[-1], *outs)
    outputs = math.prod(saliency_shape(received))  # a thread for each token
    launch("attention_mass_vjp", "attention_mass_vjp", dtype, args, outputs=outputs)
    # An argument may be narrower than the kernel's dtype.
    return (
        outs[0].astype(received.dtype, copy=False),
        outs[1].astype(entropy.dtype, copy=False),
    )
