"""Attention entropy of queries and keys, without an N × N matrix in memory.

There are L layers, B sequences and H heads. In one head, q_i is the query of token i,
and k_j is the key of token j, both of width d. Q and K are their matrices (N, d). The
scores are s_ij = c q_i · k_j with the factor c, the attention is
p_ij = softmax_j(s_ij), and H_i is the entropy of row i. (m, r, t) is the state of a row
of scores: m is the largest score, and r and t are two sums, which online_softmax.py
defines. g_i is the gradient of a loss ℒ with respect to H_i, and G_ij = ∂ℒ/∂s_ij.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_finite_values, check_mask, check_number
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import (
    check_heads,
    check_key,
    expand_mask,
    iter_sequences,
    layer_axes,
    repeat_heads,
    saliency_shape,
)
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.constants import KEYS, QUERIES
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import kept_or_half
from ...progress import report
from ...settings import implementation
from .layers import over_layers
from .online_softmax import (
    entropy_of_state,
    score_blocks,
    score_dtype,
    softmax_state,
)
from .score_gradients import (
    check_row_gradient,
    entropy_gradient,
    row_values_cuda,
    score_arguments_cuda,
    score_vjp,
    sum_groups,
    token_gradients_cuda,
)


@over_layers("query", "key")
@operation(
    differentiable=("query", "key"),
    constants=("mask?",),
    options=("bool causal", "float? scale"),
    dtype="computed",  # float64 for float64, else float32
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
    query, key : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        Queries and keys of the same shape and dtype, or two tuples of layers. Keys may
        have fewer heads, a number H_k that divides H: head h of the queries attends to
        head h // (H / H_k) of the keys.
    causal : bool, default False
        If True, token i attends only to tokens 0..i.
    scale : float, optional
        The factor c > 0 of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens do not attend and no token attends to them;
        their entropy is 0, and their values are not read.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats of each query; float32, or float64 for float64 input. A tuple
        for tuples.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` is neither boolean nor integer, or the
        dtypes differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The sums :math:`r = \sum e^{s-m}` and :math:`t = \sum e^{s-m}(s-m)` run over all
    scores of a row except one that equals the largest score m. The term of this score
    is e⁰ = 1, the 1 in :math:`H = \log(1+r) - t/(1+r)`. It is not added to r, and
    log(1 + r) is computed by ``log1p``, so a tiny r keeps its precision: an entropy of
    1e-12 is as exact as an entropy of 1.

    Examples
    --------
    >>> import numpy as np
    >>> query_key_entropy(np.zeros((4, 2)), np.zeros((4, 2)), causal=True).round(4)
    array([0.    , 0.6931, 1.0986, 1.3863])
    """
    convert_back, query, key, mask = convert_inputs(
        {"query": query, "key": key, "mask": mask}
    )
    args = query, key
    return convert_back(
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
    scale, mask = check_query_key(query, key, causal, scale, mask)
    key = repeat_heads(key, query)
    if is_cuda(query):
        return _query_key_entropy_cuda(query, key, causal, scale, mask)
    # The kernels find the sequence of a head themselves. The reference needs one mask
    # (N,) for each head, (..., N).
    head_mask = expand_mask(mask, query.shape[:-1])
    return _query_key_entropy_reference(query, key, causal, scale, head_mask)


def check_query_key(
    query: NDArray[Any],
    key: NDArray[Any],
    causal: Any,
    scale: float | None,
    mask: NDArray[Any] | None,
) -> tuple[float, NDArray[np.bool_] | None]:
    """Raise if an argument is not valid.

    Return the factor c of the scores, and the mask (B, N).
    """
    check_heads("query", query, "Nd")
    check_heads("key", key, "Nd")
    check_key(query.shape, key.shape)
    mask = check_mask(mask, saliency_shape(query.shape[:-1]))
    for name, x in (("query", query), ("key", key)):
        head_mask = expand_mask(mask, x.shape[:-1])  # (..., N)
        read = None if head_mask is None else head_mask[..., None]
        check_finite_values(name, x, read)
    if key.dtype != query.dtype:
        raise TypeError(f"`key` must be {query.dtype} like `query`, got {key.dtype}")
    check_causal(causal)
    if scale is None:  # 1/√d
        scale = query.shape[-1] ** -0.5
    return check_scale(scale), mask


def check_scale(scale: Any) -> float:
    """Return the factor of the scores as a positive number, or raise."""
    return check_number("scale", scale, 0, np.inf, "()")


def check_causal(causal: Any) -> None:
    """Raise unless the option is a bool."""
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"`causal` must be True or False, got {causal!r}")


