"""How a text is read a second time, by whose attention the entries of a cache merge.

A question about a single fact looks at tokens to which the text itself pays little
attention. When a model reads the text again, after it, the heads that find and copy
look at the tokens that they would copy. The score of an entry is the largest attention
that it receives from a query of the second reading. This is the score of KVzip: J.-H.
Kim et al., "KVzip: Query-agnostic KV cache compression with context reconstruction",
NeurIPS 2025, arXiv:2505.23416, where a request to repeat the text comes first.

The queries of the merge are some of the second reading, so that it keeps what these
look at, and the last of the first reading, so that the text goes on as before.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .cache_features import MAX_QUERIES

# Tokens that are read again at once: the positions of the model exceed those of the
# text by at most this.
PART = 2048
NUM_LAST = 32  # last queries of the first reading
NUM_AGAIN = MAX_QUERIES - NUM_LAST  # queries of the second one, at most

Indices = NDArray[np.int64]


def parts_of(count: int) -> Iterator[tuple[slice, Indices]]:
    """Yield the parts of T tokens, and which tokens of each give their queries.

    At most `NUM_AGAIN` tokens, drawn at random, stand for all of them.
    """
    picked = np.random.default_rng(0).permutation(count)[:NUM_AGAIN]
    for start in range(0, count, PART):
        end = min(start + PART, count)
        yield slice(start, end), picked[(picked >= start) & (picked < end)] - start


def random_order(count: int) -> Indices:
    """Return an order of the queries of a merge, so that any of them are the last."""
    return np.random.default_rng(1).permutation(count)
