"""Gumbel-softmax selection of tokens.

For token i of a sequence, s_i is the saliency, g_i is the Gumbel noise, and z_i =
s_i + g_i is the perturbed score (perturbed_scores.py). τ is the temperature, and
m = max z. The selection probability π_i is the softmax of z / τ. A bar means the
gradient of a loss with respect to the quantity, such as π̄_i. Arrays are (N,) or (B, N):
N tokens of one sequence or of B sequences. `noise` is a pair (seed, sequence offset);
without a seed, g = 0.
"""

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_finite_values,
    check_gradient,
    check_layout,
    check_mask,
    check_number,
)
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.counts import GroupCounts, check_group_counts
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import of_finite_gradient, overflow_raises
from ...arrays.libraries import is_cuda
from ...arrays.shapes import num_valid, rows_of, sum_of_tokens
from ...autodiff.dispatch import operation
from ...autodiff.operations import like_first
from ...cuda.constants import BLOCK, SELECTION_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, counts_on_device, launch
from ...settings import implementation
from .gumbel_noise import check_noise, noise_arguments
from .perturbed_scores import (
    perturbed_scores_cuda,
    perturbed_scores_reference,
)
from .select_tokens import top_tokens_cuda, top_tokens_reference


@operation(
    differentiable=("saliency",),
    constants=("mask?",),
    count_parameter="hard?",
    options=("float temperature", "uint64? seed", "int sequence_offset"),
    dtype="computed",  # float64 for float64, else float32
    shapes=like_first,
)
def gumbel_softmax(
    saliency: Array,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    hard: Any = None,
    mask: BoolArray | None = None,
    sequence_offset: int = 0,
) -> Array:
    r"""Return Gumbel-softmax selection probabilities, or the K-hot mask of one draw.

    .. math:: \pi_i = \frac{\exp((s_i + g_i)/\tau)}{\sum_j \exp((s_j + g_j)/\tau)}

    Parameters
    ----------
    saliency : ndarray of shape (N,) or (B, N)
        Saliency s; float16, bfloat16, float32 or float64.
    temperature : float, default 0.1
        τ > 0. With a lower τ, π is closer to a one-hot vector.
    seed : int or None, default 0
        Seed of the Gumbel noise g; with None there is no noise.
    hard : int or ndarray of int of shape (B,), optional
        Number of tokens K to select. If it is passed, the result is the K-hot mask: 1
        for the K tokens with the greatest s + g and 0 for the others. Of equal scores,
        the lower index is selected.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens get 0, and no noise is
        drawn for them. The other tokens get the same result as without the padding.
    sequence_offset : int, default 0
        Number of the first sequence, which selects its noise: sequence b of the batch
        gets the noise of sequence ``sequence_offset + b``. A batch that is processed in
        parts gets the same noise as the whole batch if each part passes the number of
        its first sequence.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        π, which sums to 1, or the K-hot mask; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If `saliency` is not floating, `mask` is not boolean or integer, or `hard` is
        not integer.
    ValueError
        If a shape does not fit, an entry is not finite, the temperature is not
        positive, or `hard` is greater than the number of tokens.

    References
    ----------
    .. [1] E. Jang, S. Gu and B. Poole, "Categorical reparameterization with
       Gumbel-softmax", ICLR 2017, arXiv:1611.01144.

    Examples
    --------
    >>> import numpy as np
    >>> gumbel_softmax(np.array([0.0, 0.1]), seed=None).round(3)
    array([0.269, 0.731])
    >>> gumbel_softmax(np.array([0.2, 0.1, 0.3]), seed=None, hard=2)
    array([1., 0., 1.])
    """
    convert_back, saliency, mask, hard = convert_inputs(
        {"saliency": saliency, "mask": mask}, counts={"hard": hard}
    )
    check_layout("saliency", saliency, "N", "BN")
    mask = check_mask(mask, saliency.shape)
    check_finite_values("saliency", saliency, mask)
    temperature = check_temperature(temperature)
    seed, sequence_offset = check_noise(seed, sequence_offset)
    if hard is not None:
        # K is at most the number of tokens of its sequence, without padding.
        limit = num_valid(saliency.shape, mask)
        hard = check_group_counts(hard, saliency.shape[:-1], limit, name="hard")
    probabilities = compute_gumbel_softmax(
        saliency,
        temperature=temperature,
        seed=seed,
        hard=hard,
        mask=mask,
        sequence_offset=sequence_offset,
    )
    return convert_back(probabilities)


