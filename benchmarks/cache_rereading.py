"""Methods that read the context a second time, before they shorten its cache.

A question about a single fact looks at tokens to which the context itself pays little
attention. When the model reads the context again, after it, the heads that find and
copy look at the tokens that they would copy. The score of an entry is the largest
attention that it receives from a query of the second reading; this is the score of
KVzip (J.-H. Kim et al., arXiv:2505.23416, where the second reading follows a request to
repeat the context). The attention is relative to the entries of the context alone.
"""

from functools import partial

import torch
from cache_budgets import evicted
from cache_reading import Prompt, Shortened, layers_of

import qm_cupy as qm
from qm_cupy.caches.second_reading import NUM_AGAIN, NUM_LAST, random_order

RECENT = 8  # last entries that are kept as they are


def largest_attention(prompt: Prompt) -> torch.Tensor:
    """Return the scores (L, H, N) of the second reading."""
    layers = []
    for keys, query in zip(prompt.keys, prompt.repeated, strict=True):
        heads, num_tokens, dim = keys.shape[1:]
        rows = query[0, :, -num_tokens:].reshape(heads, -1, dim)  # of all their heads
        weights = (rows @ keys[0].mT * dim**-0.5).softmax(-1)
        layers.append(weights.amax(1))
    return torch.stack(layers)


def kvzip(prompt: Prompt, count: int) -> list[Shortened]:
    """Keep the entries with the largest scores of all layers and heads."""
    return evicted(prompt, largest_attention(prompt), count, RECENT)


def merged_again(
    prompt: Prompt, count: int, *, per_head: bool = True
) -> list[Shortened]:
    """Merge all layers by `merge_kv_cache`, with the second reading.

    Its scores are `attention`. Some of its queries, and the last of the first reading,
    are `query`, as `MergedCache(mass="reread")` has them.
    """
    num_tokens = prompt.num_tokens
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(num_tokens, generator=generator)[:NUM_AGAIN]
    query = torch.cat(
        [
            torch.stack([x[:, :, -num_tokens:][:, :, some] for x in prompt.repeated]),
            torch.stack([x[:, :, -NUM_LAST:] for x in prompt.queries]),
        ],
        dim=-2,
    )
    # In a random order, because the last ones calibrate the biases.
    query = query[..., torch.from_numpy(random_order(query.shape[-2])), :]
    cache = qm.merge_kv_cache(
        torch.stack(prompt.keys),
        torch.stack(prompt.values),
        count,
        query=query,
        causal=False,
        attention=largest_attention(prompt)[:, None],  # (L, 1, H, N)
        inv_freq=prompt.inv_freq,
        recent=RECENT,
        per_layer=True,
        per_head=per_head,
    )
    return layers_of(cache)


REREADING = {
    "KVzip": kvzip,
    "merge_kv_cache, second reading": merged_again,
    "merge_kv_cache, per_layer, second reading": partial(merged_again, per_head=False),
}
