"""Which part of the progress of `quickmerge` each of its stages is.

The parts are proportional to estimates of the times, in nanoseconds, of NumPy on one
core of a CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from .arrays.libraries import is_cuda
from .composition import Options, Stages
from .progress import listening, span
from .sources import Sources
from .stages.clustering.linkage import LINKAGES


def with_progress(
    stages: Stages, tokens: Any, sources: Sources, options: Options
) -> Stages:
    """Return the stages, where each call reports its part of the progress.

    Without a listener, and for CUDA arrays, the stages are returned unchanged.
    """
    if not listening() or is_cuda(tokens):
        return stages
    calls = [
        *_source_times(tokens, sources, options),
        ("cluster_tokens", _clustering_time(tokens, options)),
        ("merge_tokens", 4.0 * tokens.size),
    ]
    *ends, total = accumulate(time for _, time in calls)
    stops = [*(x / max(total, 1) for x in ends), 1.0]
    parts: dict[str, list[tuple[float, float]]] = {}
    for (name, _), start, stop in zip(calls, [0.0, *stops[:-1]], stops, strict=True):
        parts.setdefault(name, []).append((start, stop))
    watched = {
        name: _within(getattr(stages, name), iter(several))
        for name, several in parts.items()
    }
    return stages._replace(**watched)


def _within(
    function: Callable[..., Any], parts: Iterator[tuple[float, float]]
) -> Callable[..., Any]:
    """Return a function, each call of which is the next one of the parts."""

    def stage(*args: Any, **kwargs: Any) -> Any:
        with span(*next(parts)):
            return function(*args, **kwargs)

    return stage


def _source_times(
    tokens: Any, sources: Sources, options: Options
) -> list[tuple[str, float]]:
    """Return the names and times of the calls that read the source, in their order."""
    hidden = tokens if sources.hidden_states is None else sources.hidden_states
    received: list[tuple[str, float]] = []
    if sources.attention is not None:
        name, costs = "attention_entropy", (2.5, 0.0)
        layers = _layers(sources.attention)
        received = [("attention_received", 0.8 * x.size) for x in layers]
    elif sources.query is not None:
        name, costs = "query_key_entropy", (3.0, 0.04)
        layers = _layers(sources.query)
        received = [("attention_received", _pair_time(x, 3.0, 0.02)) for x in layers]
    else:
        name, costs = "self_attention_entropy", (2.5, 0.03)
        layers = _layers(hidden)
    entropy = [(name, _pair_time(x, *costs)) for x in layers]
    calls = []
    if options.need_saliency() and sources.saliency is None:
        calls += entropy
    if options.named_weights() == "attention":
        calls += received + entropy
    return calls


def _layers(source: Any) -> Sequence[Any]:
    return source if isinstance(source, tuple) else (source,)


def _pair_time(x: Any, base: float, by_width: float) -> float:
    """Return the time of a matrix (..., N, N), or of the N² pairs of (..., N, d)."""
    *leading, num_tokens, width = x.shape
    return math.prod(leading) * num_tokens**2 * (base + by_width * width)


def _clustering_time(tokens: Any, options: Options) -> float:
    *batch, num_tokens, dim = tokens.shape
    pairs = math.prod(batch) * num_tokens**2
    if options.method in LINKAGES:
        tree = 50 if options.weighted_linkage else 12
        return pairs * (6 + 0.02 * dim + tree)
    if options.method == "contiguous":  # a merge takes about 5 µs and 0.3 ns per token
        return pairs * 0.3 + tokens.size / dim * 5000 + tokens.size
    return pairs * (1.5 + 0.015 * dim)
