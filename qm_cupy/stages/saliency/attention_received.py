"""The mean attention that each token receives, from attention or queries and keys.

A_ij is the attention of token i to token j, and the rows of A have the sum 1. There are
L layers, B sequences and H heads, and N tokens. Token j receives r_j = (1/n_j) Σ_i A_ij
from the n_j queries i that may attend to it: all tokens or, with a causal mask, the
tokens from j on. Padding is not counted. From queries and keys,
A_ij = exp(s_ij - m_i) / Z_i with the scores s_ij = c q_i · k_j, the largest score m_i
of row i, and Z_i = Σ_j exp(s_ij - m_i). g_j is the gradient of a loss ℒ with respect to
r_j, and h_j = g_j / n_j.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_mask
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import all_finite
from ...arrays.libraries import is_cuda
from ...arrays.shapes import (
    check_square,
    expand_mask,
    iter_sequences,
    layer_axes,
    repeat_heads,
    saliency_shape,
)
from ...autodiff.dispatch import operation
from ...autodiff.operations import Shape
from ...cuda.constants import VECTOR_BYTES, WARP
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...progress import report
from .attention_entropy import check_probabilities
from .layers import over_layers
from .online_softmax import BLOCK_ROWS
from .query_key_entropy import check_causal, check_query_key
from .received_of_scores import (
    num_queries,
    query_counts_cuda,
    received_of_scores,
    received_of_scores_cuda,
    received_of_scores_vjp,
    received_of_scores_vjp_cuda,
    received_weights_cuda,
)
from .score_gradients import check_row_gradient, masked_gradient, sum_groups


def _received_shape(attention: Any, query: Any, *others: Any) -> tuple[Shape, ...]:
    source = query if attention is None else attention
    return (tuple(source.shape[:-1]),)


@over_layers("attention", "query", "key")
@operation(
    differentiable=("attention?", "query?", "key?"),
    constants=("mask?",),
    options=("bool causal", "float? scale"),
    dtype="computed",  # float64 for float64, else float32
    shapes=_received_shape,
)
def attention_received(
    attention: Array | None = None,
    *,
    query: Array | None = None,
    key: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the mean attention that each token receives from the queries.

    .. math:: r_j = \frac{1}{n_j} \sum_i A_{ij}

    :math:`n_j` is the number of queries i that may attend to token j. Pass either
    `attention`, or `query` and `key` with
    :math:`A = \operatorname{softmax}_j(q_i \cdot k_j\,c)`.

    Parameters
    ----------
    attention : ndarray of shape (N, N), (B, N, N), (B, H, N, N) or (L, B, H, N, N)
        Attention probabilities A, non-negative; float16, bfloat16, float32 or float64.
        The sum of each row should be 1. Or a tuple of layers, such as the
        ``attentions`` of a model.
    query, key : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        Queries and keys, as in `query_key_entropy`. The N × N matrix A is not stored.
    causal : bool, default False
        If True, token i attends only to tokens 0..i, and only queries i ≥ j count in
        :math:`n_j`. Entries of `attention` above the diagonal are ignored.
    scale : float, optional
        The factor c > 0 of the scores of queries and keys, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens receive 0, their queries do not count, and
        their values are not read.

    Returns
    -------
    ndarray of shape (..., N)
        Mean attention, from 0 to 1; float32, or float64 for float64 input. A tuple for
        tuples.

    Raises
    ------
    TypeError
        If there is not exactly one source, an array is not floating, `mask` is neither
        boolean nor integer, or the dtypes of `query` and `key` differ.
    ValueError
        If a shape does not fit, an entry is not finite, or `attention` has negative
        entries.

    Notes
    -----
    Without `mask` and `causal`, the sum of r over the tokens is 1. The results of heads
    and layers are not averaged.

    The rows of `attention` are not divided by their sums. So attention that tokens pay
    to padding is lost, and the sum of r is less than 1. A model that was given the
    mask pays none: its rows have the sum 1 without the padding.

    Examples
    --------
    >>> import numpy as np
    >>> attention = np.array([[1.0, 0.0], [0.5, 0.5]])
    >>> attention_received(attention)
    array([0.75, 0.25])
    >>> attention_received(attention, causal=True)  # only token 1 attends to token 1
    array([0.75, 0.5 ])
    """
    _check_one_source(attention, query, key, scale)
    convert_back, attention, query, key, mask = convert_inputs(
        {"attention": attention, "query": query, "key": key, "mask": mask}
    )
    source = {"attention": attention, "query": query, "key": key}
    options = {"causal": causal, "scale": scale, "mask": mask}
    return convert_back(compute_attention_received(**source, **options))


