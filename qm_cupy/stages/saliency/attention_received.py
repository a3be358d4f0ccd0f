"""Stand-in until the branch `received` is merged."""

from typing import Any

import numpy as np


def attention_received(
    attention: Any = None,
    *,
    query: Any = None,
    key: Any = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
) -> Any:
    """Return the mean attention that each token receives."""
    xp: Any = np
    first = query if attention is None else attention
    if type(first).__module__.startswith("torch"):
        import torch as xp
    elif not isinstance(first, np.ndarray):
        from jax import numpy as xp
    if mask is not None:
        mask = mask if first.ndim < 5 else mask[:, None]
        pair = mask[..., None] * mask[..., None, :]
    if attention is None:
        scores = query @ xp.swapaxes(key, -1, -2) * query.shape[-1] ** -0.5
        attention = xp.exp(scores)
    if mask is not None:
        attention = xp.where(pair, attention, 0)
    total = attention.sum(-1)[..., None]
    probabilities = attention / xp.where(total > 0, total, 1)
    if mask is None:
        return probabilities.mean(-2)
    return probabilities.sum(-2) / mask.sum(-1)[..., None]


def compute_attention_received(*args: Any, **options: Any) -> Any:
    """Return the mean attention that each token receives."""
    result = attention_received(*args, **options)
    first = args[0] if args[0] is not None else options["query"]
    return result.astype(np.result_type(first.dtype, np.float32))
