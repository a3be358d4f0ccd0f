"""Attention entropy of queries and keys."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_number, check_shape, check_values
from ...arrays.conversion import Array, BoolArray, FloatArray, enter, on_callers_stream
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import expand_mask, iter_sequences, layer_axes
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.constants import KEYS, QUERIES
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import (
    HALF,
    WHOLE,
    Tiling,
    kept_bytes,
    select_shape,
)
from ...settings import implementation
from .online_softmax import (
    BLOCK_ROWS,
    entropy_of_state,
    masked_score,
    score_dtype,
    softmax_state,
)
from .score_gradients import (
    check_entropy_gradient,
    score_vjp,
    scores_cuda,
    token_gradients_cuda,
)


@operation(
    inputs=("query", "key"),
    constants=("mask?",),
    options=("bool causal", "float? scale"),
    dtype="computed",
    shapes=without_last_axis,
)
def query_key_entropy(
    query: Array,
    key: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the entropy of the attention of queries to keys, without an N × N matrix.

    .. math:: H_i = \operatorname{entropy}(\operatorname{softmax}_j(q_i \cdot k_j\,c))

    Parameters
    ----------
    query, key : ndarray of shape (N, d), (B, N, d), (L, B, N, d) or (L, B, H, N, d)
        Queries and keys of the same shape and dtype. Pass one layer of heads,
        (B, H, N, d), as ``query[None]``.
    causal : bool, default False
        If True, token i attends only to tokens 0..i.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not attend and no token attends to them;
        their entropy is 0.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` is not boolean, or the dtypes differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The running sums :math:`r = \sum e^{s-m}` and :math:`t = \sum e^{s-m}(s-m)` leave
    out the largest score m of a row. It is added last,
    :math:`H = \log(1+r) - t/(1+r)`.
    An entropy of 1e-12 is therefore as exact as an entropy of 1.

    Examples
    --------
    >>> import numpy as np
    >>> query_key_entropy(np.zeros((4, 2)), np.zeros((4, 2)), causal=True).round(4)
    array([0.    , 0.6931, 1.0986, 1.3863])
    """
    leave, query, key, mask = enter({"query": query, "key": key, "mask": mask})
    args = query, key
    return leave(
        compute_query_key_entropy(*args, causal=causal, scale=scale, mask=mask)
    )


def compute_query_key_entropy(
    query: Any,
    key: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
) -> Any:
    """Return the entropy of converted arrays, after checking them."""
    scale = _check_query_key(query, key, causal, scale)
    keep = expand_mask(mask, query.shape[:-1])  # (..., N); the kernels take (B, N)
    if is_cuda(query):
        return _query_key_entropy_cuda(query, key, causal, scale, mask)
    return _query_key_entropy_reference(query, key, causal, scale, keep)


def _check_query_key(
    query: NDArray[Any], key: NDArray[Any], causal: Any, scale: float | None
) -> float:
    """Raise if queries and keys do not fit; return the factor of their scores."""
    check_values("query", query, "Nd", "BNd", "LBNd", "LBHNd")
    check_values("key", key, "Nd", "BNd", "LBNd", "LBHNd")
    check_shape("key", key, "LBHNd", query.shape)
    if key.dtype != query.dtype:
        raise TypeError(f"`key` must be {query.dtype} like `query`, got {key.dtype}")
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"`causal` must be True or False, got {causal!r}")
    if scale is None:  # 1/√d
        scale = query.shape[-1] ** -0.5
    return check_number("scale", scale, 0, np.inf, "()")


