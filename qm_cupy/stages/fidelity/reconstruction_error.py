"""Reconstruction error: the difference between the rebuilt and the original tokens.

For one sequence, X is the matrix of its tokens, x_j is token j, and x̃_k is merged
token k. The rebuilt token x̂_j is the merged token of the group of token j, and X̂ is
the matrix of all x̂_j. G_k is group k. The error is e = ‖X - X̂‖² / ‖X‖², and ē is the
gradient of a loss with respect to e.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_gradient,
    check_labelled_tokens,
    check_labels,
    check_layout,
    check_mask,
    check_shape,
    check_tokens,
)
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    IntArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.counts import check_num_groups
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import finite_gap, finite_or_infinite
from ...arrays.libraries import is_cuda
from ...arrays.shapes import iter_sequences
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_two_axes
from ...cuda.device import empty
from ...cuda.launch import contiguous, counts_on_device, launch
from ...settings import implementation
from ..clustering.nearest import nearest_anchors_cuda
from ..clustering.unit_tokens import unit_tokens
from ..merging.groups import members_cuda
from ..merging.unmerge_tokens import (
    unmerge_tokens_reference,
    unmerge_tokens_vjp_reference,
)


@operation(
    differentiable=("tokens", "merged"),
    constants=("labels?", "mask?"),
    count_parameter="num_groups?",
    dtype="computed",  # float64 for float64, else float32
    shapes=without_two_axes,
)
def reconstruction_error(
    tokens: Array,
    merged: Array,
    *,
    labels: IntArray | None = None,
    num_groups: Any = None,
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the relative squared error of tokens rebuilt from the merged tokens.

    .. math:: \lVert X - \hat X \rVert_F^2 / \lVert X \rVert_F^2

    X is the matrix of a sequence's tokens, and :math:`\hat X` is the matrix of the
    rebuilt tokens: each token is replaced by the merged token of its group.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        Group of each token, -1 for padding. Without labels, each token is rebuilt from
        its most similar merged token by cosine (ties: the lower index).
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence, if they differ. Groups from K on are padding and rebuild no
        token.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        0 is lossless, 1 is as bad as rebuilding zeros; float32, or float64 for float64
        input. For a sequence of zeros: 0 if it is rebuilt exactly, otherwise inf. On a
        GPU, an entry or a difference counts as 0 if its square rounds to 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, merged = np.array([[4.0], [0.0]]), np.array([[2.0]])
    >>> float(reconstruction_error(tokens, merged, labels=np.array([0, 0])))
    0.5
    """
    convert_back, *arrays, _ = convert_and_check(
        tokens, merged, labels, num_groups, mask
    )
    return convert_back(compute_reconstruction_error(*arrays))