def compute_gumbel_softmax(
    saliency: Any,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    hard: GroupCounts | None = None,
    mask: Any = None,
    sequence_offset: int = 0,
) -> Any:
    """Return the result of `gumbel_softmax` for converted and checked arrays."""
    noise = seed, sequence_offset
    counts = None if hard is None else hard.counts
    # The optimized kernel computes noise and softmax in one launch, without an array
    # for the perturbed scores. A K-hot mask needs such an array. The same kernel can
    # also compute the saliency mass, which needs ε (saliency_mass.py). Here ε is None,
    # so the kernel computes only π.
    if is_cuda(saliency) and counts is None and implementation() == "optimized":
        return softmax_mass_cuda(saliency, temperature, noise, None, mask)[0]
    if is_cuda(saliency):
        return _gumbel_softmax_cuda(saliency, temperature, noise, counts, mask)
    return _gumbel_softmax_reference(saliency, temperature, noise, counts, mask)


def _gumbel_softmax_reference(
    saliency: NDArray[Any],
    temperature: float,
    noise: tuple[int | None, int],
    counts: NDArray[np.int64] | None,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    scores = perturbed_scores_reference(saliency, noise, mask)  # z, (B, N)
    if counts is None:
        return _softmax_reference(scores, temperature, mask)
    # The temperature does not change the order of the scores, so it is not used here.
    return top_tokens_reference(scores, counts, mask).astype(scores.dtype)


def check_temperature(temperature: Any) -> float:
    """Return τ as a float; raise if it is not positive and finite."""
    return check_number("temperature", temperature, 0, np.inf, "()")


def _softmax_reference(
    scores: NDArray[Any], temperature: float, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)  # e^-inf = 0: padding gets π = 0
    quotient = _quotients(scores, temperature)
    with np.errstate(over="ignore"):  # -inf is intended, as below
        logits = quotient.astype(scores.dtype, copy=False)
    weights = np.exp(logits)  # e^((z - m) / τ), (B, N)
    return weights / sum_of_tokens(weights, mask)


def _quotients(scores: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return (z - m) / τ, which are at most 0; padding has the score -inf."""
    # Subtract m first, so that no exponential overflows: every exponent is ≤ 0. Divide
    # in float64, in which no temperature rounds to 0.
    m = scores.max(axis=-1, keepdims=True)
    with suppress(FloatingPointError), overflow_raises():
        return (scores - m).astype(np.float64) / temperature
    # A tiny temperature gives -inf, which is the intended result: probability 0. z - m
    # of very large scores overflows, but (z - m) / τ need not.
    with np.errstate(over="ignore"):
        below_max = scores - m
        halves = (scores / 2 - m / 2).astype(np.float64) / temperature
        quotient = below_max.astype(np.float64) / temperature
        return np.where(np.isinf(below_max), 2 * halves, quotient)


def _gumbel_softmax_cuda(
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    counts: NDArray[np.int64] | None,
    mask: Any,
) -> Any:
    scores = perturbed_scores_cuda(saliency, noise, mask)
    if counts is not None:
        selected = top_tokens_cuda(scores, *counts_on_device(counts))  # (B, N), bool
        return selected.astype(scores.dtype)
    # The softmax of the basic implementation (the optimized one uses
    # `softmax_mass_cuda`). The first kernel has a thread for each sequence, and the
    # second kernel has a thread for each token.
    batch, num_tokens = rows_of(scores)
    # m and Σ e^((z - m) / τ), each (B,)
    highest, total = (empty((batch,), scores.dtype) for _ in range(2))
    out = empty(scores.shape, scores.dtype)
    args: tuple[Any, ...] = (scores, batch, num_tokens, temperature, highest, total)
    file = "gumbel_softmax"  # the second kernel has the name of its file
    launch(file, "softmax_totals", scores.dtype, args, outputs=batch)
    args = (scores, highest, total, batch, num_tokens, temperature, out)
    launch(file, file, scores.dtype, args, outputs=out.size)
    return out


def softmax_mass_cuda(
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    epsilon: float | None,
    mask: Any,
) -> tuple[Any, Any]:
    """Return π and the saliency mass π_i s_i + (1 - π_i) ε; both are 0 for padding.

    The mass is the weight of a token in the merge (saliency_mass.py), and `epsilon` is
    ε, the weight of background tokens. If `epsilon` is None, only π is computed, and
    the mass is None.
    """
    batch, num_tokens = rows_of(saliency)
    acc_dtype = accumulation_dtype(saliency.dtype)
    out = empty(saliency.shape, acc_dtype)
    # One launch computes π and the mass. If the pointer to the mass is null, the kernel
    # does not compute the mass.
    mass = None if epsilon is None else empty(saliency.shape, acc_dtype)
    arrays = contiguous(saliency), contiguous(mask)
    options = temperature, *noise_arguments(noise), epsilon or 0.0
    args = (*arrays, batch, num_tokens, *options, out, mass)
    kernel = "gumbel_softmax", "gumbel_softmax"
    # A block for each sequence, with a thread for each token up to SELECTION_THREADS.
    block = block_size(num_tokens, SELECTION_THREADS, BLOCK)
    launch(*kernel, saliency.dtype, args, blocks=batch, block=block)
    return out, mass


@on_callers_stream
def gumbel_softmax_vjp(
    gradient: FloatArray,
    saliency: Array,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    mask: BoolArray | None = None,
    sequence_offset: int = 0,
) -> Array:
    r"""Return the gradient of `gumbel_softmax` with respect to the saliency.

    .. math:: \bar s_i = \frac{\pi_i}{\tau} \Bigl(\bar\pi_i - \sum_j \bar\pi_j \pi_j
        \Bigr)

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient π̄ of a loss with respect to the probabilities; any float dtype. The
        gradient of padded tokens is not read.
    saliency : ndarray of shape (N,) or (B, N)
        Saliency s, the argument of `gumbel_softmax`.
    temperature, seed, mask, sequence_offset : optional
        The arguments of `gumbel_softmax`. The same noise is drawn again.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Gradient of the loss with respect to `saliency`, in its dtype; 0 for padding.

    Raises
    ------
    TypeError
        If an array is not floating or `mask` is not boolean or integer.
    ValueError
        If a shape does not fit, an entry is not finite, or the temperature is not
        positive.

    Notes
    -----
    The derivative of a K-hot mask (``hard=K``) is 0 or undefined. The straight-through
    estimator [1]_ uses the derivative of π instead: pass the gradient with respect to
    the mask to this function.

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
    convert_back, saliency, mask, gradient = convert_inputs(
        {"saliency": saliency, "mask": mask}, gradients={"gradient": gradient}
    )
    check_layout("saliency", saliency, "N", "BN")
    mask = check_mask(mask, saliency.shape)
    check_finite_values("saliency", saliency, mask)
    # The gradient of padded tokens may be NaN, so the mask is part of this check.
    gradient = check_gradient(gradient, saliency.shape, "BN", saliency, mask=mask)
    temperature = check_temperature(temperature)
    noise = check_noise(seed, sequence_offset)
    args = gradient, saliency, temperature, noise, mask
    if is_cuda(saliency):
        return convert_back(_gumbel_softmax_vjp_cuda(*args))
    return convert_back(_gumbel_softmax_vjp_reference(*args))


def _gumbel_softmax_vjp_reference(
    gradient: NDArray[Any],
    saliency: NDArray[Any],
    temperature: float,
    noise: tuple[int | None, int],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    scores = perturbed_scores_reference(saliency, noise, mask)
    p = _softmax_reference(scores, temperature, mask).astype(np.float64)  # π, (B, N)
    # Padding has probability 0. The gradient of padding may be NaN and is not used.
    gradient = np.where(p > 0, gradient, 0).astype(np.float64)  # π̄

    def vjp(gradient: NDArray[Any]) -> NDArray[Any]:
        # π̄_i - Σ_j π̄_j π_j is tiny for a token that has nearly all the probability. The
        # first pass subtracts the sum; the second pass removes the rounding error of
        # the first one.
        centred = gradient.copy()
        for _ in range(2):
            centred -= sum_of_tokens(p * centred, mask)
        return p * centred / temperature

    # inf is the intended result of a tiny temperature.
    return narrow(of_finite_gradient(vjp, gradient), saliency.dtype)


def _gumbel_softmax_vjp_cuda(
    gradient: Any,
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    mask: Any,
) -> Any:
    seed, sequence_offset = noise
    # Compute π again: the arguments do not include the result of the forward pass.
    p = compute_gumbel_softmax(
        saliency,
        temperature=temperature,
        seed=seed,
        mask=mask,
        sequence_offset=sequence_offset,
    )
    batch, num_tokens = rows_of(saliency)
    out = empty(saliency.shape, saliency.dtype)
    args = (contiguous(gradient, p.dtype), p, batch, num_tokens, temperature, out)
    kernel = "gumbel_softmax_vjp", "gumbel_softmax_vjp"
    # A block for each sequence, because Σ π̄_j π_j is a sum over its tokens. The basic
    # kernel has a thread for each token.
    launch(*kernel, saliency.dtype, args, outputs=out.size, blocks=batch)
    return out
