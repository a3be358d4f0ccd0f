"""Selection: Gumbel noise, Gumbel-softmax probabilities, saliency mass, top K."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_integer,
    check_mask,
    check_num_groups,
    check_number,
    check_seed,
    check_shape,
    check_values,
    largest,
)
from ._philox import philox4x32, uniform
from .saliency import _axes, _saliency_cuda

_ENTROPIES_OF_A_BLOCK = 1 << 15  # see _one_launch


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
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    sizes = tuple(check_integer("shape", size) for size in sizes)
    if min(sizes, default=0) < 0:
        raise ValueError(f"`shape` must not be negative, got {sizes}")
    return _gumbel_noise_reference(sizes, *_check_noise(seed, sequence_offset))


def _check_noise(seed: Any, sequence_offset: Any) -> tuple[int | None, int]:
    first = check_integer("sequence_offset", sequence_offset)
    if not 0 <= first < 2**32:
        raise ValueError(f"`sequence_offset` must lie in 0..2**32 - 1, got {first}")
    return None if seed is None else check_seed(seed), first


def _gumbel_noise_reference(
    sizes: tuple[int, ...], seed: int | None, first: int
) -> NDArray[np.float32]:
    if seed is None:
        return np.zeros(sizes, np.float32)
    *outer, num_sequences, num_tokens = (1, 1, *sizes)
    token = np.arange(num_tokens)
    sequence = first + np.arange(num_sequences)[:, None]
    block = np.arange(np.prod(outer, dtype=np.int64))[:, None, None]
    low, high = sequence & 0xFFFFFFFF, sequence >> 32  # a counter's words have 32 bits
    words, *_ = philox4x32((token, low, block, high), seed)
    noise = -np.log(-np.log(uniform(words)))  # in float64: the same bits anywhere
    return noise.astype(np.float32).reshape(sizes)


@on_callers_stream
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
        Saliency s; float16, bfloat16, float32 or float64.
    temperature : float, default 0.1
        τ > 0: the lower, the closer π comes to one token.
    seed : int or None, default 0
        Seed of the Gumbel noise g; None leaves it out.
    hard : int or ndarray of int of shape (B,), optional
        Return 1 for the K tokens of greatest s + g and 0 for the others instead
        (ties: the lower index).
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens get 0, and no noise is drawn for them: the
        result is that of the tokens alone.
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
    temperature = _check_temperature(temperature)
    noise = _check_noise(seed, sequence_offset)
    counts = None
    if hard is not None:
        most = _num_valid(saliency.shape, mask)
        counts = check_num_groups(hard, saliency.shape[:-1], most, name="hard")
    return leave(_gumbel_softmax(saliency, temperature, noise, counts, mask))


def _gumbel_softmax(
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    counts: NDArray[np.int64] | None,
    mask: Any,
) -> Any:
    if _cuda.is_cuda(saliency):
        return _gumbel_softmax_cuda(saliency, temperature, noise, counts, mask)
    return _gumbel_softmax_reference(saliency, temperature, noise, counts, mask)


def _gumbel_softmax_reference(
    saliency: NDArray[Any],
    temperature: float,
    noise: tuple[int | None, int],
    counts: NDArray[np.int64] | None,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    scores = _perturbed_scores_reference(saliency, noise, mask)
    if counts is None:
        return _softmax_reference(scores, temperature, mask)
    return _top_reference(scores, counts, mask).astype(scores.dtype)


def _check_temperature(temperature: Any) -> float:
    return check_number("temperature", temperature, 0, np.inf, "()")


def _perturbed_scores_reference(
    saliency: NDArray[Any],
    noise: tuple[int | None, int],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    scores = saliency.astype(np.result_type(saliency, np.float32))
    return scores + _by_rank(_gumbel_noise_reference(saliency.shape, *noise), mask)


def _by_rank(
    noise: NDArray[np.float32], mask: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Give token number n of a sequence draw n, wherever its padding lies."""
    if mask is None:
        return noise
    rank = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    return np.take_along_axis(noise, rank, axis=-1)


