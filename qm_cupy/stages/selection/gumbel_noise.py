"""Gumbel noise."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_integer, check_seed
from .philox import philox4x32, uniform


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
    return gumbel_noise_reference(sizes, *check_noise(seed, sequence_offset))


def check_noise(seed: Any, sequence_offset: Any) -> tuple[int | None, int]:
    first = check_integer("sequence_offset", sequence_offset)
    if not 0 <= first < 2**32:
        raise ValueError(f"`sequence_offset` must lie in 0..2**32 - 1, got {first}")
    return None if seed is None else check_seed(seed), first


def gumbel_noise_reference(
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


def noise_arguments(noise: tuple[int | None, int]) -> tuple[int, np.uint64, int]:
    seed, first = noise
    return int(seed is not None), np.uint64(seed or 0), first
