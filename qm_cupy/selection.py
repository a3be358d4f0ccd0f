"""Selection: Gumbel noise, Gumbel-softmax probabilities, saliency mass, top K."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import Array, enter
from ._checks import (
    check_integer,
    check_mask,
    check_num_groups,
    check_number,
    check_seed,
    check_shape,
    check_values,
)
from ._philox import philox4x32, uniform


def gumbel_noise(
    shape: int | tuple[int, ...], seed: int | None, *, sequence_offset: int = 0
) -> NDArray[np.float32]:
    """Standard Gumbel noise -log(-log u), the same bits on every machine.

    Parameters
    ----------
    shape : int or tuple of int
        (N,), (B, N) or (..., B, N): the last two axes are (sequence, token).
    seed : int or None
        Key of the Philox4x32-10 generator, within 0..2⁶⁴ - 1. None gives zeros.
    sequence_offset : int, default 0
        Number of the first sequence: a batch worked through in parts draws the same
        noise as the whole.

    Returns
    -------
    ndarray of shape `shape`
        float32. Token n of sequence b depends on (seed, b, n) alone, not on B or N.

    Raises
    ------
    TypeError
        If `seed` or `sequence_offset` is not an integer.
    ValueError
        If `seed` or `sequence_offset` is out of range.

    Notes
    -----
    u is one of the 2²³ mid-points (k + ½)·2⁻²³, so the noise is finite: it lies within
    -2.82 and 16.64.

    Examples
    --------
    >>> gumbel_noise((2, 3), seed=0).shape
    (2, 3)
    >>> whole = gumbel_noise((2, 3), seed=0)
    >>> bool((gumbel_noise(3, seed=0, sequence_offset=1) == whole[1]).all())
    True
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    first = check_integer("sequence_offset", sequence_offset)
    if not 0 <= first < 2**32:
        raise ValueError(f"`sequence_offset` must lie in 0..2**32 - 1, got {first}")
    if seed is None:
        return np.zeros(sizes, np.float32)
    seed = check_seed(seed)
    *outer, num_sequences, num_tokens = (1, 1, *sizes)
    token = np.arange(num_tokens)
    sequence = first + np.arange(num_sequences)[:, None]
    block = np.arange(np.prod(outer, dtype=np.int64))[:, None, None]
    words, *_ = philox4x32((token, sequence, block, 0), seed)
    noise = -np.log(-np.log(uniform(words)))  # in float64: the same bits anywhere
    return noise.astype(np.float32).reshape(sizes)


def gumbel_softmax(
    saliency: Array,
    *,
    temperature: float = 0.1,
    seed: int | None = 0,
    hard: Any = None,
    mask: Array | None = None,
    sequence_offset: int = 0,
) -> Array:
    r"""Gumbel-softmax selection probabilities, or the K-hot mask of one draw.

    .. math:: \pi_i = \frac{\exp((s_i + g_i)/\tau)}{\sum_j \exp((s_j + g_j)/\tau)}

    Parameters
    ----------
    saliency : ndarray of shape (N,) or (B, N)
        Saliency s; float16, float32 or float64.
    temperature : float, default 0.1
        τ > 0: the lower, the closer π comes to one token.
    seed : int or None, default 0
        Seed of the Gumbel noise g; None leaves it out.
    hard : int or ndarray of int of shape (B,), optional
        Return 1 for the K tokens of greatest s + g and 0 for the others instead
        (ties: the lower index).
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens get 0.
    sequence_offset : int, default 0
        As in `gumbel_noise`.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        π, summing to 1, or the K-hot mask; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If `saliency` is not floating, `mask` not boolean or `hard` not integer.
    ValueError
        If a shape does not fit, an entry is not finite, the temperature is not
        positive or `hard` exceeds the tokens.

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
    leave, saliency, mask, hard = enter(saliency=saliency, mask=mask, hard=hard)
    check_values("saliency", saliency, "N", "BN")
    check_mask(mask, saliency.shape)
    temperature = check_number("temperature", temperature, 0, np.inf, "()")
    noise = gumbel_noise(saliency.shape, seed, sequence_offset=sequence_offset)
    scores = saliency.astype(np.result_type(saliency, np.float32)) + noise
    if hard is None:
        return leave(_softmax_reference(scores, temperature, mask))
    counts = check_num_groups(
        hard, saliency.shape[:-1], num_valid(saliency, mask), name="hard"
    )
    return leave(_top_reference(scores, counts, mask).astype(scores.dtype))


def _softmax_reference(
    scores: NDArray[Any], temperature: float, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
        logits = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    weights = np.exp(logits.astype(scores.dtype, copy=False))
    total: NDArray[Any] = weights.sum(axis=-1, keepdims=True)
    return weights / total


def _top_reference(
    scores: NDArray[Any], counts: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Mark the K greatest scores of each row, the lower index where they are equal."""
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    order = np.argsort(-scores, axis=-1, stable=True)
    chosen = np.zeros(scores.shape, np.bool_)
    within = np.arange(scores.shape[-1]) < counts[..., None]  # (B, N), by rank
    np.put_along_axis(chosen, order, within, axis=-1)
    return chosen