def _softmax_reference(
    scores: NDArray[Any], temperature: float, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    gap = (scores - scores.max(axis=-1, keepdims=True)).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
        logits = (gap / temperature).astype(scores.dtype, copy=False)
    weights = np.exp(logits)
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


def _gumbel_softmax_cuda(
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    counts: NDArray[np.int64] | None,
    mask: Any,
) -> Any:
    if counts is None and _cuda.implementation() == "optimized":
        return _softmax_mass_cuda(saliency, temperature, noise, None, mask)[0]
    scores = _perturbed_scores_cuda(saliency, noise, mask)
    if counts is not None:
        return _top_tokens_cuda(scores, counts).astype(scores.dtype)
    batch, num_tokens = _rows(scores)
    highest, total = (_cuda.empty((batch,), scores.dtype) for _ in range(2))
    out = _cuda.empty(scores.shape, scores.dtype)
    args: tuple[Any, ...] = (scores, batch, num_tokens, temperature, highest, total)
    _cuda.launch("basic/gumbel_softmax", "softmax_totals", scores.dtype, batch, args)
    args = (scores, highest, total, batch, num_tokens, temperature, out)
    _cuda.launch("basic/gumbel_softmax", "gumbel_softmax", scores.dtype, out.size, args)
    return out


def _softmax_mass_cuda(
    saliency: Any,
    temperature: float,
    noise: tuple[int | None, int],
    epsilon: float | None,
    mask: Any,
) -> tuple[Any, Any]:
    """Return π and, unless `epsilon` is None, the mass, both 0 for padding."""
    batch, num_tokens = _rows(saliency)
    kind = _cuda.accumulation(saliency.dtype)
    out = _cuda.empty(saliency.shape, kind)
    mass = None if epsilon is None else _cuda.empty(saliency.shape, kind)
    arrays = _cuda.contiguous(saliency), _cuda.contiguous(mask)
    options = temperature, *_noise_arguments(noise), epsilon or 0.0
    args = (*arrays, batch, num_tokens, *options, out, mass)
    _launch_rows(
        "gumbel_softmax", "gumbel_softmax", saliency.dtype, batch, num_tokens, args
    )
    return out, mass


def _saliency_gumbel_mass_cuda(
    entropy: Any,
    salient: str,
    temperature: float,
    noise: tuple[int | None, int],
    epsilon: float,
    mask: Any,
) -> tuple[Any, Any, Any]:
    """Return saliency, π and mass (B, N) of (..., N) entropies."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = _axes(leading)
    if not _one_launch(layers, heads, num_tokens):
        scores = _saliency_cuda(entropy, salient, mask).reshape(batch, num_tokens)
        return scores, *_softmax_mass_cuda(scores, temperature, noise, epsilon, mask)
    kind = _cuda.accumulation(entropy.dtype)
    outs = [_cuda.empty((batch, num_tokens), kind) for _ in range(3)]
    arrays = _cuda.contiguous(entropy), _cuda.contiguous(mask)
    sizes = layers, batch, heads, num_tokens
    options = int(salient == "high"), temperature, *_noise_arguments(noise), epsilon
    args = (*arrays, *sizes, *options, *outs)
    _launch_rows(
        "gumbel_softmax", "saliency_gumbel_mass", entropy.dtype, batch, num_tokens, args
    )
    return outs[0], outs[1], outs[2]


def _one_launch(layers: int, heads: int, num_tokens: int) -> bool:
    """Whether a single block of each sequence goes from entropies to the mass.

    It reads L·H·N entropies twice, 4 bytes each, at about 50 bytes a cycle: 0.16 L·H·N
    cycles. Two launches more take about 5,000 cycles, and the blocks of all
    multiprocessors then read: less from L·H·N = 32,768 on. The block also keeps its
    tokens in registers.
    """
    held = num_tokens <= _cuda.THREAD_TOKENS * _cuda.SELECTION_THREADS
    return held and layers * heads * num_tokens <= _ENTROPIES_OF_A_BLOCK


def _perturbed_scores_cuda(
    saliency: Any, noise: tuple[int | None, int], mask: Any
) -> Any:
    batch, num_tokens = _rows(saliency)
    out = _cuda.empty(saliency.shape, _cuda.accumulation(saliency.dtype))
    arrays = _cuda.contiguous(saliency), _cuda.contiguous(mask)
    args = (*arrays, batch, num_tokens, *_noise_arguments(noise), out)
    file, kernel = "gumbel_softmax", "perturbed_scores"
    counting = mask is not None and noise[0] is not None  # draw n is the n-th token's
    if counting and _cuda.implementation() == "optimized":
        _launch_rows(file, kernel, saliency.dtype, batch, num_tokens, args)
    else:
        _cuda.launch(f"basic/{file}", kernel, saliency.dtype, out.size, args)
    return out


def _launch_rows(
    file: str,
    kernel: str,
    dtype: Any,
    batch: int,
    num_tokens: int,
    args: tuple[Any, ...],
) -> None:
    """Run an optimized kernel with a block for each sequence, larger for a long one."""
    wanted = -(-num_tokens // _cuda.BLOCK) * _cuda.BLOCK
    block = min(wanted, _cuda.SELECTION_THREADS)
    _cuda.launch(f"optimized/{file}", kernel, dtype, batch * block, args, block=block)


def _noise_arguments(noise: tuple[int | None, int]) -> tuple[int, np.uint64, int]:
    seed, first = noise
    return int(seed is not None), np.uint64(seed or 0), first


def _rows(x: Any) -> tuple[int, int]:
    return x.size // x.shape[-1], x.shape[-1]


@on_callers_stream
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
    epsilon = _check_epsilon(epsilon)
    return leave(_saliency_mass(saliency, probabilities, epsilon))


def _saliency_mass(saliency: Any, probabilities: Any, epsilon: float) -> Any:
    if _cuda.is_cuda(saliency):
        return _saliency_mass_cuda(saliency, probabilities, epsilon)
    return _saliency_mass_reference(saliency, probabilities, epsilon)


def _check_epsilon(epsilon: Any) -> float:
    return check_number("epsilon", epsilon, 0, np.inf, "[)")


def _saliency_mass_reference(
    saliency: NDArray[Any], probabilities: NDArray[Any], epsilon: float
) -> NDArray[Any]:
    dtype = _mass_dtype(saliency, probabilities)
    s, p = saliency.astype(dtype), probabilities.astype(dtype)
    mass: NDArray[Any] = p * s + (1 - p) * dtype.type(epsilon)
    return mass


def _mass_dtype(saliency: Any, probabilities: Any) -> np.dtype[Any]:
    """Return float32 or float64: what NumPy finds, but of bfloat16 and float16 too."""
    return np.result_type(
        *map(_cuda.accumulation, (saliency.dtype, probabilities.dtype))
    )


def _saliency_mass_cuda(saliency: Any, probabilities: Any, epsilon: float) -> Any:
    dtype = _mass_dtype(saliency, probabilities)
    out = _cuda.empty(saliency.shape, dtype)
    arrays = _cuda.contiguous(saliency, dtype), _cuda.contiguous(probabilities, dtype)
    args = (*arrays, out.size, epsilon, out)
    _cuda.launch("basic/saliency_mass", "saliency_mass", dtype, out.size, args)
    return out


@on_callers_stream
def select_tokens(
    scores: Array, num_groups: Any, *, mask: Array | None = None
) -> Array:
    """Positions of the K highest scores of each sequence, ascending.

    Parameters
    ----------
    scores : ndarray of shape (N,) or (B, N)
        Any score; float16, bfloat16, float32 or float64.
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
    limit = _num_valid(scores.shape, mask)
    counts = check_num_groups(num_groups, scores.shape[:-1], limit)
    most = largest(num_groups, counts)
    return leave(_select_tokens(scores, counts, most, mask))


def _select_tokens(scores: Any, counts: NDArray[np.int64], most: int, mask: Any) -> Any:
    if _cuda.is_cuda(scores):
        return _select_tokens_cuda(scores, counts, most, mask)
    return _select_tokens_reference(scores, counts, most, mask)


def _select_tokens_reference(
    scores: NDArray[Any],
    counts: NDArray[np.int64],
    most: int,
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.int32]:
    chosen = _top_reference(scores, counts, mask)
    positions = np.argsort(~chosen, axis=-1, stable=True)[..., :most]  # (B, K)
    padded = np.arange(most) >= counts[..., None]
    return np.where(padded, -1, positions).astype(np.int32)


def _select_tokens_cuda(
    scores: Any, counts: NDArray[np.int64], most: int, mask: Any
) -> Any:
    scores = _perturbed_scores_cuda(scores, (None, 0), mask)
    chosen = _top_tokens_cuda(scores, counts)
    batch, num_tokens = _rows(scores)
    out = _cuda.empty((*scores.shape[:-1], most), np.int32)
    args = (chosen, batch, num_tokens, most, out)
    if _cuda.implementation() == "optimized":
        _launch_rows(
            "select_tokens", "select_tokens", np.float32, batch, num_tokens, args
        )
    else:
        _cuda.launch("basic/select_tokens", "select_tokens", np.float32, out.size, args)
    return out


def _top_tokens_cuda(scores: Any, counts: NDArray[np.int64]) -> Any:
    """Mark the K highest of scores whose padding is below all others."""
    out = _cuda.empty(scores.shape, np.bool_)
    each, most = _cuda.counts(counts)
    args = (scores, each, *_rows(scores), most, out)
    if _cuda.implementation() == "optimized":
        _launch_rows("select_tokens", "top_tokens", scores.dtype, *_rows(scores), args)
    else:
        _cuda.launch("basic/select_tokens", "top_tokens", scores.dtype, out.size, args)
    return out


def _num_valid(shape: tuple[int, ...], mask: NDArray[np.bool_] | None) -> Any:
    """Return the number of tokens of (B, N): N, or per sequence under a mask."""
    return shape[-1] if mask is None else mask.sum(axis=-1)
