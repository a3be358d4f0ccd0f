"""Gradients of saliency on a GPU: launchers of the kernels.

Arrays have passed the checks of the public functions. Nothing is read back.
"""

import math
from typing import Any, NamedTuple

from . import _cuda
from .saliency import _axes, _token_norms_cuda

# Of score gradients in flight: at 16 bits and 4096 tokens 128 tiles, so that their
# product with the tokens has a block for each multiprocessor. No call holds more for
# more heads, but one tile of 128 rows at least: memory is linear in N.
_BAND_BYTES = 128 << 20
_FILE = "score_gradients"  # of the kernels that go through scores again
_QUERIES, _KEYS = 1, 2  # what the rows of a band are


class _Scores(NamedTuple):
    """The softmax of every row and its gradient, as the kernels take them."""

    weights: Any
    units: Any
    mask: Any
    outer: int
    batch: int
    heads: int
    causal: int
    scale: float


def attention_entropy_vjp_cuda(gradient: Any, attention: Any, mask: Any) -> Any:
    """Return the gradient of the attention."""
    *leading, num_tokens, _ = attention.shape
    out = _cuda.empty(attention.shape, attention.dtype)
    outer, (_, batch, heads) = math.prod(leading), _axes(leading)
    arrays = map(_cuda.contiguous, (attention, mask))
    sizes = outer, batch, heads, num_tokens
    args = (_as_computed(gradient, attention), *arrays, *sizes, out)
    rows = outer * num_tokens
    threads = rows * (1 if _cuda.implementation() == "basic" else _cuda.WARP)
    _launch("attention_entropy_vjp", "attention_entropy_vjp", attention, threads, args)
    return out


def query_key_entropy_vjp_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> tuple[Any, Any]:
    """Return the gradients of the queries and of the keys."""
    query, key = _cuda.contiguous(query), _cuda.contiguous(key)
    scores = _scores(gradient, query, key, causal, scale, mask)
    of_query = _token_gradients(scores, query, key, _QUERIES)
    return of_query, _token_gradients(scores, key, query, _KEYS)


def self_attention_entropy_vjp_cuda(gradient: Any, tokens: Any, mask: Any) -> Any:
    """Return the gradient of the tokens."""
    tokens = _cuda.contiguous(tokens)
    scale = tokens.shape[-1] ** -0.5
    scores = _scores(gradient, tokens, tokens, False, scale, mask)
    return _token_gradients(scores, tokens, tokens, _QUERIES | _KEYS)


