"""Gumbel noise that has the same bits on every machine.

The noise is g = -log(-log u), where u is uniform in (0, 1) and comes from the generator
in philox.py. N is the number of tokens in a sequence; B is the number of sequences.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_integer, check_seed
from .philox import philox4x32, uniform


def gumbel_noise(
    shape: int | tuple[int, ...], seed: int | None, *, sequence_offset: int = 0
) -> NDArray[np.float32]:
    """Return standard Gumbel noise -log(-log u), with the same bits on every machine.

    Parameters
    ----------
    shape : int or tuple of int
        (N,), (B, N) or (..., B, N): the last two axes are (sequence, token).
    seed : int or None
        Key of the Philox4x32-10 generator, within 0..2⁶⁴ - 1. None gives zeros.
    sequence_offset : int, default 0
        Index of sequence 0 of this call. A batch that is processed in parts gets the
        same noise as the whole batch if each part passes the index that its first
        sequence has in the whole batch.

    Returns
    -------
    ndarray of shape `shape`
        float32. The noise of token n of sequence b, where b counts from
        `sequence_offset`, depends only on (seed, b, n), not on B or N. With leading
        axes, it also depends on the flat index in these axes.

    Raises
    ------
    TypeError
        If `shape`, `seed` or `sequence_offset` is not integer.
    ValueError
        If `seed` or `sequence_offset` is out of range, or `shape` is negative.

    Notes
    -----
    u is one of the 2²³ mid-points (k + ½)·2⁻²³ with k = 0, …, 2²³ - 1. It is never 0 or
    1, so the noise is finite: it lies between -2.82 and 16.64.

    Examples
    --------
    >>> gumbel_noise((2, 3), seed=0).shape
    (2, 3)
    >>> whole = gumbel_noise((2, 3), seed=0)
    >>> bool((gumbel_noise(3, seed=0, sequence_offset=1) == whole[1]).all())
    True
    """
    # Tuples and lists are shapes; any other value must be one integer.
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    sizes = tuple(check_integer("shape", size) for size in sizes)
    if min(sizes, default=0) < 0:
        raise ValueError(f"`shape` must not be negative, got {sizes}")
    return gumbel_noise_reference(sizes, *check_noise(seed, sequence_offset))


def check_noise(
    seed: Any, sequence_offset: Any, name: str = "seed"
) -> tuple[int | None, int]:
    """Return (seed, sequence_offset) as integers; raise if one is out of range.

    This pair is the `noise` argument of the functions in this folder. A seed of None
    means that there is no noise.
    """
    offset = check_integer("sequence_offset", sequence_offset)
    if not 0 <= offset < 2**32:
        raise ValueError(f"`sequence_offset` must lie in 0..2**32 - 1, got {offset}")
    return None if seed is None else check_seed(seed, name), offset


def gumbel_noise_reference(
    sizes: tuple[int, ...], seed: int | None, sequence_offset: int
) -> NDArray[np.float32]:
    """Return the noise in float32, of shape (N,), (B, N) or (..., B, N)."""
    if seed is None:
        return np.zeros(sizes, np.float32)
    # The counter is (token, sequence, index in the outer axes). The generator has no
    # state, so any part of the noise can be drawn alone. The kernels use outer index 0.
    # The two 1s are the missing axes of (N,) and (B, N).
    *outer, num_sequences, num_tokens = (1, 1, *sizes)
    token = np.arange(num_tokens)  # (N,)
    sequence = sequence_offset + np.arange(num_sequences)[:, None]  # (B, 1)
    outer_index = np.arange(np.prod(outer, dtype=np.int64))[:, None, None]
    # A word of the counter has 32 bits, so a sequence number takes two words.
    low, high = sequence & 0xFFFFFFFF, sequence >> 32
    # Only the first of the four random words is used.
    words, *_ = philox4x32((token, low, outer_index, high), seed)
    # The logarithms are in float64 and rounded once to float32, so that CPU and GPU
    # give the same bits.
    noise = -np.log(-np.log(uniform(words)))  # (outer, B, N)
    return noise.astype(np.float32).reshape(sizes)


def noise_arguments(noise: tuple[int | None, int]) -> tuple[int, np.uint64, int]:
    """Return (1 if there is noise, seed, sequence offset): arguments of the kernels."""
    seed, sequence_offset = noise
    # Kernels have no None. Without noise they do not read the seed.
    return int(seed is not None), np.uint64(seed or 0), sequence_offset
