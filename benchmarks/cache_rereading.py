"""Methods that read the context a second time, before they shorten its cache.

A question about a single fact looks at tokens to which the context itself pays little
attention. When the model reads the context again, after it, the heads that find and
copy look at the tokens that they would copy. The score of an entry is the largest
attention that it receives from a query of the second reading; this is the score of
KVzip (J.-H. Kim et al., arXiv:2505.23416, where the second reading follows a request to
repeat the context). The attention is relative to the entries of the context alone.
"""

from functools import partial

import numpy as np
import torch
from cache_budgets import evicted
from cache_reading import Prompt, Shortened, layers_of

import qm_cupy as qm
from qm_cupy.caches.cache_entries import default_recent
from qm_cupy.caches.second_reading import NUM_LAST, parts_of, random_order


def largest_attention(prompt: Prompt) -> torch.Tensor:
    """Return the scores (L, H, N) of the second reading."""
    pairs = zip(again(prompt), prompt.keys, strict=True)
    scores = [qm.score_keys(q, k, how="max", causal=False)[0] for q, k in pairs]
    return torch.stack(scores)


def again(prompt: Prompt) -> list[torch.Tensor]:
    """Return the queries of the second reading (1, H_q, N, d) of each layer."""
    return [x[:, :, -prompt.num_tokens :] for x in prompt.repeated]


def kvzip(prompt: Prompt, count: int) -> list[Shortened]:
    """Keep the entries with the largest scores of all layers and heads."""
    recent = default_recent(np.array(count), (), causal=False)  # as when we merge
    return evicted(prompt, largest_attention(prompt), count, int(recent))


def merged_again(
    prompt: Prompt, count: int, *, per_head: bool = True
) -> list[Shortened]:
    """Merge all layers by `merge_kv_cache`, with the second reading.

    Its scores are `attention`. Some of its queries, and the last of the first reading,
    are `query`, as `MergedCache(mass="reread")` has them.
    """
    # The queries that the library would keep, of each part of the second reading.
    rows = [torch.from_numpy(x) + p.start for p, x in parts_of(prompt.num_tokens)]
    some = torch.stack([x[:, :, torch.cat(rows)] for x in again(prompt)])
    last = torch.stack([x[:, :, -NUM_LAST:] for x in prompt.queries])
    query = torch.cat([last, some], dim=-2)
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
        per_layer=True,
        per_head=per_head,
    )
    return layers_of(cache)


REREADING = {
    "KVzip": kvzip,
    "merge_kv_cache, second reading": merged_again,
    "merge_kv_cache, per_layer, second reading": partial(merged_again, per_head=False),
}
