"""Entropy of the softmax attention among the tokens of a sequence.

There are B sequences of N tokens (hidden states) of width D. They may have H heads, and
L layers. x_i is token i of a sequence, and X (N, D) is the matrix of all tokens. The
scores are s_ij = x_i · x_j / √D, the attention is p_ij = softmax_j(s_ij), and H_i
is the entropy of row i. (m, r, t) is the state of a row of scores: m is the largest
score, and r and t are two sums, which online_softmax.py defines. g_i is the gradient of
a loss ℒ with respect to H_i, and G_ij = ∂ℒ/∂s_ij.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_finite_values, check_mask
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.libraries import is_cuda
from ...arrays.shapes import check_heads, expand_mask, iter_sequences, saliency_shape
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.constants import KEYS, QUERIES, STATE_VALUES, TILE
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...cuda.tiles import HALF, Tiling, select_shape
from ...progress import report, span
from ...settings import implementation
from .layers import over_layers
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
    check_row_gradient,
    entropy_gradient,
    row_values_cuda,
    score_arguments_cuda,
    score_vjp,
    token_gradients_cuda,
)


@over_layers("tokens")
@operation(
    differentiable=("tokens",),
    constants=("mask?",),
    dtype="computed",  # float64 for float64, else float32
    shapes=without_last_axis,
)
def self_attention_entropy(tokens: Array, *, mask: BoolArray | None = None) -> Array:
    r"""Return the entropy of the softmax attention of each token to all tokens.

    .. math:: p = \operatorname{softmax}(X X^\top / \sqrt{D}), \quad
        H_i = -\sum_j p_{ij} \log p_{ij}

    Parameters
    ----------
    tokens : ndarray of shape (N, D), (B, N, D), (B, H, N, d) or (L, B, H, N, d)
        Hidden states, or parts of them for each head; float16, bfloat16, float32 or
        float64. Or a tuple of layers, such as the ``hidden_states`` of a model. A
        stack of them, (L, B, N, D), would be read as heads: pass a tuple.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens do not attend and no token attends to them;
        their entropy is 0, and their values are not read.

    Returns
    -------
    ndarray of shape (..., N)
        Entropy in nats; float32, or float64 for float64 input. A tuple for a tuple.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` is neither boolean nor integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    The scores are symmetric, so only the blocks of scores on and above the diagonal are
    computed (the basic kernel computes all scores). A block above the diagonal adds to
    the sums of its rows and, because :math:`s_{ij} = s_{ji}`, to the sums of the tokens
    of its columns. The N × N scores are not stored.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy(np.array([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]])).round(4)
    array([0.    , 1.0986, 0.    ])
    """
    convert_back, tokens, mask = convert_inputs({"tokens": tokens, "mask": mask})
    _, full_mask = _check_inputs(tokens, mask)
    return convert_back(compute_self_attention_entropy(tokens, mask=full_mask))


def _check_inputs(
    tokens: NDArray[Any], mask: NDArray[Any] | None
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Raise if an argument is not valid; return the masks (B, N) and (..., N)."""
    check_heads("tokens", tokens, "ND")
    mask = check_mask(mask, saliency_shape(tokens.shape[:-1]))
    full_mask = expand_mask(mask, tokens.shape[:-1])  # for each layer, sequence, head
    # Padding may be NaN.
    read = None if full_mask is None else full_mask[..., None]
    check_finite_values("tokens", tokens, read)
    return mask, full_mask


def compute_self_attention_entropy(tokens: Any, *, mask: Any = None) -> Any:
    """Return the entropy (..., N) of arrays that are converted and checked.

    `mask` has the shape (..., N) of the result.
    """
    if is_cuda(tokens):
        return _self_attention_entropy_cuda(tokens, mask)
    return _self_attention_entropy_reference(tokens, mask)


def _self_attention_entropy_reference(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    scale = tokens.shape[-1] ** -0.5
    entropy = np.zeros(tokens.shape[:-1], np.result_type(tokens.dtype, np.float32))
    count = math.prod(tokens.shape[:-2])
    sequences = iter_sequences(tokens.shape[:-2], mask)
    for number, (index, valid) in enumerate(sequences):
        unpadded = slice(None) if valid is None else valid  # without the padding
        x = tokens[index][unpadded]  # (tokens left, D)
        # Inputs below float64 are computed in float32, or in float64 for huge scores.
        x = x.astype(score_dtype(x, x, scale), copy=False)
        with span(number / count, (number + 1) / count):
            entropy[index][unpadded] = _symmetric_entropy(x)
    return entropy


def _symmetric_entropy(x: NDArray[Any]) -> NDArray[Any]:
    """Return the entropies (N,) of one sequence (N, D) from half of its scores."""
    num_tokens, dim = x.shape
    scaled = x * x.dtype.type(dim**-0.5)  # s_ij = scaled_i · x_j
    zeros = np.zeros(num_tokens, x.dtype)
    # The states (m, r, t) of all rows, each (N,), of the scores so far. Without scores,
    # m is a score far below every real one, so it has weight 0 in the sums. r and t are
    # two arrays, because they are updated in place.
    state = np.full(num_tokens, masked_score(x.dtype)), zeros, zeros.copy()

    def add(rows: slice, new: SoftmaxState) -> None:
        """Add new scores of some rows to their states, in place."""
        total = add_states(tuple(array[rows] for array in state), new)
        for array, values in zip(state, total, strict=True):
            array[rows] = values

    # Each block of rows computes only the columns from its own first token on. Earlier
    # blocks have added the scores of the earlier columns, because s_ij = s_ji.
    for start in range(0, num_tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, num_tokens)
        scores = scaled[start:stop] @ x[start:].T  # (block, N - start)
        if stop < num_tokens:
            # The scores in the columns after the block are also scores of later rows:
            # s_ij = s_ji. Pass a copy, because `softmax_state` overwrites its scores,
            # and the rows of the block need the scores afterwards.
            after_block = scores[:, stop - start :].copy()
            add(slice(stop, None), softmax_state(after_block, axis=0))
        add(slice(start, stop), softmax_state(scores, axis=1))
        report(1 - (1 - stop / num_tokens) ** 2)
    return entropy_of_state(state)


def _self_attention_entropy_cuda(tokens: Any, mask: Any) -> Any:
    *leading, num_tokens, dim = tokens.shape
    # Layers and heads are independent here, so they count as sequences: L · B · H.
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    out = empty((*leading, num_tokens), acc_dtype)
    tokens, mask = contiguous(tokens), contiguous(mask)
    sizes, file = (batch, num_tokens, dim), "self_attention_entropy"
    args: tuple[Any, ...]
    if implementation() == "basic":  # one thread for each row
        args = (tokens, mask, *sizes, out)
        # The kernel of the result has the name of its file.
        launch(file, file, tokens.dtype, args, outputs=out.size)
        return out
    # The first launch has a block for each tile of scores on or above the diagonal
    # (`upper`). The file also has a kernel for wide tiles, of 256 columns (`wide`).
    tiling = Tiling(batch, num_tokens, num_tokens, upper=True, wide=True)
    shape = select_shape(tiling, tokens.dtype)
    # The kernel divides the scores into squares of 128 × 128, and so the tokens into
    # sets of 128, which it also calls squares. For each token, `states` has a slot for
    # each set. A slot holds one state (m, r, t), over the scores of the token with the
    # tokens of the set. Half tiles have 64 rows, so a token that is a column gets two
    # states from one set, and needs two slots. Every block writes to its own slots, and
    # the second kernel merges them in a fixed order: there are no atomics, and every
    # run gives the same bits.
    halves = 2 if shape is HALF else 1
    slots = -(-num_tokens // TILE) * halves
    states = empty((batch, slots, num_tokens, STATE_VALUES), acc_dtype)
    args = (tokens, mask, *sizes, states)
    kernel = file, "self_attention_states"
    launch(*kernel, tokens.dtype, args, tiles=tiling, shape=shape)
    # The second launch merges the slots of each token, with one thread for each token.
    args = (states, mask, batch, num_tokens, halves, out)
    launch(file, file, tokens.dtype, args, outputs=out.size)
    return out


@over_layers("gradient", "tokens")
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
    tokens : ndarray of shape (N, D), (B, N, D), (B, H, N, d) or (L, B, H, N, d)
        The argument of `self_attention_entropy`; if it is a tuple, `gradient` is a
        tuple too.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `self_attention_entropy`. The gradient of padded tokens is not
        read.

    Returns
    -------
    ndarray of the shape and dtype of `tokens`
        Gradient of the loss with respect to the tokens; 0 for padded tokens. A tuple
        for a tuple.

    Raises
    ------
    TypeError
        If `gradient` or `tokens` is not floating, or `mask` is neither boolean nor
        integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    :math:`p_{ij} = \operatorname{softmax}_j(x_i \cdot x_j / \sqrt{D})` is the attention
    and G the gradient with respect to its scores. G is computed for some rows at a
    time, so memory is linear in N.

    Examples
    --------
    >>> import numpy as np
    >>> self_attention_entropy_vjp(np.ones(2), np.array([[1.0], [0.0]])).round(4)
    array([[-0.3932],
           [ 0.1966]])
    """
    convert_back, tokens, mask, gradient = convert_inputs(
        {"tokens": tokens, "mask": mask}, gradients={"gradient": gradient}
    )
    mask, full_mask = _check_inputs(tokens, mask)
    check_row_gradient(gradient, tokens.shape[:-1], full_mask)
    # These kernels read the mask (B, N) and find the sequence of a head themselves. The
    # reference needs one mask for each head.
    if is_cuda(tokens):
        return convert_back(_self_attention_entropy_vjp_cuda(gradient, tokens, mask))
    return convert_back(
        _self_attention_entropy_vjp_reference(gradient, tokens, full_mask)
    )


def _self_attention_entropy_vjp_reference(
    gradient: NDArray[Any], tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    scale = tokens.shape[-1] ** -0.5
    out = np.zeros_like(tokens, order="C")  # the loop does not write padding
    for index, valid in iter_sequences(tokens.shape[:-2], mask):
        unpadded = slice(None) if valid is None else valid  # without the padding
        g, x = (array[index][unpadded] for array in (gradient, tokens))
        dtype = score_dtype(x, x, scale)
        g, x = g.astype(dtype), x.astype(dtype)
        # A token is both a query and a key, so its gradient is the sum of the gradients
        # of both, each (N, D). There is no causal mask.
        score_gradient = entropy_gradient(g)
        as_query, as_key = score_vjp(score_gradient, x, x, False, dtype.type(scale))
        out[index][unpadded] = narrow(as_query + as_key, out.dtype)
    return out


def _self_attention_entropy_vjp_cuda(gradient: Any, tokens: Any, mask: Any) -> Any:
    """Return the gradient with respect to the tokens."""
    tokens = contiguous(tokens)
    scale = tokens.shape[-1] ** -0.5
    # Queries and keys are the same array, so s_ij = s_ji: column j of the scores has
    # the same m, r and t as row j. So the values of rows are the values of columns too.
    row_values = row_values_cuda(gradient, tokens, tokens, False, scale, mask)
    extra = score_arguments_cuda(row_values, None, tokens, False, scale, mask)
    # c (G + Gᵀ) X in one pass, with c = 1/√D; QUERIES | KEYS selects G + Gᵀ.
    return token_gradients_cuda(extra, tokens, tokens, QUERIES | KEYS)
