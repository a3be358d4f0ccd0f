"""The memory that `quickmerge` needs on a CPU, and its check before the work.

There are B sequences of N tokens of width D, merged to K groups each. A source of the
saliency may have L layers with H heads each. All numbers are bytes of the arrays that
exist at the same time; `tests/test_memory.py` compares them with measurements.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from .arrays.dtypes import accumulation_dtype
from .arrays.libraries import is_cuda
from .composition import Options, with_defaults
from .sources import NO_SOURCES, Sources
from .stages.clustering.cluster_tokens import Method
from .stages.clustering.clustering_memory import (
    check_clustering_memory,
    clustering_bytes,
)
from .stages.saliency.online_softmax import BLOCK_ROWS


def check_quickmerge_memory(
    tokens: Any,
    num_groups: int | None,
    sources: Sources,
    masked: bool,
    options: Options,
) -> None:
    """Raise MemoryError if the CPU has not enough memory for converted arrays."""
    if is_cuda(tokens):
        return
    method, shape = cast(Method, options.method), tokens.shape
    needed = quickmerge_bytes(
        shape, tokens.dtype, num_groups, sources=sources, masked=masked, method=method,
        step=options.step, weights=options.weights,
        weighted_linkage=options.weighted_linkage,
    )  # fmt: skip
    sequence = clustering_bytes(
        shape[-2:], tokens.dtype, method, weighted=options.weighted_linkage,
        num_groups=num_groups, step=options.step, copied=masked,
    )  # fmt: skip
    check_clustering_memory("quickmerge", shape, needed, sequence, method)


def quickmerge_bytes(
    shape: Sequence[int],
    dtype: Any,
    num_groups: int | None = None,
    *,
    sources: Sources = NO_SOURCES,
    masked: bool = False,
    method: Method | None = None,
    step: int | None = None,
    weights: Any = None,
    weighted_linkage: bool | None = None,
) -> int:
    """Return the most memory that a call of `quickmerge` needs beside its inputs.

    Parameters
    ----------
    shape, dtype
        Those of the tokens, (N, D) or (B, N, D).
    num_groups : int, optional
        The largest K. Without it, the result is for the K that needs most.
    sources : Sources
        Arrays, of which only shapes and dtypes are used.
    masked : bool
        Whether there is a mask, or protected tokens.
    method, step, weights, weighted_linkage
        As in `quickmerge`.
    """
    dtype, (*batch, num_tokens, _) = np.dtype(dtype), shape
    method, weights, weighted = with_defaults(
        sources, method, weights, weighted_linkage
    )
    clustering = clustering_bytes(
        shape, dtype, method, weighted=weighted, num_groups=num_groups, step=step,
        copied=masked,
    )  # fmt: skip
    word = weights if isinstance(weights, str) else None
    source = 0
    if word == "attention":
        source = _source_bytes(shape, dtype, sources, masked, received=True)
    elif word in ("saliency", "mass") or method == "nearest":
        source = _source_bytes(shape, dtype, sources, masked, received=False)
    per_token = 24 * math.prod(batch) * num_tokens  # saliency and weights
    return per_token + max(source, clustering, _merging_bytes(shape, dtype, num_groups))


def _source_bytes(
    shape: Sequence[int],
    dtype: np.dtype[Any],
    sources: Sources,
    masked: bool,
    *,
    received: bool,
) -> int:
    """Return the bytes of the entropies, and of the attention received."""
    tokens = math.prod(shape[:-1])
    if sources.saliency is not None:
        return 0
    if sources.attention is not None:
        layers = _layers(sources.attention)
        work = [_attention_bytes(x.shape, x.dtype, masked) for x in layers]
    elif sources.query is not None:
        layers = _layers(sources.query)
        keys = _layers(sources.key)
        work = [_score_bytes(q, k, masked) for q, k in zip(layers, keys, strict=True)]
    elif sources.hidden_states is not None:
        layers = _layers(sources.hidden_states)
        work = [_hidden_bytes(x.shape, x.dtype, masked) for x in layers]
    else:
        entropy = tokens * accumulation_dtype(dtype).itemsize
        return 6 * entropy + _hidden_bytes(shape, dtype, masked)
    sizes = [accumulation_dtype(x.dtype).itemsize for x in layers]
    results = sum(
        math.prod(x.shape[:-1]) * size for x, size in zip(layers, sizes, strict=True)
    )
    rows = 4 * len(layers) * tokens * max(sizes)  # (L, B, N), while they are scaled
    # A stack of the layers, or a copy of it without padding, is as large again.
    copies = 2 + received
    return rows + max((copies - 1) * results + max(work), copies * results)


def _layers(source: Any) -> Sequence[Any]:
    return source if isinstance(source, tuple) else (source,)


def _attention_bytes(shape: Sequence[int], dtype: Any, masked: bool) -> int:
    """Return the bytes of the blocks of one matrix (N, N) of (..., N, N)."""
    size = accumulation_dtype(dtype).itemsize
    entry = 3 * size + 2 + (dtype.itemsize if masked else 0)
    return min(BLOCK_ROWS, shape[-1]) * shape[-1] * entry


def _score_bytes(query: Any, key: Any, masked: bool) -> int:
    """Return the bytes of one head of queries (..., N, d), and of repeated keys."""
    *_, num_tokens, width = query.shape
    repeated = 0
    if query.shape != key.shape:
        repeated = math.prod(query.shape) * key.dtype.itemsize
    size = accumulation_dtype(query.dtype).itemsize
    copies = 3 * size + (2 * query.dtype.itemsize if masked else 0)
    return repeated + num_tokens * (width * copies + _block_entry(num_tokens, size))


def _hidden_bytes(shape: Sequence[int], dtype: Any, masked: bool) -> int:
    """Return the bytes of one sequence of hidden states (..., N, D)."""
    *_, num_tokens, dim = shape
    size = accumulation_dtype(dtype).itemsize
    copies = size  # the scaled tokens
    if dtype.itemsize < size:
        copies += size
    if masked:
        copies += dtype.itemsize
    return num_tokens * (dim * copies + _block_entry(num_tokens, size) + 20 * size)


def _block_entry(num_tokens: int, size: int) -> int:
    """Return the bytes for each key: its scores in a block of rows, and temporaries."""
    return min(BLOCK_ROWS, num_tokens) * (3 * size + 1)


def _merging_bytes(
    shape: Sequence[int], dtype: np.dtype[Any], num_groups: int | None
) -> int:
    """Return the bytes of the means and of the sparse matrix that computes them."""
    *batch, num_tokens, dim = shape
    rows, size = math.prod(batch), accumulation_dtype(dtype).itemsize
    groups = num_tokens if num_groups is None else num_groups
    converted = dtype.itemsize < size  # a copy of the tokens, and one of the means
    tokens = rows * num_tokens * dim * size if converted else 0
    means = rows * groups * dim * (size + (dtype.itemsize if converted else 0))
    return tokens + max(100 * rows * num_tokens, 50 * rows * num_tokens + means)
