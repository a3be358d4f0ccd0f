"""A second reading of a text, by whose attention the entries of a cache merge.

A question about a single fact looks at tokens to which the text itself pays little
attention. When a model reads the text again, after it, the heads that find and copy
look at the tokens that they would copy. The score of an entry is the largest attention
that it receives from a query of the second reading. This is the score of KVzip: J.-H.
Kim et al., "KVzip: Query-agnostic KV cache compression with context reconstruction",
NeurIPS 2025, arXiv:2505.23416, where a request to repeat the text comes first.
"""

from typing import Any

import torch

from ..caches.cache_features import MAX_QUERIES

# Tokens that are read again at once: the positions of the model exceed those of the
# text by at most this.
PART = 2048


def read_again(cache: Any, decoder: Any, name: str) -> None:
    """Let the decoder read the tokens since the last merge once more, after the text.

    The layers of the cache get scores and some of the queries, and no entries. `name`
    is the name by which the decoder takes the cache.
    """
    layers = cache.layers
    parts = _joined(layers[0].tokens)
    total = sum(tokens.shape[1] for _, tokens in parts)
    # These queries stand for all of them, in a random order, so that the last ones do.
    generator = torch.Generator().manual_seed(0)
    picked = torch.randperm(total, generator=generator)[:MAX_QUERIES]
    start = 0
    for argument, tokens in parts:
        for part in tokens.split(PART, dim=1):
            rows = picked[(start <= picked) & (picked < start + part.shape[1])] - start
            for layer in layers:
                layer.start_second_reading(rows)
            try:
                decoder(**{argument: part, name: cache, "use_cache": True})
            finally:
                for layer in layers:
                    layer.end_second_reading()
            start += part.shape[1]
    order = torch.randperm(len(picked), generator=generator)
    for layer in layers:
        query = torch.cat(layer.queries, dim=-2)
        layer.queries = [query[..., order.to(query.device), :]]
    layers[0].tokens = []


def _joined(
    parts: list[tuple[str, torch.Tensor]],
) -> list[tuple[str, torch.Tensor]]:
    """Return parts of which no two in succession have the same name."""
    joined: list[tuple[str, list[torch.Tensor]]] = []
    for name, tokens in parts:
        if not joined or joined[-1][0] != name:
            joined.append((name, []))
        joined[-1][1].append(tokens)
    return [(name, torch.cat(tokens, dim=1)) for name, tokens in joined]
