from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...cuda.constants import NOISE_BITS

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1, the key's steps
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_UNUSED = np.uint64(32 - NOISE_BITS)


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], seed: int
) -> tuple[NDArray[Any], ...]:
    """Return four words (uint64 arrays below 2³²) for each counter under one seed."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(key[0])
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(key[1])
        c1, c3 = product1 & _WORD, product0 & _WORD
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def uniform(words: NDArray[Any]) -> NDArray[np.float64]:
    """Return (k + ½)·2⁻²³ for the top 23 bits k: never 0, never 1, exact in float32."""
    return ((words >> _UNUSED).astype(np.float64) + 0.5) * 2.0**-NOISE_BITS