def compute_reconstruction_error(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> Any:
    """Return the errors of arrays that are already converted and checked."""
    if is_cuda(tokens):
        return _reconstruction_error_cuda(tokens, merged, labels, counts, mask)
    return _reconstruction_error_reference(tokens, merged, labels, counts, mask)


def convert_and_check(
    tokens: Any,
    merged: Any,
    labels: Any,
    num_groups: Any,
    mask: Any,
    gradient: Any = None,
) -> tuple[Any, ...]:
    """Convert and check the arguments of the losses and gradients of this folder.

    Return ``convert_back``, which converts a result back to the caller's library, the
    checked arrays, and the gradient, which is not checked.
    """
    convert_back, tokens, merged, labels, mask, num_groups, gradient = convert_inputs(
        {"tokens": tokens, "merged": merged, "labels": labels, "mask": mask},
        counts={"num_groups": num_groups},
        gradients={"gradient": gradient},
    )
    check_layout("tokens", tokens, "ND", "BND")
    check_tokens(merged, "merged")
    batch, (max_groups, _) = tokens.shape[:-2], merged.shape[-2:]
    check_shape("merged", merged, "BKD", (*batch, max_groups, tokens.shape[-1]))
    if merged.dtype != tokens.dtype:
        raise TypeError(
            f"`merged` must be {tokens.dtype} like `tokens`, got {merged.dtype}"
        )
    mask = check_mask(mask, tokens.shape[:-1])
    counts = check_num_groups(
        max_groups if num_groups is None else num_groups, batch, max_groups
    )
    if labels is not None:
        check_labels(labels, tokens.shape[:-1], counts)
    check_labelled_tokens(tokens, labels, mask=mask)
    return convert_back, tokens, merged, labels, counts, mask, gradient


def _reconstruction_error_reference(
    tokens: NDArray[Any],
    merged: NDArray[Any],
    labels: NDArray[Any] | None,
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    if labels is None:
        labels = _most_similar_reference(tokens, merged, counts, mask)
    valid = labels >= 0 if mask is None else mask & (labels >= 0)  # (B, N), not padding
    squared_gap, squared_norm = np.empty(counts.shape), np.empty(counts.shape)
    # One sequence at a time, so that memory holds float64 copies of one sequence only.
    for index in np.ndindex(counts.shape):
        x = tokens[index][valid[index]].astype(np.float64)  # (valid tokens, D)
        rebuilt = unmerge_tokens_reference(merged[index], labels[index][valid[index]])
        x, gap = finite_gap(x, rebuilt)
        # X and the gap are divided by the largest entry of X, which does not change e.
        # A sequence of zeros is divided by the largest entry of its gap: otherwise the
        # square of a tiny gap could be 0, and the error would be 0 instead of inf.
        peak = np.abs(x).max(initial=0) or np.abs(gap).max(initial=0) or 1.0
        x, gap = x / peak, gap / peak  # first, so that no square overflows
        squared_gap[index], squared_norm[index] = np.vdot(gap, gap), np.vdot(x, x)
    # For a sequence of zeros the divisor is 0. If the sequence is not rebuilt exactly,
    # a positive number / 0 gives inf. If it is rebuilt exactly, 0 / 0 is replaced by 0.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(squared_gap > 0, squared_gap / squared_norm, 0)
    return narrow(error, np.result_type(tokens.dtype, np.float32))


def _most_similar_reference(
    tokens: NDArray[Any],
    merged: NDArray[Any],
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.intp]:
    """Return labels (B, N): the index of each token's most similar merged token.

    Padding gets -1.
    """
    dtype = np.result_type(tokens.dtype, np.float32)
    labels = np.full(tokens.shape[:-1], -1, np.intp)
    for index, valid in iter_sequences(counts.shape, mask):
        rows = slice(None) if valid is None else valid
        # Padded groups are zeros and have similarity 0. This is more than any negative
        # similarity, so padded groups must be excluded.
        unit = unit_tokens(merged[index][: counts[index]].astype(dtype))
        unit_rows = unit_tokens(tokens[index][rows].astype(dtype))
        labels[index][rows] = np.argmax(unit_rows @ unit.T, axis=-1)
    return labels


def _reconstruction_error_cuda(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> Any:
    arrays = _rebuilding_cuda(tokens, merged, labels, counts, mask)
    errors, squares = _token_errors_cuda(*arrays)  # (B, N) each
    batch, num_tokens = errors.shape
    # For each sequence, a block (in the basic kernel, a thread) adds the errors and the
    # squares, and divides the sums. It adds in a fixed order, without atomics, so every
    # run gives the same bits.
    out = empty(tokens.shape[:-2], errors.dtype)
    args = (errors, squares, batch, num_tokens, out)
    kernel = "reconstruction_error", "reconstruction_error"
    launch(*kernel, errors.dtype, args, blocks=batch)
    return out


def _rebuilding_cuda(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> tuple[Any, Any, Any]:
    """Return tokens, merged tokens and labels for the kernels; label -1 is padding."""
    if labels is None:
        labels = _most_similar_cuda(tokens, merged, counts)
    if mask is not None:
        labels = labels * mask + (mask - 1)  # the label, or -1 for padding
    arrays = contiguous(tokens), contiguous(merged)
    return *arrays, contiguous(labels, np.int32)


def _token_errors_cuda(tokens: Any, merged: Any, labels: Any) -> tuple[Any, Any]:
    """Return the squared error and the squared norm of each token, (B, N) each."""
    *leading, num_tokens, dim = tokens.shape
    batch, num_groups = math.prod(leading), merged.shape[-2]
    acc_dtype = accumulation_dtype(tokens.dtype)
    errors, squares = (empty((batch, num_tokens), acc_dtype) for _ in range(2))
    sizes = batch, num_tokens, dim, num_groups
    args = (tokens, merged, labels, *sizes, errors, squares)
    kernel = "reconstruction_error", "token_errors"
    launch(*kernel, tokens.dtype, args, rows=errors.size)
    return errors, squares


def _most_similar_cuda(tokens: Any, merged: Any, counts: NDArray[np.int64]) -> Any:
    """Return labels (B, N): the index of each token's most similar merged token."""
    # Merged tokens are the anchors. The kernel never stores the N × K similarities.
    anchor_counts, _ = counts_on_device(counts, merged.shape[-2])
    labels, _ = nearest_anchors_cuda(tokens, merged, anchor_counts)
    return labels


@on_callers_stream
def reconstruction_error_vjp(
    gradient: FloatArray,
    tokens: Array,
    merged: Array,
    *,
    labels: IntArray | None = None,
    num_groups: Any = None,
    mask: BoolArray | None = None,
) -> tuple[Array, Array]:
    r"""Return the gradients of the error for the tokens and for the merged tokens.

    A bar is the gradient of a loss with respect to the quantity below it.

    .. math:: \bar x_j = \frac{2 \bar e}{\lVert X \rVert^2} (x_j - \hat x_j - e\,x_j),
        \qquad \bar{\tilde x}_k = -\frac{2 \bar e}{\lVert X \rVert^2}
        \sum_{j \in G_k} (x_j - \tilde x_k)

    For one sequence, e is the error and X is the matrix of tokens. :math:`x_j` is token
    j, and :math:`\hat x_j` is the rebuilt token j. :math:`\tilde x_k` is merged token
    k, and :math:`G_k` is the group of merged token k.

    Parameters
    ----------
    gradient : ndarray of shape () or (B,), or float
        Gradient ē of a loss with respect to the errors e; any float dtype. For shape
        (), a Python number also works.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        Group of each token, -1 for padding. Without labels, each token is rebuilt from
        its most similar merged token. In both cases the labels are constants: they
        have no gradient.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence, if they differ. Groups from K on are padding and rebuild no
        token.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens do not count.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient of the loss with respect to the tokens, in their dtype. It is 0 for
        padding and for a sequence of zeros.
    merged : ndarray of shape (K, D) or (B, K, D)
        Gradient of the loss with respect to the merged tokens, in their dtype. It is 0
        for a sequence of zeros.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, merged = np.array([[4.0], [0.0]]), np.array([[1.0]])
    >>> labels = np.array([0, 0])
    >>> token_gradient, merged_gradient = reconstruction_error_vjp(
    ...     1.0, tokens, merged, labels=labels
    ... )
    >>> token_gradient.ravel(), merged_gradient.ravel()
    (array([ 0.0625, -0.125 ]), array([-0.25]))
    """
    convert_back, tokens, merged, labels, counts, mask, gradient = convert_and_check(
        tokens, merged, labels, num_groups, mask, gradient
    )
    gradient = check_gradient(gradient, tokens.shape[:-2], "B", tokens)  # (B,)
    # The last argument is a bound: an error that does not exceed the bound gets
    # gradient 0. Here the bound is -∞, so every error has a gradient.
    # `fidelity_loss_vjp` passes (1 - γ)², where γ is the fraction of the norm mass to
    # retain, because the fidelity loss of an error up to this bound is 0.
    args = gradient, tokens, merged, labels, counts, mask, -np.inf
    token_gradient, merged_gradient = compute_reconstruction_error_vjp(*args)
    return convert_back(token_gradient), convert_back(merged_gradient)


def compute_reconstruction_error_vjp(
    gradient: Any,
    tokens: Any,
    merged: Any,
    labels: Any,
    counts: NDArray[np.int64],
    mask: Any,
    bound: float,
) -> tuple[Any, Any]:
    """Return both gradients. An error that does not exceed the bound has gradient 0."""
    args = gradient, tokens, merged, labels, counts, mask, bound
    if is_cuda(tokens):
        return _reconstruction_error_vjp_cuda(*args)
    return reconstruction_error_vjp_reference(*args)


def reconstruction_error_vjp_reference(
    gradient: NDArray[Any],
    tokens: NDArray[Any],
    merged: NDArray[Any],
    labels: NDArray[Any] | None,
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
    bound: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    if labels is None:
        labels = _most_similar_reference(tokens, merged, counts, mask)
    if mask is not None:
        labels = np.where(mask, labels, -1)
    # Compare errors with the bound in the dtype of the loss, as `fidelity_loss` does.
    # Otherwise an error that rounds to the bound could have a gradient, but no loss.
    error_type = np.result_type(tokens.dtype, np.float32).type
    token_gradient, merged_gradient = np.zeros_like(tokens), np.zeros_like(merged)
    for index in np.ndindex(counts.shape):  # one sequence at a time, in float64
        group = labels[index]
        valid = (group >= 0)[:, None]  # (N, 1), not padding
        whole = np.where(valid, tokens[index], 0).astype(np.float64)  # (N, D)
        largest = np.abs(whole).max(initial=0)
        # x_j and x_j - x̂_j, or the halves of both
        x, gap = finite_gap(whole, unmerge_tokens_reference(merged[index], group))
        if largest == 0:  # a sequence of zeros: its error is 0 or inf, its gradient 0
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            peak = largest if x is whole else largest / 2
            x, gap = x / peak, gap / peak  # first, so that no square overflows
            squared_norm = np.vdot(x, x)  # ‖X‖² / peak²
            error = np.vdot(gap, gap) / squared_norm  # e; peak² cancels
            if not error_type(error) > error_type(bound):
                continue
            # 2 ē / ‖X‖² · (x_j - x̂_j - e x_j). ‖X‖² is squared_norm · peak², and one
            # `peak` cancels. The other one, of the whole tokens, is `largest`.
            scale = 2 * float(gradient[index]) / (squared_norm * largest)
            by_token = scale * (gap - error * x)
            # The sum of -(x_j - x̃_k) over each group. Rebuilding gathers rows, and the
            # gradient of a gather is this sum.
            args = -scale * gap, group, merged.shape[-2]
            by_group = unmerge_tokens_vjp_reference(*args)
            if not np.isfinite(scale * error):
                by_token, by_group = map(finite_or_infinite, (by_token, by_group))
            token_gradient[index], merged_gradient[index] = by_token, by_group
    return token_gradient, merged_gradient


def _reconstruction_error_vjp_cuda(
    gradient: Any,
    tokens: Any,
    merged: Any,
    labels: Any,
    counts: NDArray[np.int64],
    mask: Any,
    bound: float,
) -> tuple[Any, Any]:
    arrays = tokens, merged, labels = _rebuilding_cuda(
        tokens, merged, labels, counts, mask
    )
    errors, squares = _token_errors_cuda(*arrays)
    (batch, num_tokens), dtype = errors.shape, errors.dtype
    num_groups, dim = merged.shape[-2:]
    # (B,) each: e, and 2 ē / ‖X‖², or 0 if e does not exceed the bound.
    relative, scales = (empty((batch,), dtype) for _ in range(2))
    token_gradient, merged_gradient = (
        empty(x.shape, x.dtype) for x in (tokens, merged)
    )
    file = "reconstruction_error_vjp"
    error_gradients = contiguous(gradient, dtype)
    args: tuple[Any, ...]
    args = (
        errors,
        squares,
        error_gradients,
        batch,
        num_tokens,
        bound,
        relative,
        scales,
    )
    launch(file, "error_scales", dtype, args, blocks=batch)

    sizes = batch, num_tokens, dim, num_groups
    args = (*arrays, relative, scales, *sizes, token_gradient)
    launch(
        file, file, tokens.dtype, args, outputs=token_gradient.size, rows=errors.size
    )
    # The optimized kernel reads the members of each group from a sorted list. The basic
    # kernel looks for them in the labels.
    basic = implementation() == "basic"
    members = (labels,) if basic else members_cuda(labels, num_groups)
    args = (tokens, merged, *members, scales, *sizes, merged_gradient)
    launch(file, "merged_error_vjp", tokens.dtype, args, vector_output=merged_gradient)
    return token_gradient, merged_gradient
