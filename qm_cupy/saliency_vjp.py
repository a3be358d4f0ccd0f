"""Vector–Jacobian products of saliency: gradients without an autograd engine.

Each takes the gradient of a loss with respect to an operation's result, then that
operation's own arguments, and returns the gradients with respect to its inputs. No
N × N array is kept: scores are computed again, some rows at a time.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda, _saliency_vjp_cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_choice,
    check_gradient,
    check_mask,
    check_tokens,
    check_values,
)
from .saliency import (
    _BLOCK,
    _check_attention,
    _check_query_key,
    _expand_mask,
    _never,
    _relative_norms,
    _saliency_shape,
    _score_dtype,
    _sequences,
    _softmax_state,
)

_AXES = {1: "N", 2: "BN", 3: "LBN", 4: "LBHN"}  # of entropies, by how many they are


@on_callers_stream
def attention_entropy_vjp(
    gradient: Array, attention: Array, *, mask: Array | None = None
) -> Array:
    r"""Vector–Jacobian product of `attention_entropy`.

    .. math:: \frac{\partial \mathcal{L}}{\partial A_{ij}} =
        -g_i \, \frac{\log P_{ij} + H_i}{\sum_k A_{ik}}, \qquad
        P_{ij} = \frac{A_{ij}}{\sum_k A_{ik}}

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies, floating.
    attention : ndarray of shape (N, N), (B, N, N), (L, B, N, N) or (L, B, H, N, N)
        As `attention_entropy` took it.
    mask : ndarray of shape (N,) or (B, N), optional
        As `attention_entropy` took it. The gradient of padded rows is not read.

    Returns
    -------
    ndarray of the shape and dtype of `attention`
        Gradient of the loss with respect to the attention; 0 in padded rows and
        columns.

    Raises
    ------
    TypeError
        If `gradient` or `attention` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, `attention` has negative entries, or an entry is not
        finite.

    Notes
    -----
    Where a probability is 0 the entropy's slope is infinite; its gradient is 0 here,
    as is that of a row without attention. With m the row's largest entry,
    :math:`\log P_{ij} + H_i = \log(A_{ij}/m) - \sum_k P_{ik} \log(A_{ik}/m)`, in which
    nothing cancels where one entry dominates.

    Examples
    --------
    >>> import numpy as np
    >>> attention = np.array([[0.25, 0.75], [0.5, 0.5]])
    >>> attention_entropy_vjp(np.ones(2), attention).round(4)
    array([[ 0.824 , -0.2747],
           [ 0.    ,  0.    ]])
    """
    given = enter(gradient=gradient, attention=attention, mask=mask)
    leave, gradient, attention, mask = given
    keep = _check_attention(attention, mask)
    _check_entropy_gradient(gradient, attention.shape[:-1], keep)
    if _cuda.is_cuda(attention):
        return leave(
            _saliency_vjp_cuda.attention_entropy_vjp_cuda(gradient, attention, mask)
        )
    return leave(_attention_entropy_vjp_reference(gradient, attention, keep))


def _attention_entropy_vjp_reference(
    gradient: NDArray[Any], attention: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    tiny = np.finfo(dtype).tiny
    gradient = _of_tokens(gradient, dtype, mask)
    out = np.empty(attention.shape, attention.dtype)
    for index, keep in _sequences(gradient.shape[:-1], mask):
        for start in range(0, attention.shape[-1], _BLOCK):
            rows = slice(start, start + _BLOCK)
            p = attention[index][rows].astype(dtype)
            if keep is not None:
                p *= keep
            top = p.max(axis=-1, keepdims=True)
            p /= np.maximum(top, tiny)
            log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
            total = p.sum(axis=-1, keepdims=True)  # at least 1, if there is attention
            mean = np.einsum("ij,ij->i", p, log_p)[:, None] / np.maximum(total, 1)
            slope = np.where(p > 0, mean - log_p, 0)
            weight = gradient[index][rows, None] / np.maximum(total * top, tiny)
            with np.errstate(over="ignore"):
                slope *= np.where(top >= tiny, weight, 0)
            out[index][rows] = _narrow(slope, out.dtype)
    return out


@on_callers_stream
def query_key_entropy_vjp(
    gradient: Array,
    query: Array,
    key: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    r"""Vector–Jacobian product of `query_key_entropy`, never storing N × N.

    .. math:: \frac{\partial \mathcal{L}}{\partial s_{ij}} =
        -g_i \, p_{ij} \, (\log p_{ij} + H_i), \qquad
        s_{ij} = q_i \cdot k_j \, c, \quad p = \operatorname{softmax}_j(s)

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies, floating.
    query, key : ndarray of shape (N, d), (B, N, d), (L, B, N, d) or (L, B, H, N, d)
        As `query_key_entropy` took them.
    causal : bool, default False
        As `query_key_entropy` took it.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        As `query_key_entropy` took it. The gradient of padded tokens is not read.

    Returns
    -------
    tuple of two ndarrays of the shape and dtype of `query`
        Gradients of the loss with respect to the queries and to the keys; 0 for padded
        tokens.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` not boolean, or the dtypes of `query` and
        `key` differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    With the sums m, r and t of `query_key_entropy`,
    :math:`\log p_{ij} + H_i = (s_{ij} - m) - t/(1+r)`, so that no digits are lost where
    one score dominates. Scores are computed again some rows at a time: memory is
    linear in N.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[0.0], [2.0]]), np.array([[1.0], [0.0]])
    >>> of_query, of_key = query_key_entropy_vjp(np.ones(2), query, key)
    >>> of_query.round(4), of_key.round(4)
    (array([[ 0.  ],
           [-0.21]]), array([[-0.42],
           [ 0.42]]))
    """
    given = enter(gradient=gradient, query=query, key=key, mask=mask)
    leave, gradient, query, key, mask = given
    scale = _check_query_key(query, key, scale)
    keep = _expand_mask(mask, query.shape[:-1])
    _check_entropy_gradient(gradient, query.shape[:-1], keep)
    given = gradient, query, key, causal, scale
    if _cuda.is_cuda(query):
        found = _saliency_vjp_cuda.query_key_entropy_vjp_cuda(*given, mask)
    else:
        found = _query_key_entropy_vjp_reference(*given, keep)
    return leave(found[0]), leave(found[1])


def _query_key_entropy_vjp_reference(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    dtype = _score_dtype(query, key, scale)
    of_query, of_key = np.zeros_like(query, order="C"), np.zeros_like(key, order="C")
    for index, keep in _sequences(query.shape[:-2], mask):
        token = slice(None) if keep is None else keep  # the padding is cut off
        g, q, k = (x[index][token].astype(dtype) for x in (gradient, query, key))
        found = _score_vjp(g, q, k, causal, dtype.type(scale))
        of_query[index][token] = _narrow(found[0], query.dtype)
        of_key[index][token] = _narrow(found[1], key.dtype)
    return of_query, of_key


def _score_vjp(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradients of one head's queries and keys, each (N, d)."""
    scaled, never = query * scale, _never(query.dtype)
    of_query, of_key = np.zeros_like(query), np.zeros_like(key)
    for start in range(0, len(query), _BLOCK):
        stop = min(start + _BLOCK, len(query))
        seen = slice(stop if causal else None)
        scores = scaled[start:stop] @ key[seen].T  # (block, N)
        if causal:
            later = np.triu_indices(stop - start, 1)
            scores[:, start:][later] = never
        _, r, t = _softmax_state(scores, axis=1)
        slope = np.exp(scores)  # of the scores, which are s - m now
        slope *= (t / (1 + r))[:, None] - scores
        slope *= (gradient[start:stop] / (1 + r) * scale)[:, None]
        of_query[start:stop] = slope @ key[seen]
        of_key[seen] += slope.T @ query[start:stop]
    return of_query, of_key


@on_callers_stream
def self_attention_entropy_vjp(
    gradient: Array, tokens: Array, *, mask: Array | None = None
) -> Array:
    r"""Vector–Jacobian product of `self_attention_entropy`, never storing N × N.

    .. math:: \frac{\partial \mathcal{L}}{\partial X} =
        (G + G^\top) X / \sqrt{D}, \qquad
        G_{ij} = -g_i \, p_{ij} \, (\log p_{ij} + H_i)

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies, floating.
    tokens : ndarray of shape (N, D), (B, N, D) or (L, B, N, D)
        As `self_attention_entropy` took them.
    mask : ndarray of shape (N,) or (B, N), optional
        As `self_attention_entropy` took it. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `tokens`
        Gradient of the loss with respect to the tokens; 0 for padded ones.

    Raises
    ------
    TypeError
        If `gradient` or `tokens` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    G is the gradient with respect to the scores, as `query_key_entropy_vjp` finds it.
    It is computed some rows at a time: memory is linear in N.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy_vjp(np.ones(2), np.array([[1.0], [0.0]])).round(4)
    array([[-0.3932],
           [ 0.1966]])
    """
    leave, gradient, tokens, mask = enter(gradient=gradient, tokens=tokens, mask=mask)
    check_values("tokens", tokens, "ND", "BND", "LBND")
    keep = _expand_mask(mask, tokens.shape[:-1])
    _check_entropy_gradient(gradient, tokens.shape[:-1], keep)
    if _cuda.is_cuda(tokens):
        return leave(
            _saliency_vjp_cuda.self_attention_entropy_vjp_cuda(gradient, tokens, mask)
        )
    return leave(_self_attention_entropy_vjp_reference(gradient, tokens, keep))


def _self_attention_entropy_vjp_reference(
    gradient: NDArray[Any], tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    scale = tokens.shape[-1] ** -0.5
    dtype = _score_dtype(tokens, tokens, scale)
    out = np.zeros_like(tokens, order="C")
    for index, keep in _sequences(tokens.shape[:-2], mask):
        token = slice(None) if keep is None else keep
        g, x = (each[index][token].astype(dtype) for each in (gradient, tokens))
        of_query, of_key = _score_vjp(g, x, x, False, dtype.type(scale))
        out[index][token] = _narrow(of_query + of_key, out.dtype)
    return out


@on_callers_stream
def saliency_vjp(
    gradient: Array,
    entropy: Array,
    *,
    salient: str = "low",
    mask: Array | None = None,
) -> Array:
    r"""Vector–Jacobian product of `saliency`.

    .. math:: \frac{\partial \mathcal{L}}{\partial H_i} = \mp \frac{1}{L\,w} \Bigl(g_i
        - \frac{[i \in \min]}{n_{\min}} \sum_k g_k (1 - y_k)
        - \frac{[i \in \max]}{n_{\max}} \sum_k g_k y_k \Bigr)

    for each layer, with y its normalised entropies and w = max - min.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient g of a loss with respect to the saliency, floating.
    entropy : ndarray of shape (N,), (B, N), (L, B, N) or (L, B, H, N)
        As `saliency` took it.
    salient : {"low", "high"}, default "low"
        As `saliency` took it: the sign is - for "low".
    mask : ndarray of shape (N,) or (B, N), optional
        As `saliency` took it. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `entropy`
        Gradient of the loss with respect to the entropies; 0 for padded tokens. The
        heads of a layer share alike in that of their mean.

    Raises
    ------
    TypeError
        If `gradient` or `entropy` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or `salient` is another word.

    Notes
    -----
    A subgradient where min–max has no gradient: tokens that tie at the least or the
    greatest entropy share equally, and all of a constant row get 0.

    Examples
    --------
    >>> import numpy as np
    >>> saliency_vjp(np.array([0.0, 0.0, 1.0]), np.array([0.5, 2.5, 1.5]))
    array([ 0.25,  0.25, -0.5 ])
    """
    given = enter(gradient=gradient, entropy=entropy, mask=mask)
    leave, gradient, entropy, mask = given
    check_values("entropy", entropy, "N", "BN", "LBN", "LBHN")
    check_choice("salient", salient, ("low", "high"))
    shape = _saliency_shape(entropy)
    check_mask(mask, shape)
    check_gradient(gradient, shape, "BN", mask=mask)
    if _cuda.is_cuda(entropy):
        return leave(
            _saliency_vjp_cuda.saliency_vjp_cuda(gradient, entropy, salient, mask)
        )
    return leave(_saliency_vjp_reference(gradient, entropy, salient, mask))


def _saliency_vjp_reference(
    gradient: NDArray[Any],
    entropy: NDArray[Any],
    salient: str,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    kind, shape = entropy.dtype, entropy.shape
    entropy = entropy.astype(np.result_type(kind, np.float32), copy=False)
    gradient = _of_tokens(gradient, entropy.dtype, mask)
    if salient == "low":
        gradient = -gradient
    if entropy.ndim > 2:
        gradient = gradient / shape[0]  # of the mean over layers
    if entropy.ndim == 4:
        entropy = entropy.mean(axis=2)  # (L, B, N)
    slope = _normalize_vjp(gradient, entropy, mask)
    if len(shape) == 4:
        slope = np.broadcast_to(slope[:, :, None] / shape[2], shape)
    return _narrow(slope, kind)


def _normalize_vjp(
    gradient: NDArray[Any], x: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return the gradient of min–max scaled rows; `gradient` is 0 for padding."""
    token: Any = True if mask is None else mask
    low = x.min(axis=-1, keepdims=True, initial=np.inf, where=token)
    high = x.max(axis=-1, keepdims=True, initial=-np.inf, where=token)
    span = np.where(high > low, high - low, 1)
    scaled = np.where(token, (x - low) / span, 0)
    slope = gradient.astype(x.dtype)
    for extreme, share in ((low, 1 - scaled), (high, scaled)):
        there = (x == extreme) & token
        pull = (gradient * share).sum(axis=-1, keepdims=True)
        slope = slope - there * (pull / np.maximum(there.sum(-1, keepdims=True), 1))
    with np.errstate(over="ignore"):
        return np.where((high > low) & token, slope / span, 0)


@on_callers_stream
def norm_saliency_vjp(
    gradient: Array, tokens: Array, *, mask: Array | None = None
) -> Array:
    r"""Vector–Jacobian product of `norm_saliency`.

    .. math:: \frac{\partial \mathcal{L}}{\partial x_i} =
        \frac{\partial \mathcal{L}}{\partial n_i} \frac{x_i}{n_i}, \qquad
        n_i = \lVert x_i \rVert

    with the gradient of the norms as `saliency_vjp` has it.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient of a loss with respect to the saliency, floating.
    tokens : ndarray of shape (N, D) or (B, N, D)
        As `norm_saliency` took them.
    mask : ndarray of shape (N,) or (B, N), optional
        As `norm_saliency` took it. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `tokens`
        Gradient of the loss with respect to the tokens; 0 for padded ones.

    Raises
    ------
    TypeError
        If `gradient` or `tokens` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    A subgradient where there is no gradient: tokens that tie at the least or the
    greatest norm share equally, those of a sequence of equal norms get 0, and so does
    a token of norm 0.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]])
    >>> norm_saliency_vjp(np.array([-1.0, 0.0, 0.0]), tokens)
    array([[-0.06, -0.08],
           [ 0.  ,  0.  ],
           [ 0.  ,  0.05]])
    """
    leave, gradient, tokens, mask = enter(gradient=gradient, tokens=tokens, mask=mask)
    check_tokens(tokens)
    check_mask(mask, tokens.shape[:-1])
    check_gradient(gradient, tokens.shape[:-1], "BN", mask=mask)
    if _cuda.is_cuda(tokens):
        return leave(_saliency_vjp_cuda.norm_saliency_vjp_cuda(gradient, tokens, mask))
    return leave(_norm_saliency_vjp_reference(gradient, tokens, mask))


def _norm_saliency_vjp_reference(
    gradient: NDArray[Any], tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    x = tokens.astype(np.float64)
    if mask is not None:
        x *= mask[..., None]
    peak = np.abs(x).max(axis=(-2, -1), keepdims=True)
    peak = np.where(peak > 0, peak, 1)
    x /= peak  # no square can overflow or vanish
    norms = _relative_norms(x)
    slope = _normalize_vjp(_of_tokens(gradient, x.dtype, mask), norms, mask)
    x *= (slope / np.where(norms > 0, norms, 1))[..., None]
    with np.errstate(over="ignore"):
        return _narrow(x / peak, tokens.dtype)


def _check_entropy_gradient(
    gradient: NDArray[Any], shape: tuple[int, ...], mask: NDArray[np.bool_] | None
) -> None:
    check_gradient(gradient, shape, _AXES[len(shape)], mask=mask)


def _of_tokens(
    gradient: NDArray[Any], dtype: np.dtype[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """Return a gradient in another dtype, 0 for padding whatever it holds there."""
    gradient = gradient.astype(dtype, copy=False)
    return gradient if mask is None else np.where(mask, gradient, dtype.type(0))


def _narrow(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round to the dtype that came in, infinite where that does not reach."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)
