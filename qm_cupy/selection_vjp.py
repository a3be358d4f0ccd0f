"""Vector–Jacobian products of selection: from the gradient of a result to its inputs.

Noise, temperature and ε are constants.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import check_gradient, check_mask, check_shape, check_values
from .selection import (
    _check_epsilon,
    _check_noise,
    _check_temperature,
    _gumbel_softmax_cuda,
    _mass_dtype,
    _perturbed_scores_reference,
    _rows,
    _softmax_reference,
)


@on_callers_stream
def gumbel_softmax_vjp(
    gradient: Array,
    saliency: Array,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    mask: Array | None = None,
    sequence_offset: int = 0,
) -> Array:
    r"""Gradient of `gumbel_softmax` with respect to the saliency.

    .. math:: \bar s_i = \frac{\pi_i}{\tau} \Bigl(\bar\pi_i - \sum_j \bar\pi_j \pi_j
        \Bigr)

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient π̄ of a loss with respect to the probabilities; any float dtype. That of
        padded tokens does not count.
    saliency : ndarray of shape (N,) or (B, N)
        Saliency s, as `gumbel_softmax` takes it.
    temperature, seed, mask, sequence_offset : optional
        As in `gumbel_softmax`: the noise is drawn again.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Gradient of the loss with respect to `saliency`, in its dtype; 0 for padding.

    Raises
    ------
    TypeError
        If an array is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or the temperature is not
        positive.

    Notes
    -----
    A K-hot mask (``hard=K``) has no slope of its own. Its straight-through estimate is
    this same product, of the gradient with respect to the mask [1]_.

    References
    ----------
    .. [1] E. Jang, S. Gu and B. Poole, "Categorical reparameterization with
       Gumbel-softmax", ICLR 2017, arXiv:1611.01144.

    Examples
    --------
    >>> import numpy as np
    >>> s = np.array([0.0, 0.1])
    >>> gumbel_softmax_vjp(np.array([1.0, 0.0]), s, seed=None).round(3)
    array([ 1.966, -1.966])
    """
    leave, gradient, saliency, mask = enter(
        gradient=gradient, saliency=saliency, mask=mask
    )
    check_values("saliency", saliency, "N", "BN")
    check_mask(mask, saliency.shape)
    gradient = check_gradient(gradient, saliency.shape, "BN", saliency, mask=mask)
    temperature = _check_temperature(temperature)
    noise = _check_noise(seed, sequence_offset)
    args = gradient, saliency, temperature, noise, mask
    if _cuda.is_cuda(saliency):
        return leave(_gumbel_softmax_vjp_cuda(*args))
    return leave(_gumbel_softmax_vjp_reference(*args))


def _gumbel_softmax_vjp_reference(
    gradient: NDArray[Any],
    saliency: NDArray[Any],
    temperature: float,
    noise: tuple[int | None, int],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    scores = _perturbed_scores_reference(saliency, noise, mask)
    p = _softmax_reference(scores, temperature, mask).astype(np.float64)
    gap = np.where(p > 0, gradient, 0).astype(np.float64)
    for _ in range(2):  # once more: of a token that has nearly all, little is left
        gap -= np.sum(p * gap, axis=-1, keepdims=True)
    with np.errstate(over="ignore"):  # a tiny temperature: inf is what is meant
        return (p * gap / temperature).astype(saliency.dtype)


def _gumbel_softmax_vjp_cuda(
    gradient: Any,
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    mask: Any,
) -> Any:
    p = _gumbel_softmax_cuda(saliency, temperature, noise, None, mask)
    batch, num_tokens = _rows(saliency)
    out = _cuda.empty(saliency.shape, saliency.dtype)
    chosen = _cuda.implementation()
    threads = out.size if chosen == "basic" else batch * _cuda.BLOCK
    args = (_cuda.contiguous(gradient, p.dtype), p, batch, num_tokens, temperature, out)
    kernel = f"{chosen}/gumbel_softmax_vjp", "gumbel_softmax_vjp"
    _cuda.launch(*kernel, saliency.dtype, threads, args)
    return out


@on_callers_stream
def saliency_mass_vjp(
    gradient: Array, saliency: Array, probabilities: Array, *, epsilon: float = 0.01
) -> tuple[Array, Array]:
    r"""Gradients of `saliency_mass` with respect to saliency and probabilities.

    .. math:: \bar s_i = \bar m_i \pi_i, \qquad
        \bar\pi_i = \bar m_i (s_i - \varepsilon)

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient m̄ of a loss with respect to the mass; any float dtype.
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Saliency s and selection probabilities π (soft or K-hot).
    epsilon : float, default 0.01
        Weight ε ≥ 0 of background tokens.

    Returns
    -------
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Gradients of the loss with respect to the two, in the dtype of each.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes differ, an entry is not finite or `epsilon` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> s, p = np.array([0.8, 0.4]), np.array([1.0, 0.5])
    >>> saliency_mass_vjp(np.array([1.0, 2.0]), s, p)
    (array([1., 1.]), array([0.79, 0.78]))
    """
    leave, gradient, saliency, probabilities = enter(
        gradient=gradient, saliency=saliency, probabilities=probabilities
    )
    check_values("saliency", saliency, "N", "BN")
    check_values("probabilities", probabilities, "N", "BN")
    check_shape("probabilities", probabilities, "BN", saliency.shape)
    gradient = check_gradient(gradient, saliency.shape, "BN", saliency)
    epsilon = _check_epsilon(epsilon)
    args = gradient, saliency, probabilities, epsilon
    find = _saliency_mass_vjp_reference
    if _cuda.is_cuda(saliency):
        find = _saliency_mass_vjp_cuda
    by_saliency, by_probability = find(*args)
    return leave(by_saliency), leave(by_probability)


def _saliency_mass_vjp_reference(
    gradient: NDArray[Any],
    saliency: NDArray[Any],
    probabilities: NDArray[Any],
    epsilon: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    g, s, p = (x.astype(np.float64) for x in (gradient, saliency, probabilities))
    by_saliency, by_probability = g * p, g * (s - epsilon)
    return by_saliency.astype(saliency.dtype), by_probability.astype(
        probabilities.dtype
    )


def _saliency_mass_vjp_cuda(
    gradient: Any, saliency: Any, probabilities: Any, epsilon: float
) -> tuple[Any, Any]:
    dtype = _mass_dtype(saliency, probabilities)
    given = gradient, saliency, probabilities
    arrays = (_cuda.contiguous(x, dtype) for x in given)
    outs = [_cuda.empty(saliency.shape, dtype) for _ in range(2)]
    args = (*arrays, saliency.size, epsilon, *outs)
    kernel = "basic/saliency_mass_vjp", "saliency_mass_vjp"
    _cuda.launch(*kernel, dtype, saliency.size, args)
    by_saliency, by_probability = outs
    return (
        by_saliency.astype(saliency.dtype, copy=False),
        by_probability.astype(probabilities.dtype, copy=False),
    )