def compute_attention_received(
    attention: Any = None,
    *,
    query: Any = None,
    key: Any = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
) -> Any:
    """Return the attention received of converted arrays, after checking them."""
    # The kernels find the sequence of a head themselves. The references need one mask
    # (N,) for each head, (..., N).
    if attention is not None:
        mask = _check_attention(attention, causal, mask)  # (B, N)
        if is_cuda(attention):
            return _attention_received_cuda(attention, causal, mask)
        head_mask = expand_mask(mask, attention.shape[:-1])
        return _attention_received_reference(attention, causal, head_mask)
    scale, mask = check_query_key(query, key, causal, scale, mask)
    key = repeat_heads(key, query)
    if is_cuda(query):
        return received_of_scores_cuda(query, key, causal, scale, mask)
    head_mask = expand_mask(mask, query.shape[:-1])
    return received_of_scores(query, key, causal, scale, head_mask)


def _check_one_source(attention: Any, query: Any, key: Any, scale: Any) -> None:
    """Raise unless the source is either attention, or queries and keys."""
    sources = {"attention": attention, "query": query, "key": key}
    passed = [name for name, x in sources.items() if x is not None]
    if passed not in (["attention"], ["query", "key"]):
        got = " and ".join(f"`{name}`" for name in passed) or "neither"
        raise TypeError(f"pass either `attention`, or `query` and `key`, got {got}")
    if attention is not None and scale is not None:
        raise TypeError(
            f"`scale` applies to `query` and `key` only, got scale={scale!r} with "
            "`attention`: leave it out"
        )


