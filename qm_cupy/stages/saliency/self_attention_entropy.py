"""Attention entropy of hidden states to themselves."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_values
from ...arrays.conversion import Array, BoolArray, FloatArray, enter, on_callers_stream
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import expand_mask, iter_sequences
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.constants import KEYS, QUERIES, STATE_VALUES, TILE
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import HALF, Tiling, select_shape
from ...settings import implementation
from .online_softmax import (
    BLOCK_ROWS,
    SoftmaxState,
    add_states,
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
    inputs=("tokens",),
    constants=("mask?",),
    dtype="computed",
    shapes=without_last_axis,
)
def self_attention_entropy(tokens: Array, *, mask: BoolArray | None = None) -> Array:
    r"""Return the entropy of the softmax attention of each token to all tokens.

    .. math:: A = \operatorname{softmax}(X X^\top / \sqrt{D}), \quad
        H_i = -\sum_j A_{ij} \log A_{ij}

    Parameters
    ----------
    tokens : ndarray of shape (N, D), (B, N, D) or (L, B, N, D)
        Hidden states, of L layers if there are four axes; float16, bfloat16, float32 or
        float64.
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
        If `tokens` is not floating or `mask` is not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The scores are symmetric, so only blocks on and above the diagonal are computed.
    Each block adds to the sums of its rows and to the sums of its columns. No block is
    stored.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy(np.array([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]])).round(4)
    array([0.    , 1.0986, 0.    ])
    """
    leave, tokens, mask = enter({"tokens": tokens, "mask": mask})
    check_values("tokens", tokens, "ND", "BND", "LBND")
    keep = expand_mask(mask, tokens.shape[:-1])
    return leave(compute_self_attention_entropy(tokens, mask=keep))


def compute_self_attention_entropy(tokens: Any, *, mask: Any = None) -> Any:
    """Return the entropy of arrays that are converted and checked."""
    if is_cuda(tokens):
        return _self_attention_entropy_cuda(tokens, mask)
    return _self_attention_entropy_reference(tokens, mask)


def _self_attention_entropy_reference(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    dtype = score_dtype(tokens, tokens, tokens.shape[-1] ** -0.5)
    entropy = np.zeros(tokens.shape[:-1], np.result_type(tokens.dtype, np.float32))
    for index, keep in iter_sequences(entropy.shape[:-1], mask):
        token = slice(None) if keep is None else keep  # padding is removed
        x = tokens[index][token].astype(dtype, copy=False)  # (N, D)
        entropy[index][token] = _symmetric_entropy(x)
    return entropy


def _symmetric_entropy(x: NDArray[Any]) -> NDArray[Any]:
    """Return the entropies (N,) of one sequence from half of its scores."""
    num_tokens, dim = x.shape
    scaled = x * x.dtype.type(dim**-0.5)
    zeros = np.zeros(num_tokens, x.dtype)
    # The states (m, r, t) of all rows so far. The initial m has weight e^(m - m') = 0
    # in every sum, because any real score is far above it.
    state = np.full(num_tokens, masked_score(x.dtype)), zeros, zeros.copy()

    def add(part: slice, new: SoftmaxState) -> None:
        # The states are updated in place.
        total = add_states(tuple(sums[part] for sums in state), new)
        for sums, values in zip(state, total, strict=True):
            sums[part] = values

    # Blocks go down the diagonal; each computes only the columns from `start` on.
    for start in range(0, num_tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, num_tokens)
        scores = scaled[start:stop] @ x[start:].T  # (block, N - start)
        if stop < num_tokens:
            # s_ij = s_ji: columns right of the diagonal block are rows of the lower
            # half. `softmax_state` changes its scores, so the columns are a copy.
            across = scores[:, stop - start :].copy()
            add(slice(stop, None), softmax_state(across, axis=0))
        add(slice(start, stop), softmax_state(scores, axis=1))
    return entropy_of_state(state)


def _self_attention_entropy_cuda(tokens: Any, mask: Any) -> Any:
    *leading, num_tokens, dim = tokens.shape
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    out = empty((*leading, num_tokens), acc_dtype)
    tokens, mask = contiguous(tokens), contiguous(mask)
    sizes, page = (batch, num_tokens, dim), "self_attention_entropy"
    args: tuple[Any, ...]
    if implementation() == "basic":  # one thread for each row
        args = (tokens, mask, *sizes, out)
        launch(page, page, tokens.dtype, args, outputs=out.size)
        return out
    tiling = Tiling(batch, num_tokens, num_tokens, upper=True, wide=True)
    shape = select_shape(tiling, tokens.dtype)
    # Each row has a slot for each square of 128 columns, or two slots for half tiles.
    # Every block writes to its own slots, and the second kernel merges them in a fixed
    # order: there are no atomics, and every run gives the same bits.
    halves = 2 if shape is HALF else 1
    slots = -(-num_tokens // TILE) * halves
    states = empty((batch, slots, num_tokens, STATE_VALUES), acc_dtype)
    args = (tokens, mask, *sizes, states)
    kernel = page, "self_attention_states"
    launch(*kernel, tokens.dtype, args, tiles=tiling, shape=shape)
    # The second launch merges the slots of each row: one thread for each token.
    args = (states, mask, batch, num_tokens, halves, out)
    launch(page, page, tokens.dtype, args, outputs=out.size)
    return out


@on_callers_stream
def self_attention_entropy_vjp(
    gradient: FloatArray, tokens: Array, *, mask: BoolArray | None = None
) -> Array:
    r"""Return the vector–Jacobian product of `self_attention_entropy`.

    .. math:: \frac{\partial \mathcal{L}}{\partial X} =
        (G + G^\top) X / \sqrt{D}, \qquad
        G_{ij} = -g_i \, p_{ij} \, (\log p_{ij} + H_i)

    Parameters
    ----------
    gradient : ndarray of shape (..., N)
        Gradient g of a loss with respect to the entropies; any float dtype.
    tokens : ndarray of shape (N, D), (B, N, D) or (L, B, N, D)
        The argument of `self_attention_entropy`.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `self_attention_entropy`. The gradient of padded tokens is not
        read.

    Returns
    -------
    ndarray of the shape and dtype of `tokens`
        Gradient of the loss with respect to the tokens; 0 for padded tokens.

    Raises
    ------
    TypeError
        If `gradient` or `tokens` is not floating, or `mask` is not boolean.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    G is the gradient with respect to the scores, as in `query_key_entropy_vjp`. It is
    computed for some rows at a time and never stored as N × N, so memory is linear in
    N.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy_vjp(np.ones(2), np.array([[1.0], [0.0]])).round(4)
    array([[-0.3932],
           [ 0.1966]])
    """
    leave, tokens, mask, gradient = enter(
        {"tokens": tokens, "mask": mask}, gradients={"gradient": gradient}
    )
    check_values("tokens", tokens, "ND", "BND", "LBND")
    keep = expand_mask(mask, tokens.shape[:-1])
    check_entropy_gradient(gradient, tokens.shape[:-1], keep)
    if is_cuda(tokens):
        return leave(_self_attention_entropy_vjp_cuda(gradient, tokens, mask))
    return leave(_self_attention_entropy_vjp_reference(gradient, tokens, keep))


def _self_attention_entropy_vjp_reference(
    gradient: NDArray[Any], tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    scale = tokens.shape[-1] ** -0.5
    dtype = score_dtype(tokens, tokens, scale)
    out = np.zeros_like(tokens, order="C")  # padding keeps its gradient of 0
    for index, keep in iter_sequences(tokens.shape[:-2], mask):
        token = slice(None) if keep is None else keep  # padding is removed
        g, x = (array[index][token].astype(dtype) for array in (gradient, tokens))
        # A token is both a query and a key, so its gradient is the sum of the two.
        of_query, of_key = score_vjp(g, x, x, False, dtype.type(scale))
        out[index][token] = narrow(of_query + of_key, out.dtype)
    return out


def _self_attention_entropy_vjp_cuda(gradient: Any, tokens: Any, mask: Any) -> Any:
    """Return the gradient with respect to the tokens."""
    tokens = contiguous(tokens)
    scale = tokens.shape[-1] ** -0.5
    # Queries and keys are the same array, so one set of row values is enough.
    scores = scores_cuda(gradient, tokens, tokens, False, scale, mask)
    # One pass computes G + Gᵀ: with queries equal to keys, s_ij = s_ji.
    return token_gradients_cuda(scores, tokens, tokens, QUERIES | KEYS)