def _query_key_entropy_reference(
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    # Inputs below float64 are computed in float32, or in float64 for huge scores.
    dtype = score_dtype(query, key, scale)
    masked = masked_score(dtype)
    entropy = np.zeros(query.shape[:-1], np.result_type(query.dtype, np.float32))
    for index, keep in iter_sequences(entropy.shape[:-1], mask):
        token = slice(None) if keep is None else keep  # padding is removed
        q, k = query[index][token].astype(dtype), key[index][token].astype(dtype)
        q *= dtype.type(scale)  # (N, d): cheaper here than in the N × N scores
        values = np.empty(len(q), dtype)  # entropies of the tokens that are left
        # A block of rows of scores stays in cache.
        for start in range(0, len(q), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(q))
            # Causal rows need no keys after their block.
            scores = q[start:stop] @ k[: stop if causal else None].T  # (block, N)
            if causal:
                # Only the square on the diagonal has keys after a row's own token.
                later = np.triu_indices(stop - start, 1)
                scores[:, start:][later] = masked
            values[start:stop] = entropy_of_state(softmax_state(scores, axis=1))
        entropy[index][token] = values
    return entropy


def _query_key_entropy_cuda(
    query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Any:
    *leading, num_tokens, head_dim = query.shape
    out = empty((*leading, num_tokens), accumulation_dtype(query.dtype))  # (..., N)
    arrays = map(contiguous, (query, key, mask))
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)  # L · B · H
    sizes = outer, batch, heads, num_tokens, head_dim
    args = (*arrays, *sizes, int(causal), scale, out)
    # A block computes all tiles of its rows, so the states of rows stay in registers.
    tiling = Tiling(outer, num_tokens, num_tokens, whole_rows=True)
    # If the queries of a block do not fit in shared memory, they are loaded step by
    # step. That leaves registers for half a tile of rows only.
    shape = HALF._replace(suffix="")
    if implementation() == "optimized":
        # Whole tiles, with the queries of a block in shared memory for all its keys.
        kept = kept_bytes(head_dim * query.dtype.itemsize, query.dtype)
        # `kept` is 0 for float64 and for queries that are too wide for shared memory.
        if kept and select_shape(tiling, query.dtype) is WHOLE:
            shape = WHOLE._replace(suffix="_kept", shared=kept)
    kernel = "query_key_entropy", "query_key_entropy"
    launch(*kernel, query.dtype, args, outputs=out.size, tiles=tiling, shape=shape)
    return out


@on_callers_stream
def query_key_entropy_vjp(
    gradient: FloatArray,
    query: Array,
    key: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: BoolArray | None = None,
) -> tuple[Array, Array]:
    r"""Return the vector–Jacobian product of `query_key_entropy`, without N × N arrays.

    .. math:: \frac{\partial \mathcal{L}}{\partial s_{ij}} =
        -g_i \, p_{ij} \, (\log p_{ij} + H_i), \qquad
        s_{ij} = q_i \cdot k_j \, c, \quad p = \operatorname{softmax}_j(s)

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies; any float dtype.
    query, key : ndarray of shape (N, d), (B, N, d), (L, B, N, d) or (L, B, H, N, d)
        The arguments of `query_key_entropy`.
    causal : bool, default False
        The argument of `query_key_entropy`.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `query_key_entropy`. The gradient of padded tokens is not read.

    Returns
    -------
    tuple of two ndarrays of the shape and dtype of `query`
        Gradients of the loss with respect to the queries and to the keys; 0 for padded
        tokens.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` is not boolean, or the dtypes of `query` and
        `key` differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    With m, r and t of `query_key_entropy`,
    :math:`\log p_{ij} + H_i = (s_{ij} - m) - t/(1+r)`. No digits are lost where one
    score dominates. The scores are recomputed for some rows at a time, so memory is
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
    leave, query, key, mask, gradient = enter(
        {"query": query, "key": key, "mask": mask}, gradients={"gradient": gradient}
    )
    scale = _check_query_key(query, key, causal, scale)
    keep = expand_mask(mask, query.shape[:-1])
    check_entropy_gradient(gradient, query.shape[:-1], keep)
    args = gradient, query, key, causal, scale
    if is_cuda(query):
        slopes = _query_key_entropy_vjp_cuda(*args, mask)
    else:
        slopes = _query_key_entropy_vjp_reference(*args, keep)
    return leave(slopes[0]), leave(slopes[1])


def _query_key_entropy_vjp_reference(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    dtype = score_dtype(query, key, scale)
    # Padding keeps its gradient of 0.
    of_query, of_key = np.zeros_like(query, order="C"), np.zeros_like(key, order="C")
    for index, keep in iter_sequences(query.shape[:-2], mask):
        token = slice(None) if keep is None else keep  # padding is removed
        g, q, k = (x[index][token].astype(dtype) for x in (gradient, query, key))
        slopes = score_vjp(g, q, k, causal, dtype.type(scale))  # each (N, d)
        # Sums in `dtype` are rounded to the dtype of the inputs once, at the end.
        of_query[index][token] = narrow(slopes[0], query.dtype)
        of_key[index][token] = narrow(slopes[1], key.dtype)
    return of_query, of_key


def _query_key_entropy_vjp_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> tuple[Any, Any]:
    """Return the gradients with respect to the queries and the keys."""
    query, key = contiguous(query), contiguous(key)
    scores = scores_cuda(gradient, query, key, causal, scale, mask)
    # With G = ∂L/∂s: queries get G K c, keys get Gᵀ Q c.
    of_query = token_gradients_cuda(scores, query, key, QUERIES)  # (..., N, d)
    return of_query, token_gradients_cuda(scores, key, query, KEYS)
