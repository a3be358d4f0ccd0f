"""Philox4x32-10: a generator that maps a counter and a key to four random words.

The counter has four words, and the key has two words. A word has 32 bits. The key is
the seed.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...cuda.constants import NOISE_BITS

# Constants of Philox4x32-10: Salmon et al. 2011, doi:10.1145/2063384.2063405. Each of
# 10 rounds multiplies two words of the counter by constants. The next counter consists
# of the high and the low halves of the two products; the high halves are combined (XOR)
# with the other two words of the counter and with the key.
_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
# Added to the two words of the key after each round: the fractional parts of the golden
# ratio and of √3, times 2³².
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW_WORD = np.uint64(0xFFFFFFFF)  # mask of the low 32 bits of a product
_WORD_BITS = np.uint64(32)
_UNUSED_BITS = np.uint64(32 - NOISE_BITS)  # bits of a word that `uniform` drops


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], seed: int
) -> tuple[NDArray[Any], ...]:
    """Return four words for each counter under one seed.

    The words are uint64 arrays with values below 2³². The words of `counter` broadcast.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    key = [seed & 0xFFFFFFFF, seed >> 32]  # low and high word of the seed
    for _ in range(_ROUNDS):
        # 32 × 32 bits fit in 64, so the products are exact.
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> _WORD_BITS) ^ c1 ^ np.uint64(key[0])
        c2 = (product0 >> _WORD_BITS) ^ c3 ^ np.uint64(key[1])
        c1, c3 = product1 & _LOW_WORD, product0 & _LOW_WORD
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def uniform(words: NDArray[Any]) -> NDArray[np.float64]:
    """Return u = (k + ½)·2⁻²³ for the top 23 bits k of each word.

    u is never 0 or 1, so -log(-log u) is finite. u has 24 bits, so float32 represents
    it exactly.
    """
    return ((words >> _UNUSED_BITS).astype(np.float64) + 0.5) * 2.0**-NOISE_BITS