def saliency_mass(
    saliency: Array, probabilities: Array, *, epsilon: float = 0.01
) -> Array:
    r"""Merge weight of each token: its saliency where selected, ε elsewhere.

    .. math:: m_i = \pi_i s_i + (1 - \pi_i)\,\varepsilon

    Parameters
    ----------
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Saliency s and selection probabilities π (soft or K-hot).
    epsilon : float, default 0.01
        Weight ε ≥ 0 of background tokens.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Mass; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes differ, an entry is not finite or `epsilon` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> saliency_mass(np.array([0.8, 0.4]), np.array([1.0, 0.0]))
    array([0.8 , 0.01])
    """
    leave, saliency, probabilities = enter(
        saliency=saliency, probabilities=probabilities
    )
    check_values("saliency", saliency, "N", "BN")
    check_values("probabilities", probabilities, "N", "BN")
    check_shape("probabilities", probabilities, "BN", saliency.shape)
    epsilon = check_number("epsilon", epsilon, 0, np.inf, "[)")
    return leave(_saliency_mass_reference(saliency, probabilities, epsilon))


def _saliency_mass_reference(
    saliency: NDArray[Any], probabilities: NDArray[Any], epsilon: float
) -> NDArray[Any]:
    dtype = np.result_type(saliency, probabilities, np.float32)
    s, p = saliency.astype(dtype), probabilities.astype(dtype)
    mass: NDArray[Any] = p * s + (1 - p) * dtype.type(epsilon)
    return mass


def select_tokens(
    scores: Array, num_groups: Any, *, mask: Array | None = None
) -> Array:
    """Positions of the K highest scores of each sequence, ascending.

    Parameters
    ----------
    scores : ndarray of shape (N,) or (B, N)
        Any score; float16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens are never selected.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        int32 positions; equal scores go to the lower index. With K per sequence, rows
        are padded with -1 to the largest K.

    Raises
    ------
    TypeError
        If `scores` is not floating, `mask` not boolean or `num_groups` not integer.
    ValueError
        If a shape does not fit, an entry is not finite or K exceeds the tokens.

    Examples
    --------
    >>> import numpy as np
    >>> select_tokens(np.array([0.1, 0.9, 0.3, 0.9]), 2)
    array([1, 3], dtype=int32)
    """
    leave, scores, mask, num_groups = enter(
        scores=scores, mask=mask, num_groups=num_groups
    )
    check_values("scores", scores, "N", "BN")
    check_mask(mask, scores.shape)
    counts = check_num_groups(num_groups, scores.shape[:-1], num_valid(scores, mask))
    return leave(_select_tokens_reference(scores, counts, mask))


def _select_tokens_reference(
    scores: NDArray[Any], counts: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    chosen = _top_reference(scores, counts, mask)
    most = counts.max(initial=0)
    positions = np.argsort(~chosen, axis=-1, stable=True)[..., :most]  # (B, K)
    padded = np.arange(most) >= counts[..., None]
    return np.where(padded, -1, positions).astype(np.int32)


def num_valid(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> Any:
    """Return the number of tokens of (B, N): N, or per sequence under a mask."""
    return x.shape[-1] if mask is None else mask.sum(axis=-1)
