"""Vector–Jacobian products of fidelity: from the gradient of a result to its inputs.

Labels, given or found, are constants.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, on_callers_stream
from ._checks import check_gradient, check_number
from .fidelity import (
    _enter_fidelity,
    _most_similar,
    _rebuilding_cuda,
    _token_errors_cuda,
)
from .merging import _members_cuda, _unmerge_tokens_reference
from .merging_vjp import _unmerge_tokens_vjp_reference


@on_callers_stream
def reconstruction_error_vjp(
    gradient: Array,
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    num_groups: Any = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    r"""Gradients of `reconstruction_error` with respect to tokens and merged tokens.

    .. math:: \bar x_j = \frac{2 \bar e}{\lVert X \rVert^2} (x_j - \hat x_j - e\,x_j),
        \qquad \bar x_k = -\frac{2 \bar e}{\lVert X \rVert^2}
        \sum_{j \in G_k} (x_j - \tilde x_k)

    Parameters
    ----------
    gradient : ndarray of shape () or (B,), or float
        Gradient ē of a loss with respect to the errors e; any float dtype, and a number
        where it is one.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        Group of each token, -1 for padding: constants. Without them each token is
        rebuilt by the merged token most similar to it, a choice that is a constant too.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence where they differ, so that padding rebuilds no token.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not count.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient of the loss with respect to the tokens, in their dtype; 0 for padding,
        and for tokens that are all zero.
    merged : ndarray of shape (K, D) or (B, K, D)
        That with respect to the merged tokens, likewise.

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
    >>> by_tokens, by_merged = reconstruction_error_vjp(
    ...     1.0, tokens, merged, labels=labels
    ... )
    >>> by_tokens.ravel(), by_merged.ravel()
    (array([ 0.0625, -0.125 ]), array([-0.25]))
    """
    leave, tokens, merged, labels, counts, mask, gradient = _enter_fidelity(
        tokens, merged, labels, num_groups, mask, gradient
    )
    gradient = check_gradient(gradient, tokens.shape[:-2], "B", tokens)
    args = gradient, tokens, merged, labels, counts, mask, -np.inf
    by_tokens, by_merged = _reconstruction_error_vjp(*args)
    return leave(by_tokens), leave(by_merged)


def _reconstruction_error_vjp(
    gradient: Any,
    tokens: Any,
    merged: Any,
    labels: Any,
    counts: NDArray[np.int64],
    mask: Any,
    bound: float,
) -> tuple[Any, Any]:
    """Return both gradients; an error up to the bound has none."""
    args = gradient, tokens, merged, labels, counts, mask, bound
    if _cuda.is_cuda(tokens):
        return _reconstruction_error_vjp_cuda(*args)
    return _reconstruction_error_vjp_reference(*args)


def _reconstruction_error_vjp_reference(
    gradient: NDArray[Any],
    tokens: NDArray[Any],
    merged: NDArray[Any],
    labels: NDArray[Any] | None,
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
    bound: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    if labels is None:
        labels = _most_similar(tokens, merged, counts)
    if mask is not None:
        labels = np.where(mask, labels, -1)
    kind = np.result_type(tokens.dtype, np.float32).type  # of the error as it is told
    by_tokens, by_merged = np.zeros_like(tokens), np.zeros_like(merged)
    for index in np.ndindex(counts.shape):  # a sequence at a time, in float64
        group = labels[index]
        token = (group >= 0)[:, None]
        x = np.where(token, tokens[index], 0).astype(np.float64)
        gap = x - _unmerge_tokens_reference(merged[index], group)
        peak = np.abs(x).max(initial=0)
        if peak == 0:
            continue
        x, gap = x / peak, gap / peak  # first, so that no square overflows
        whole = np.vdot(x, x)
        error = np.vdot(gap, gap) / whole
        if not kind(error) > kind(bound):
            continue
        scale = 2 * float(gradient[index]) / (whole * peak)
        by_tokens[index] = scale * (gap - error * x)
        by_merged[index] = _unmerge_tokens_vjp_reference(
            -scale * gap, group, merged.shape[-2]
        )
    return by_tokens, by_merged


def _reconstruction_error_vjp_cuda(
    gradient: Any,
    tokens: Any,
    merged: Any,
    labels: Any,
    counts: NDArray[np.int64],
    mask: Any,
    bound: float,
) -> tuple[Any, Any]:
    given = tokens, merged, labels = _rebuilding_cuda(
        tokens, merged, labels, counts, mask
    )
    errors, squares = _token_errors_cuda(*given)
    (batch, num_tokens), kind = errors.shape, errors.dtype
    num_groups, dim = merged.shape[-2:]
    relative, scales = (_cuda.empty((batch,), kind) for _ in range(2))
    by_tokens, by_merged = (_cuda.empty(x.shape, x.dtype) for x in (tokens, merged))
    basic = _cuda.implementation() == "basic"
    file = f"{_cuda.implementation()}/reconstruction_error_vjp"
    slopes = _cuda.contiguous(gradient, kind)
    args: tuple[Any, ...]
    args = (errors, squares, slopes, batch, num_tokens, bound, relative, scales)
    threads = batch * (1 if basic else _cuda.BLOCK)
    _cuda.launch(file, "error_scales", kind, threads, args)

    sizes = batch, num_tokens, dim, num_groups
    args = (*given, relative, scales, *sizes, by_tokens)
    threads = by_tokens.size if basic else errors.size * _cuda.WARP
    _cuda.launch(file, "reconstruction_error_vjp", tokens.dtype, threads, args)
    members = (labels,) if basic else _members_cuda(labels, num_groups)
    args = (tokens, merged, *members, scales, *sizes, by_merged)
    threads = by_merged.size if basic else _cuda.vectors(by_merged)
    _cuda.launch(file, "merged_error_vjp", tokens.dtype, threads, args)
    return by_tokens, by_merged


@on_callers_stream
def fidelity_loss_vjp(
    gradient: Array,
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    r"""Gradients of `fidelity_loss` with respect to tokens and merged tokens.

    They are those of `reconstruction_error`, over B, where the error exceeds the bound
    :math:`(1 - \gamma)^2`; elsewhere, and at the bound, they are 0.

    Parameters
    ----------
    gradient : ndarray of shape (), or float
        Gradient of another loss with respect to this one; any float dtype.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        As in `reconstruction_error_vjp`.
    gamma : float, default 0.8
        Norm mass γ to retain, within [0, 1].
    num_groups : int or ndarray of int of shape (B,), optional
        As in `reconstruction_error_vjp`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient with respect to the tokens, in their dtype; 0 for padding, and for
        tokens that are all zero.
    merged : ndarray of shape (K, D) or (B, K, D)
        That with respect to the merged tokens, likewise.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a label is outside -1..K-1 or
        γ outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> tokens, merged = np.array([[4.0], [0.0]]), np.array([[1.0]])
    >>> labels = np.array([0, 0])
    >>> by_tokens, _ = fidelity_loss_vjp(1.0, tokens, merged, labels=labels)
    >>> by_tokens.ravel()
    array([ 0.0625, -0.125 ])
    """
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    leave, tokens, merged, labels, counts, mask, gradient = _enter_fidelity(
        tokens, merged, labels, num_groups, mask, gradient
    )
    gradient = check_gradient(gradient, (), "", tokens).astype(np.float64)
    each = np.broadcast_to(gradient / max(counts.size, 1), counts.shape)
    args = each, tokens, merged, labels, counts, mask, (1 - gamma) ** 2
    by_tokens, by_merged = _reconstruction_error_vjp(*args)
    return leave(by_tokens), leave(by_merged)