def _query_key_entropy_reference(
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    entropy = np.zeros(query.shape[:-1], np.result_type(query.dtype, np.float32))
    count = math.prod(entropy.shape[:-1])
    sequences = iter_sequences(entropy.shape[:-1], mask)
    for number, (index, valid) in enumerate(sequences):
        # Remove the padding: below, N is the number of tokens that are left.
        unpadded = slice(None) if valid is None else valid
        q, k = query[index][unpadded], key[index][unpadded]
        # Inputs below float64 are computed in float32, or in float64 for huge scores.
        dtype = score_dtype(q, k, scale)
        q, k = q.astype(dtype), k.astype(dtype)
        # Scaling the N · d entries of Q costs less than scaling the N × N scores.
        q *= dtype.type(scale)
        head_entropy = np.empty(len(q), dtype)  # (N,)
        for rows, scores in score_blocks(q, k, causal):
            head_entropy[rows] = entropy_of_state(softmax_state(scores, axis=1))
            report((number + rows.stop / len(q)) / count)
        entropy[index][unpadded] = head_entropy
    return entropy


def _query_key_entropy_cuda(
    query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> Any:
    *leading, num_tokens, head_dim = query.shape
    out = empty((*leading, num_tokens), accumulation_dtype(query.dtype))  # (..., N)
    arrays = map(contiguous, (query, key, mask))
    # outer = L · B · H heads. The kernel computes from B and H which row of the mask
    # (B, N) belongs to a head.
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    sizes = outer, batch, heads, num_tokens, head_dim
    args = (*arrays, *sizes, int(causal), scale, out)
    # A block computes all tiles of its rows of scores one after another, so the states
    # of its rows stay in registers.
    tiling, shape = None, None
    if implementation() == "optimized":
        row_bytes = head_dim * query.dtype.itemsize
        tiling, shape = kept_or_half(outer, num_tokens, row_bytes, query.dtype)
    kernel = "query_key_entropy", "query_key_entropy"
    # The basic kernel has one thread for each row of scores.
    launch(*kernel, query.dtype, args, outputs=out.size, tiles=tiling, shape=shape)
    return out


@over_layers("gradient", "query", "key")
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
    r"""Return the vector–Jacobian product of `query_key_entropy`, in O(N) memory.

    .. math:: \frac{\partial \mathcal{L}}{\partial s_{ij}} =
        -g_i \, p_{ij} \, (\log p_{ij} + H_i), \qquad
        s_{ij} = q_i \cdot k_j \, c, \quad p = \operatorname{softmax}_j(s)

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies; any float dtype.
    query, key : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        The arguments of `query_key_entropy`; if they are tuples, `gradient` is a tuple
        too.
    causal : bool, default False
        The argument of `query_key_entropy`.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `query_key_entropy`. The gradient of padded tokens is not read.

    Returns
    -------
    query, key : ndarray of the shape and dtype of the argument
        Gradients of the loss with respect to the queries and to the keys; 0 for padded
        tokens. Two tuples for tuples. If a head of the keys serves several heads of the
        queries, its gradient is the sum over these heads.

    Raises
    ------
    TypeError
        If an array is not floating, `mask` is neither boolean nor integer, or the
        dtypes of `query` and `key` differ.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    With m, r and t as in the notes of `query_key_entropy`,
    :math:`\log p_{ij} + H_i = (s_{ij} - m) - t/(1+r)`. No digits are lost where one
    score dominates. The scores are recomputed for some rows at a time, so memory is
    linear in N.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[0.0], [2.0]]), np.array([[1.0], [0.0]])
    >>> query_gradient, key_gradient = query_key_entropy_vjp(np.ones(2), query, key)
    >>> query_gradient.round(4), key_gradient.round(4)
    (array([[ 0.  ],
           [-0.21]]), array([[-0.42],
           [ 0.42]]))
    """
    convert_back, query, key, mask, gradient = convert_inputs(
        {"query": query, "key": key, "mask": mask}, gradients={"gradient": gradient}
    )
    scale, mask = check_query_key(query, key, causal, scale, mask)
    head_mask = expand_mask(mask, query.shape[:-1])  # (..., N)
    check_row_gradient(gradient, query.shape[:-1], head_mask)
    args = gradient, query, repeat_heads(key, query), causal, scale
    if is_cuda(query):
        by_query, by_key = _query_key_entropy_vjp_cuda(*args, mask)
    else:
        by_query, by_key = _query_key_entropy_vjp_reference(*args, head_mask)
    return convert_back(by_query), convert_back(sum_groups(by_key, key))


def _query_key_entropy_vjp_reference(
    gradient: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ∂ℒ/∂Q, and ∂ℒ/∂K in float64."""
    # Each (..., N, d). The loop does not write padding, which remains 0. The gradient
    # of the keys is rounded to their dtype after the sum over a group of heads.
    query_gradient = np.zeros_like(query, order="C")
    key_gradient = np.zeros(key.shape)
    for index, valid in iter_sequences(query.shape[:-2], mask):
        unpadded = slice(None) if valid is None else valid  # without the padding
        g, q, k = (x[index][unpadded] for x in (gradient, query, key))
        dtype = score_dtype(q, k, scale)
        g, q, k = (x.astype(dtype) for x in (g, q, k))
        score_gradient = entropy_gradient(g)
        head_gradients = score_vjp(score_gradient, q, k, causal, dtype.type(scale))
        # Sums in `dtype` are rounded to the dtype of the inputs once, at the end.
        query_gradient[index][unpadded] = narrow(head_gradients[0], query.dtype)
        key_gradient[index][unpadded] = head_gradients[1]
    return query_gradient, key_gradient


def _query_key_entropy_vjp_cuda(
    gradient: Any, query: Any, key: Any, causal: bool, scale: float, mask: Any
) -> tuple[Any, Any]:
    """Return the gradients with respect to the queries and the keys."""
    query, key = contiguous(query), contiguous(key)
    row_values = row_values_cuda(gradient, query, key, causal, scale, mask)
    extra = score_arguments_cuda(row_values, None, query, causal, scale, mask)
    # ∂ℒ/∂Q = c G K and ∂ℒ/∂K = c Gᵀ Q. QUERIES selects G, and KEYS selects Gᵀ.
    query_gradient = token_gradients_cuda(extra, query, key, QUERIES)  # (..., N, d)
    return query_gradient, token_gradients_cuda(extra, key, query, KEYS)
