"""Saliency: how much each token matters, from attention entropy or from norms."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda, _tiles
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_choice,
    check_mask,
    check_not_negative,
    check_number,
    check_scores,
    check_shape,
    check_tokens,
    check_values,
)

_BLOCK = 256  # rows of scores in flight: a block and its exponentials stay in cache

State = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


@on_callers_stream
def attention_entropy(attention: Array, *, mask: Array | None = None) -> Array:
    r"""Shannon entropy of every row of given attention probabilities, in nats.

    .. math:: H_i = -\sum_j A_{ij} \log A_{ij}, \qquad 0 \log 0 = 0

    Parameters
    ----------
    attention : ndarray of shape (N, N), (B, N, N), (L, B, N, N) or (L, B, H, N, N)
        Attention probabilities, non-negative; float16, bfloat16, float32 or float64.
        Each row is taken relative to its sum. One layer of heads, (B, H, N, N), is
        given as ``attention[None]``.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded rows have entropy 0; padded columns are left out,
        and the rest of the row taken relative to its own sum.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If `attention` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, or `attention` has negative or non-finite entries.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> attention_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4)
    array([0.    , 0.6931])
    """
    leave, attention, mask = enter(attention=attention, mask=mask)
    keep = _check_attention(attention, mask)
    if _cuda.is_cuda(attention):
        return leave(_attention_entropy_cuda(attention, mask))
    return leave(_attention_entropy_reference(attention, keep))


def _check_attention(
    attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """Refuse what is no attention; return the mask of its rows."""
    check_values("attention", attention, "NN", "BNN", "LBNN", "LBHNN")
    check_shape(
        "attention", attention, "NN", (*attention.shape[:-1], attention.shape[-2])
    )
    check_not_negative("attention", attention)
    return _expand_mask(mask, attention.shape[:-1])


def _attention_entropy_reference(
    attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    tiny = np.finfo(dtype).tiny
    entropy = np.zeros(attention.shape[:-1], dtype)  # (..., N)
    for index, keep in _sequences(entropy.shape[:-1], mask):
        for start in range(0, attention.shape[-1], _BLOCK):
            rows = slice(start, start + _BLOCK)
            p = attention[index][rows].astype(dtype)
            if keep is not None:
                p *= keep
            total = np.maximum(p.sum(axis=-1), tiny)
            log_p = np.log(np.maximum(p, tiny))  # 0 · log(tiny) = 0
            mean = np.einsum("ij,ij->i", p, log_p) / total
            entropy[index][rows] = np.where(total > tiny, np.log(total) - mean, 0)
    return np.maximum(entropy if mask is None else entropy * mask, 0)


def _attention_entropy_cuda(attention: Any, mask: Any) -> Any:
    *leading, num_tokens, _ = attention.shape
    out = _cuda.empty((*leading, num_tokens), _cuda.accumulation(attention.dtype))
    arrays = _cuda.contiguous(attention), _cuda.contiguous(mask)
    _, batch, heads = _axes(leading)
    args = (*arrays, math.prod(leading), batch, heads, num_tokens, out)
    chosen = _cuda.implementation()
    threads = out.size * (1 if chosen == "basic" else _cuda.WARP)
    _cuda.launch(
        f"{chosen}/attention_entropy",
        "attention_entropy",
        attention.dtype,
        threads,
        args,
    )
    return out


def _axes(leading: Sequence[int]) -> tuple[int, int, int]:
    """Return L, B and H of leading axes (), (B), (L, B) or (L, B, H)."""
    layers = leading[0] if len(leading) > 1 else 1
    batch = leading[1] if len(leading) > 1 else math.prod(leading)
    return layers, batch, leading[2] if len(leading) > 2 else 1


@on_callers_stream
def query_key_entropy(
    query: Array,
    key: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
) -> Array:
    r"""Entropy of the attention of queries to keys, never storing the N × N matrix.

    .. math:: H_i = \operatorname{entropy}(\operatorname{softmax}_j(q_i \cdot k_j\,c))

    Parameters
    ----------
    query, key : ndarray of shape (N, d), (B, N, d), (L, B, N, d) or (L, B, H, N, d)
        Queries and keys of the same shape and dtype. One layer of heads,
        (B, H, N, d), is given as ``query[None]``.
    causal : bool, default False
        Whether token i attends only to tokens 0..i.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens neither attend nor are attended; their
        entropy is 0.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` not boolean, or the dtypes differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The largest score m of a row is left out of the running sums
    :math:`r = \sum e^{s-m}` and :math:`t = \sum e^{s-m}(s-m)` and added last,
    :math:`H = \log(1+r) - t/(1+r)`, so an entropy of 1e-12 is as exact as one of 1.

    Examples
    --------
    >>> import numpy as np
    >>> query_key_entropy(np.zeros((4, 2)), np.zeros((4, 2)), causal=True).round(4)
    array([0.    , 0.6931, 1.0986, 1.3863])
    """
    leave, query, key, mask = enter(query=query, key=key, mask=mask)
    scale = _check_query_key(query, key, scale)
    keep = _expand_mask(mask, query.shape[:-1])
    if _cuda.is_cuda(query):
        return leave(_query_key_entropy_cuda(query, key, causal, scale, mask))
    return leave(_query_key_entropy_reference(query, key, causal, scale, keep))


def _check_query_key(
    query: NDArray[Any], key: NDArray[Any], scale: float | None
) -> float:
    """Refuse queries and keys that do not fit; return the factor of their scores."""
    check_values("query", query, "Nd", "BNd", "LBNd", "LBHNd")
    check_values("key", key, "Nd", "BNd", "LBNd", "LBHNd")
    check_shape("key", key, "LBHNd", query.shape)
    if key.dtype != query.dtype:
        raise TypeError(f"`key` must be {query.dtype} like `query`, got {key.dtype}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return check_number("scale", scale, 0, np.inf, "()")


def _query_key_entropy_reference(
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    dtype = _score_dtype(query, key, scale)
    never = _never(dtype)
    entropy = np.zeros(query.shape[:-1], np.result_type(query.dtype, np.float32))
    for index, keep in _sequences(entropy.shape[:-1], mask):
        token = slice(None) if keep is None else keep  # the padding is cut off
        q, k = query[index][token].astype(dtype), key[index][token].astype(dtype)
        q *= dtype.type(scale)
        values = np.empty(len(q), dtype)
        for start in range(0, len(q), _BLOCK):
            stop = min(start + _BLOCK, len(q))
            scores = q[start:stop] @ k[: stop if causal else None].T
            if causal:
                later = np.triu_indices(stop - start, 1)
                scores[:, start:][later] = never
            values[start:stop] = _entropy(_softmax_state(scores, axis=1))
        entropy[index][token] = values
    return entropy


def _query_key_entropy_cuda(
    query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Any:
    *leading, num_tokens, head_dim = query.shape
    out = _cuda.empty((*leading, num_tokens), _cuda.accumulation(query.dtype))
    arrays = map(_cuda.contiguous, (query, key, mask))
    outer, (_, batch, heads) = math.prod(leading), _axes(leading)
    sizes = outer, batch, heads, num_tokens, head_dim
    args = (*arrays, *sizes, int(causal), scale, out)
    kernel = "query_key_entropy"
    if _cuda.implementation() == "basic":
        _cuda.launch(f"basic/{kernel}", kernel, query.dtype, out.size, args)
        return out

    def blocks(shape: _tiles.Shape) -> int:
        return outer * _tiles.row_tiles(shape, num_tokens)

    # Rows that do not fit come step by step, which leaves no registers for more rows.
    shape = _tiles.HALF._replace(suffix="")
    kept = _tiles.kept_bytes(head_dim * query.dtype.itemsize, query.dtype)
    if kept and _tiles.select_shape(blocks) is _tiles.WHOLE:
        shape = _tiles.WHOLE._replace(suffix="_kept", shared=kept)
    _tiles.launch(kernel, kernel, query.dtype, shape, blocks(shape), args)
    return out


@on_callers_stream
def self_attention_entropy(tokens: Array, *, mask: Array | None = None) -> Array:
    r"""Entropy of each token's softmax attention to all tokens, scores over √D.

    .. math:: A = \operatorname{softmax}(X X^\top / \sqrt{D}), \quad
        H_i = -\sum_j A_{ij} \log A_{ij}

    Parameters
    ----------
    tokens : ndarray of shape (N, D), (B, N, D) or (L, B, N, D)
        Hidden states, of L layers if so shaped. float16, bfloat16, float32 or float64.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens neither attend nor are attended; their
        entropy is 0.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The scores are symmetric: only blocks on and above the diagonal are computed, each
    feeding the sums of its rows and of its columns, and none is kept.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy(np.array([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]])).round(4)
    array([0.    , 1.0986, 0.    ])
    """
    leave, tokens, mask = enter(tokens=tokens, mask=mask)
    check_values("tokens", tokens, "ND", "BND", "LBND")
    keep = _expand_mask(mask, tokens.shape[:-1])
    return leave(_self_attention_entropy(tokens, keep))


def _self_attention_entropy(tokens: Any, mask: Any) -> Any:
    if _cuda.is_cuda(tokens):
        return _self_attention_entropy_cuda(tokens, mask)
    return _self_attention_entropy_reference(tokens, mask)


def _self_attention_entropy_reference(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = _score_dtype(tokens, tokens, tokens.shape[-1] ** -0.5)
    entropy = np.zeros(tokens.shape[:-1], np.result_type(tokens.dtype, np.float32))
    for index, keep in _sequences(entropy.shape[:-1], mask):
        token = slice(None) if keep is None else keep
        x = tokens[index][token].astype(dtype, copy=False)
        entropy[index][token] = _symmetric_entropy(x)
    return entropy


def _symmetric_entropy(x: NDArray[Any]) -> NDArray[Any]:
    num_tokens, dim = x.shape
    scaled = x * x.dtype.type(dim**-0.5)
    zeros = np.zeros(num_tokens, x.dtype)
    state = np.full(num_tokens, _never(x.dtype)), zeros, zeros.copy()

    def add(part: slice, new: State) -> None:
        total = _add_states(tuple(sums[part] for sums in state), new)
        for sums, values in zip(state, total, strict=True):
            sums[part] = values

    for start in range(0, num_tokens, _BLOCK):
        stop = min(start + _BLOCK, num_tokens)
        scores = scaled[start:stop] @ x[start:].T  # (block, N - start)
        if stop < num_tokens:
            across = scores[:, stop - start :].copy()
            add(slice(stop, None), _softmax_state(across, axis=0))
        add(slice(start, stop), _softmax_state(scores, axis=1))
    return _entropy(state)


def _self_attention_entropy_cuda(tokens: Any, mask: Any) -> Any:
    *leading, num_tokens, dim = tokens.shape
    batch, kind = math.prod(leading), _cuda.accumulation(tokens.dtype)
    out = _cuda.empty((*leading, num_tokens), kind)
    tokens, mask = _cuda.contiguous(tokens), _cuda.contiguous(mask)
    sizes = batch, num_tokens, dim
    if _cuda.implementation() == "basic":
        args = (tokens, mask, *sizes, out)
        file, kernel = "basic/self_attention_entropy", "self_attention_entropy"
        _cuda.launch(file, kernel, tokens.dtype, out.size, args)
        return out

    def blocks(shape: _tiles.Shape) -> int:
        return batch * _tiles.upper_tiles(shape, num_tokens)

    shape = _tiles.select_shape(blocks, tokens.dtype)
    halves = 2 if shape is _tiles.HALF else 1
    slots = -(-num_tokens // _cuda.TILE) * halves
    states = _cuda.empty((batch, slots, num_tokens, 3), kind)
    args, kernel = (tokens, mask, *sizes, states), "self_attention_states"
    file = "self_attention_entropy"
    _tiles.launch(file, kernel, tokens.dtype, shape, blocks(shape), args)
    args = (states, mask, batch, num_tokens, halves, out)
    file, kernel = "optimized/self_attention_entropy", "self_attention_entropy"
    _cuda.launch(file, kernel, tokens.dtype, out.size, args)
    return out


def _score_dtype(query: NDArray[Any], key: NDArray[Any], scale: float) -> np.dtype[Any]:
    """Return the dtype that holds every score: float32 where it does."""
    peaks = (max(float(x.max()), -float(x.min())) for x in (query, key) if x.size)
    largest = math.prod(peaks) * query.shape[-1] * scale
    check_scores(largest)
    narrow = query.dtype.itemsize < 8 and largest < 1e30
    return np.dtype(np.float32 if narrow else np.float64)


def _never(dtype: np.dtype[Any]) -> Any:
    """Return a score no softmax sees, finite so that 0 · (score - max) is 0."""
    return np.finfo(dtype).min / 8


def _softmax_state(scores: NDArray[Any], axis: int) -> State:
    """Return (m, r, t): the maximum, and the sums without it. Takes m off `scores`."""
    m = scores.max(axis=axis, keepdims=True)
    scores -= m
    top = scores == 0
    weights = np.exp(scores)
    np.copyto(weights, 0, where=top)
    ties = np.count_nonzero(top, axis=axis) - 1
    r = weights.sum(axis=axis) + ties.astype(weights.dtype)
    t = np.einsum("ij,ij->i" if axis else "ij,ij->j", weights, scores)
    return m.squeeze(axis), r, t


def _add_states(a: tuple[NDArray[Any], ...], b: State) -> State:
    """Return (m, r, t) over the scores of both."""
    first = a[0] >= b[0]
    m, r, t = (np.where(first, x, y) for x, y in zip(a, b, strict=True))
    low, r_low, t_low = (np.where(first, y, x) for x, y in zip(a, b, strict=True))
    weight = np.exp(low - m)
    return m, r + weight * (1 + r_low), t + weight * (t_low + (low - m) * (1 + r_low))


def _entropy(state: State) -> NDArray[Any]:
    _, r, t = state
    entropy: NDArray[Any] = np.log1p(r) - t / (1 + r)
    return entropy


def _sequences(
    leading: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> Iterator[tuple[tuple[int, ...], NDArray[np.bool_] | None]]:
    """Yield the index of every sequence with its tokens' mask."""
    for index in np.ndindex(leading):
        yield index, None if mask is None else mask[index]


def _expand_mask(
    mask: NDArray[np.bool_] | None, shape: tuple[int, ...]
) -> NDArray[np.bool_] | None:
    """Return a (B, N) mask as one of shape (N), (B, N), (L, B, N) or (L, B, H, N)."""
    if mask is None:
        return None
    batch = shape[-2:-1] if len(shape) < 4 else shape[1:2]
    check_mask(mask, (*batch, shape[-1]))
    if len(shape) == 4:
        mask = mask[:, None]
    return np.broadcast_to(mask, shape)


@on_callers_stream
def saliency(
    entropy: Array, *, salient: str = "low", mask: Array | None = None
) -> Array:
    r"""Saliency of each token from its attention entropy in every layer.

    .. math:: s_i = 1 - \frac{1}{L} \sum_l \operatorname{Normalize}(H_i^{(l)})

    with Normalize the min–max scaling over the tokens of a sequence.

    Parameters
    ----------
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        Attention entropy; heads are averaged first, layers after normalisation.
    salient : {"low", "high"}, default "low"
        Which entropy is salient. "low", as the authors' code computes it: a token
        that knows where to look. "high" leaves out the "1 -", as they print it.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens have saliency 0 and set no extreme.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. A sequence whose
        entropies are all equal normalises to 0.

    Raises
    ------
    TypeError
        If `entropy` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or `salient` is another word.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> saliency(np.array([0.5, 2.5, 1.5]))
    array([1. , 0. , 0.5])
    """
    leave, entropy, mask = enter(entropy=entropy, mask=mask)
    check_values("entropy", entropy, "N", "BN", "LBN", "LBHN")
    check_choice("salient", salient, ("low", "high"))
    check_mask(mask, _saliency_shape(entropy))
    return leave(_saliency(entropy, salient, mask))


def _saliency(entropy: Any, salient: str, mask: Any) -> Any:
    if _cuda.is_cuda(entropy):
        return _saliency_cuda(entropy, salient, mask)
    return _saliency_reference(entropy, salient, mask)


def _saliency_shape(entropy: NDArray[Any]) -> tuple[int, ...]:
    """Return (N,) or (B, N)."""
    leading = entropy.shape[1:2] if entropy.ndim > 2 else entropy.shape[:-1]
    return (*leading, entropy.shape[-1])


def _saliency_reference(
    entropy: NDArray[Any], salient: str, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    entropy = entropy.astype(np.result_type(entropy.dtype, np.float32), copy=False)
    if entropy.ndim == 4:
        entropy = entropy.mean(axis=2)  # (L, B, N)
    scaled = _normalize(entropy, mask)
    if scaled.ndim == 3:
        scaled = scaled.mean(axis=0)  # (B, N)
    if salient == "low":
        scaled = 1 - scaled
    return scaled if mask is None else scaled * mask


def _saliency_cuda(entropy: Any, salient: str, mask: Any) -> Any:
    *leading, num_tokens = entropy.shape
    layers, batch, heads = _axes(leading)
    kind = _cuda.accumulation(entropy.dtype)
    out = _cuda.empty((batch, num_tokens) if leading else (num_tokens,), kind)
    entropy, mask = _cuda.contiguous(entropy), _cuda.contiguous(mask)
    sizes, high = (layers, batch, heads, num_tokens), int(salient == "high")
    if _cuda.implementation() == "optimized":
        _saliency_optimized(entropy, mask, sizes, high, out)
        return out
    lowest, highest = (_cuda.empty((layers, batch), kind) for _ in range(2))
    args: tuple[Any, ...] = (entropy, mask, *sizes, lowest, highest)
    file, dtype = "basic/saliency", entropy.dtype
    _cuda.launch(file, "entropy_range", dtype, lowest.size, args)
    args = (entropy, mask, lowest, highest, *sizes, high, out)
    _cuda.launch(file, "saliency", dtype, out.size, args)
    return out


def _saliency_optimized(
    entropy: Any, mask: Any, sizes: tuple[int, int, int, int], high: int, out: Any
) -> None:
    layers, batch, heads, num_tokens = sizes
    file, kind = "optimized/saliency", out.dtype
    parts = -(-num_tokens // (_cuda.THREAD_TOKENS * _cuda.BLOCK))
    lowest, highest = (_cuda.empty((layers, batch, parts), kind) for _ in range(2))
    # The heads are read once: the second kernel takes their means.
    means = _cuda.empty((layers, batch, num_tokens), kind) if heads > 1 else None
    args: tuple[Any, ...] = (entropy, mask, *sizes, lowest, highest, means)
    threads = lowest.size * _cuda.BLOCK
    _cuda.launch(file, "entropy_range", entropy.dtype, threads, args)
    means = entropy if means is None else means
    args = (means, mask, lowest, highest, layers, batch, num_tokens, high, out)
    _cuda.launch(file, "saliency", means.dtype, batch * parts * _cuda.BLOCK, args)


@on_callers_stream
def norm_saliency(tokens: Array, *, mask: Array | None = None) -> Array:
    """Saliency of each token from its L2 norm, min–max scaled over its sequence.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens have saliency 0 and set no extreme.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. 0 throughout a
        sequence whose norms are all equal.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> norm_saliency(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]]))
    array([0.5, 0. , 1. ])
    """
    leave, tokens, mask = enter(tokens=tokens, mask=mask)
    check_tokens(tokens)
    check_mask(mask, tokens.shape[:-1])
    if _cuda.is_cuda(tokens):
        norms = _token_norms_cuda(tokens, mask)
        return leave(_saliency_cuda(norms, "high", mask))
    return leave(_norm_saliency_reference(tokens, mask))


def _norm_saliency_reference(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    scaled = _normalize(_relative_norms(tokens, mask), mask)
    return scaled.astype(np.result_type(tokens.dtype, np.float32))


def _relative_norms(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return L2 norms (B, N) over the largest entry of the sequence; 0 for padding.

    What uses them asks for ratios only, and no square can overflow or vanish.
    """
    x = tokens.astype(np.float64)
    if mask is not None:
        x = x * mask[..., None]
    peak = np.abs(x).max(axis=(-2, -1), keepdims=True)
    return np.linalg.norm(x / np.where(peak > 0, peak, 1), axis=-1)


def _token_norms_cuda(tokens: Any, mask: Any = None) -> Any:
    """Return the L2 norm of each token, (..., N, D) -> (..., N); 0 for padding."""
    out = _cuda.empty(tokens.shape[:-1], _cuda.accumulation(tokens.dtype))
    arrays = _cuda.contiguous(tokens), _cuda.contiguous(mask)
    args = (*arrays, out.size, tokens.shape[-1], out)
    chosen = _cuda.implementation()
    threads = out.size * (1 if chosen == "basic" else _cuda.WARP)
    _cuda.launch(f"{chosen}/token_norms", "token_norms", tokens.dtype, threads, args)
    return out


def _normalize(x: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Min–max scale the last axis over its tokens; a constant row and padding are 0."""
    token: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = (x - low) / span
    return scaled if mask is None else scaled * mask
