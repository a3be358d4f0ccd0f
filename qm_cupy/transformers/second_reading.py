"""A second reading of the tokens of a cache, after them: `caches.second_reading`."""

from typing import Any

import torch

from ..caches.second_reading import parts_of


def read_again(cache: Any, decoder: Any, name: str) -> None:
    """Let the decoder read the tokens since the last merge once more, after the text.

    The layers of the cache get scores and some of the queries, and no entries. `name`
    is the name by which the decoder takes the cache.
    """
    layers = cache.layers
    for layer in layers:
        layer.queries_again = []  # those of a reading that has failed
    for argument, tokens in _joined(layers[0].tokens):
        for part, rows in parts_of(tokens.shape[1]):
            for layer in layers:
                layer.start_second_reading(torch.from_numpy(rows))
            try:
                decoder(**{argument: tokens[:, part], name: cache, "use_cache": True})
            finally:
                for layer in layers:
                    layer.end_second_reading()
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