def _check_attention(
    attention: NDArray[Any], causal: Any, mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Raise if an argument is not valid; return the mask (B, N)."""
    check_square("attention", attention)
    check_causal(causal)
    mask = check_mask(mask, saliency_shape(attention.shape[:-1]))
    check_probabilities(attention, mask)
    return mask


def _attention_received_reference(
    attention: NDArray[Any], causal: bool, mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    received = np.zeros(attention.shape[:-1], dtype)  # (..., N)
    count = math.prod(received.shape[:-1])
    sequences = iter_sequences(received.shape[:-1], mask)
    for number, (index, valid) in enumerate(sequences):
        # Below, N is the number of tokens without padding.
        token = np.flatnonzero(np.ones(attention.shape[-1]) if valid is None else valid)
        unpadded = None if valid is None else token
        counts = num_queries(len(token), causal, dtype)  # n_j
        with np.errstate(over="ignore"):
            mean = _column_sums(attention[index], unpadded, causal, dtype) / counts
        if not all_finite(mean):
            # Sums of very large A overflow, but the mean does not: divide by n_j first.
            # Rounding can leave it above the largest A, whose half stays below it.
            scaled = _column_sums(attention[index], unpadded, causal, dtype, counts * 2)
            mean = 2 * np.minimum(scaled, np.finfo(dtype).max / 2)
        received[index][token] = mean
        report((number + 1) / count)
    return received


def _column_sums(
    attention: NDArray[Any],
    token: NDArray[np.intp] | None,
    causal: bool,
    dtype: np.dtype[Any],
    divisor: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return Σ_i A_ij of one matrix (N, N), or the sum of A_ij / divisor_j.

    `token` has the positions of the tokens that are not padding, or is None.
    """
    num_tokens = len(attention) if token is None else len(token)
    total = np.zeros(num_tokens, dtype)
    # Rows are processed in blocks, so that a block stays in cache.
    for start in range(0, num_tokens, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        a = attention[rows]  # (block, N)
        if token is not None:
            a = attention[token[rows, None], token]  # without the padding
        # In C order, so that the sums have the same bits with and without padding.
        a = a.astype(dtype, order="C")
        if divisor is not None:
            a /= divisor
        total += (np.tril(a, start) if causal else a).sum(axis=0)
    return total


def _attention_received_cuda(attention: Any, causal: bool, mask: Any) -> Any:
    *leading, num_tokens, _ = attention.shape
    out = empty((*leading, num_tokens), accumulation_dtype(attention.dtype))
    counts = query_counts_cuda(attention, causal, mask)
    # The kernel computes from B and H which row of the mask (B, N) belongs to a matrix.
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    arrays = contiguous(attention), contiguous(mask), counts
    args = (*arrays, outer, batch, heads, num_tokens, int(causal), out)
    # A block sums the columns that one warp reads at a time, 16 bytes for each thread.
    # The basic kernel has a thread for each column.
    columns = WARP * (VECTOR_BYTES // attention.dtype.itemsize)
    kernel, blocks = 2 * ("attention_received",), outer * -(-num_tokens // columns)
    launch(*kernel, attention.dtype, args, outputs=out.size, blocks=blocks)
    return out


@over_layers("gradient", "attention", "query", "key")
@on_callers_stream
def attention_received_vjp(
    gradient: FloatArray,
    attention: Array | None = None,
    *,
    query: Array | None = None,
    key: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: BoolArray | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    r"""Return the vector–Jacobian product of `attention_received`, in O(N) memory.

    .. math:: \frac{\partial \mathcal{L}}{\partial A_{ij}} = h_j = \frac{g_j}{n_j},
        \qquad \frac{\partial \mathcal{L}}{\partial s_{ij}} =
        A_{ij} \Bigl(h_j - \sum_k A_{ik} h_k\Bigr), \qquad s_{ij} = q_i \cdot k_j \, c

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the result; any float dtype.
    attention : ndarray of shape (N, N), (B, N, N), (B, H, N, N) or (L, B, H, N, N)
        The argument of `attention_received`, if it was passed. If it is a tuple,
        `gradient` is a tuple too.
    query, key : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        The arguments of `attention_received`, if they were passed.
    causal : bool, default False
        The argument of `attention_received`.
    scale : float, optional
        The factor c of the scores, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `attention_received`. The gradient of padded tokens is not read.

    Returns
    -------
    attention : ndarray of the shape and dtype of `attention`, or None
        Gradient of the loss with respect to the attention; 0 in padded rows and
        columns and, with `causal`, above the diagonal. None for queries and keys.
    query, key : ndarray of the shape and dtype of the argument, or None
        Gradients of the loss with respect to the queries and to the keys, as in
        `query_key_entropy_vjp`; 0 for padded tokens. None for attention.

    Raises
    ------
    TypeError
        If there is not exactly one source, an array is not floating, `mask` is neither
        boolean nor integer, or the dtypes of `query` and `key` differ.
    ValueError
        If a shape does not fit, an entry is not finite, or `attention` has negative
        entries.

    Notes
    -----
    For queries and keys, the scores are recomputed for some rows at a time, so memory
    besides the results is linear in N.

    Examples
    --------
    >>> import numpy as np
    >>> attention = np.array([[1.0, 0.0], [0.5, 0.5]])
    >>> by_attention, _, _ = attention_received_vjp(np.array([1.0, 3.0]), attention)
    >>> by_attention
    array([[0.5, 1.5],
           [0.5, 1.5]])
    """
    _check_one_source(attention, query, key, scale)
    convert_back, attention, query, key, mask, gradient = convert_inputs(
        {"attention": attention, "query": query, "key": key, "mask": mask},
        gradients={"gradient": gradient},
    )
    if attention is not None:
        mask = _check_attention(attention, causal, mask)  # (B, N)
        head_mask = expand_mask(mask, attention.shape[:-1])  # (..., N)
        check_row_gradient(gradient, attention.shape[:-1], head_mask)
        if is_cuda(attention):
            result = _attention_received_vjp_cuda(gradient, attention, causal, mask)
        else:
            result = _attention_received_vjp_reference(
                gradient, attention, causal, head_mask
            )
        return convert_back(result), None, None
    scale, mask = check_query_key(query, key, causal, scale, mask)
    head_mask = expand_mask(mask, query.shape[:-1])
    check_row_gradient(gradient, query.shape[:-1], head_mask)
    args = gradient, query, repeat_heads(key, query), causal, scale
    if is_cuda(query):
        by_query, by_key = received_of_scores_vjp_cuda(*args, mask)
    else:
        by_query, by_key = received_of_scores_vjp(*args, head_mask)
    return None, convert_back(by_query), convert_back(sum_groups(by_key, key))


def _attention_received_vjp_reference(
    gradient: NDArray[Any],
    attention: NDArray[Any],
    causal: bool,
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    dtype = np.result_type(attention.dtype, np.float32)
    gradient = masked_gradient(gradient, dtype, mask)  # g, (..., N)
    out = np.zeros(attention.shape, attention.dtype)  # (..., N, N)
    for index, valid in iter_sequences(gradient.shape[:-1], mask):
        token = np.flatnonzero(np.ones(attention.shape[-1]) if valid is None else valid)
        h = np.zeros(attention.shape[-1], dtype)  # 0 for padding
        h[token] = gradient[index][token] / num_queries(len(token), causal, dtype)
        # Every row of a token is h. Padded rows remain 0.
        out[index][token] = narrow(h, out.dtype)
        if causal:
            out[index] = np.tril(out[index])
    return out


def _attention_received_vjp_cuda(
    gradient: Any, attention: Any, causal: bool, mask: Any
) -> Any:
    *leading, num_tokens, _ = attention.shape
    out = empty(attention.shape, attention.dtype)
    h = received_weights_cuda(gradient, attention, causal, mask)
    outer, (_, batch, heads) = math.prod(leading), layer_axes(leading)
    sizes = outer, batch, heads, num_tokens
    args = (h, contiguous(mask), *sizes, int(causal), out)
    kernel = "attention_received_vjp", "attention_received_vjp"
    launch(*kernel, attention.dtype, args, vector_output=out)
    return out