def _scores(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> _Scores:
    *leading, num_tokens, dim = query.shape
    outer, (_, batch, heads) = math.prod(leading), _axes(leading)
    kind, mask = _cuda.accumulation(query.dtype), _cuda.contiguous(mask)
    weights = _cuda.empty((outer, num_tokens, 3), kind)
    arrays = _as_computed(gradient, query), query, key, mask
    sizes = outer, batch, heads, num_tokens, dim
    args = (*arrays, *sizes, int(causal), scale, weights)
    if _cuda.implementation() == "basic":
        units = None
        _launch(_FILE, "score_weights", query, outer * num_tokens, args)
    else:
        units = _cuda.empty((outer,), kind)
        threads = outer * _tiles(num_tokens) * _cuda.BLOCK
        _launch(_FILE, "score_weights", query, threads, args)
        each = outer * _cuda.BLOCK
        _launch(_FILE, "weight_units", query, each, (num_tokens, weights, units))
    return _Scores(weights, units, mask, outer, batch, heads, int(causal), scale)


def _token_gradients(scores: _Scores, own: Any, other: Any, sides: int) -> Any:
    """Return the gradient of `own`, each row of whose scores is with all of `other`."""
    *_, num_tokens, dim = own.shape
    basic, kind = _cuda.implementation() == "basic", _cuda.accumulation(own.dtype)
    out = _cuda.empty(own.shape, own.dtype)
    tiles = _tiles(num_tokens)  # of a head
    every, columns = scores.outer * tiles, tiles * _cuda.TILE
    stored = kind if basic else own.dtype
    most = max(_BAND_BYTES // (_cuda.TILE * columns * stored.itemsize), 1)
    band = _cuda.empty((min(most, every), _cuda.TILE, columns), stored)
    factor = other if basic else _transposed(other, scores)
    masked = scores.batch, scores.heads, num_tokens, dim
    for first in range(0, every, most):
        part = first, min(most, every - first)
        rows = part[1] * _cuda.TILE
        arrays = own, other, scores.weights, scores.mask
        options = scores.causal, scores.scale, sides
        args: tuple[Any, ...] = (*arrays, *part, *masked, *options, band)
        threads = rows * columns if basic else part[1] * tiles * _cuda.BLOCK
        _launch(_FILE, "score_gradients", own, threads, args)
        if basic:
            args = (band, factor, scores.mask, *part, *masked)
            _launch(
                _FILE, "token_gradients", own, rows * dim, (*args, scores.scale, out)
            )
        else:
            args = (band, factor, scores.units, *part, num_tokens, dim, *options, out)
            threads = part[1] * _tiles(dim) * _cuda.BLOCK
            _launch(_FILE, "token_gradients", own, threads, args)
    return out


def _transposed(tokens: Any, scores: _Scores) -> Any:
    """Return (L, B, H, D, 128 T), 0 for padding and behind the last token."""
    *_, num_tokens, dim = tokens.shape
    columns = _tiles(num_tokens) * _cuda.TILE
    out = _cuda.empty((scores.outer, dim, columns), tokens.dtype)
    sizes = scores.outer, scores.batch, scores.heads, num_tokens, dim
    squares = scores.outer * (columns // 32) * -(-dim // 32)
    args = (tokens, scores.mask, *sizes, out)
    _launch(_FILE, "transpose_tokens", tokens, squares * _cuda.BLOCK, args)
    return out


def saliency_vjp_cuda(gradient: Any, entropy: Any, salient: str, mask: Any) -> Any:
    """Return the gradient of the entropies."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = _axes(leading)
    gradient = _as_computed(gradient, entropy)
    entropy, mask = _cuda.contiguous(entropy), _cuda.contiguous(mask)
    extremes = _cuda.empty((layers, batch, 4), gradient.dtype)
    out = _cuda.empty(entropy.shape, entropy.dtype)
    sizes = layers, batch, heads, num_tokens
    rows = layers * batch
    threads = rows * (1 if _cuda.implementation() == "basic" else _cuda.BLOCK)
    args: tuple[Any, ...] = (gradient, entropy, mask, *sizes, extremes)
    _launch("saliency_vjp", "entropy_extremes", entropy, threads, args)
    args = (gradient, entropy, mask, extremes, *sizes, int(salient == "high"), out)
    _cuda.launch("basic/saliency_vjp", "saliency_vjp", entropy.dtype, out.size, args)
    return out


def norm_saliency_vjp_cuda(gradient: Any, tokens: Any, mask: Any) -> Any:
    """Return the gradient of the tokens."""
    norms = _token_norms_cuda(tokens, mask)
    slopes = saliency_vjp_cuda(gradient, norms, "high", mask)
    out = _cuda.empty(tokens.shape, tokens.dtype)
    tokens = _cuda.contiguous(tokens)
    args = (slopes, tokens, norms, norms.size, tokens.shape[-1], out)
    _cuda.launch(
        "basic/norm_saliency_vjp", "token_norms_vjp", out.dtype, out.size, args
    )
    return out


def _launch(
    file: str, kernel: str, like: Any, threads: int, args: tuple[Any, ...]
) -> None:
    _cuda.launch(f"{_cuda.implementation()}/{file}", kernel, like.dtype, threads, args)


def _as_computed(gradient: Any, like: Any) -> Any:
    return _cuda.contiguous(gradient, _cuda.accumulation(like.dtype))


def _tiles(rows: int) -> int:
    return -(-rows // _cuda.TILE)
