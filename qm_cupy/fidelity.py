"""Fidelity: what merging loses."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_labels,
    check_mask,
    check_num_groups,
    check_number,
    check_shape,
    check_tokens,
)
from ._matching import _unit_tokens
from ._matching_cuda import nearest_anchors_cuda
from .budget import _held_mass
from .merging import _unmerge_tokens_reference
from .saliency import _token_norms_cuda
from .selection import _num_valid, _top_tokens_cuda


@on_callers_stream
def norm_mass(tokens: Array, num_groups: Any, *, mask: Array | None = None) -> Array:
    r"""Share γ of the norm mass that the K largest token norms hold.

    .. math:: \gamma(X, K) = \sum_{i \in \operatorname{top}K} \lVert x_i \rVert \Big/
        \sum_i \lVert x_i \rVert

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        γ within (0, 1], 1 for tokens that are all zero; float32, or float64 for
        float64 input.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite or K exceeds the tokens.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm_mass(np.array([[4.0], [1.0], [3.0]]), 2))
    0.875
    """
    leave, tokens, num_groups, mask = enter(
        tokens=tokens, num_groups=num_groups, mask=mask
    )
    check_tokens(tokens)
    check_mask(mask, tokens.shape[:-1])
    limit = _num_valid(tokens.shape[:-1], mask)
    counts = check_num_groups(num_groups, tokens.shape[:-2], limit)
    if _cuda.is_cuda(tokens):
        return leave(_norm_mass_cuda(tokens, counts, mask))
    return leave(_norm_mass_reference(tokens, counts, mask))


def _norm_mass_reference(
    tokens: NDArray[Any], counts: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    held = _held_mass(tokens, mask)
    total = held[..., -1]
    largest = np.take_along_axis(held, counts[..., None] - 1, axis=-1)[..., 0]
    share = np.where(total > 0, largest / np.where(total > 0, total, 1), 1)
    return share.astype(np.result_type(tokens.dtype, np.float32))


def _norm_mass_cuda(tokens: Any, counts: NDArray[np.int64], mask: Any) -> Any:
    norms = _token_norms_cuda(tokens, mask)
    selected = _top_tokens_cuda(norms, counts)
    batch, num_tokens = math.prod(norms.shape[:-1]), norms.shape[-1]
    out = _cuda.empty(norms.shape[:-1], norms.dtype)
    chosen = _cuda.implementation()
    threads = batch * (1 if chosen == "basic" else _cuda.BLOCK)
    args = (norms, selected, batch, num_tokens, out)
    _cuda.launch(f"{chosen}/norm_mass", "norm_mass", norms.dtype, threads, args)
    return out


@on_callers_stream
def reconstruction_error(
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    num_groups: Any = None,
    mask: Array | None = None,
) -> Array:
    r"""Relative squared error of the tokens rebuilt from the merged ones.

    .. math:: \lVert X - \hat X \rVert_F^2 / \lVert X \rVert_F^2

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        Group of each token, -1 for padding. Without them each token is rebuilt by the
        merged token most similar to it by cosine (ties: the lower index).
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence where they differ, so that padding rebuilds no token.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        0 is lossless, 1 no better than zeros; float32, or float64 for float64 input.
        For tokens that are all zero: 0 if they are rebuilt exactly, else inf.

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
    leave, *arrays, _ = _enter_fidelity(tokens, merged, labels, num_groups, mask)
    return leave(_reconstruction_error(*arrays))


def _reconstruction_error(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> Any:
    if _cuda.is_cuda(tokens):
        return _reconstruction_error_cuda(tokens, merged, labels, counts, mask)
    return _reconstruction_error_reference(tokens, merged, labels, counts, mask)


def _enter_fidelity(
    tokens: Any,
    merged: Any,
    labels: Any,
    num_groups: Any,
    mask: Any,
    gradient: Any = None,
) -> tuple[Any, ...]:
    """Return ``leave``, all arrays checked but the gradient, and that."""
    leave, tokens, merged, labels, num_groups, mask, gradient = enter(
        tokens=tokens,
        merged=merged,
        labels=labels,
        num_groups=num_groups,
        mask=mask,
        gradient=gradient,
    )
    check_tokens(tokens)
    check_tokens(merged, "merged")
    batch, (most, _) = tokens.shape[:-2], merged.shape[-2:]
    check_shape("merged", merged, "BKD", (*batch, most, tokens.shape[-1]))
    if merged.dtype != tokens.dtype:
        raise TypeError(
            f"`merged` must be {tokens.dtype} like `tokens`, got {merged.dtype}"
        )
    check_mask(mask, tokens.shape[:-1])
    counts = check_num_groups(most if num_groups is None else num_groups, batch, most)
    if labels is not None:
        check_labels(labels, tokens.shape[:-1], counts)
    return leave, tokens, merged, labels, counts, mask, gradient


def _reconstruction_error_reference(
    tokens: NDArray[Any],
    merged: NDArray[Any],
    labels: NDArray[Any] | None,
    counts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    if labels is None:
        labels = _most_similar(tokens, merged, counts)
    token = labels >= 0 if mask is None else mask & (labels >= 0)
    lost, whole = np.empty(counts.shape), np.empty(counts.shape)
    for index in np.ndindex(counts.shape):  # a sequence at a time, in float64
        x = tokens[index][token[index]].astype(np.float64)
        rebuilt = _unmerge_tokens_reference(merged[index], labels[index][token[index]])
        gap = x - rebuilt
        peak = np.abs(x).max(initial=0) or np.abs(gap).max(initial=0) or 1.0
        x, gap = x / peak, gap / peak  # first, so that no square overflows
        lost[index], whole[index] = np.vdot(gap, gap), np.vdot(x, x)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(lost > 0, lost / whole, 0)
    return error.astype(np.result_type(tokens.dtype, np.float32))


def _most_similar(
    tokens: NDArray[Any], merged: NDArray[Any], counts: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Return each token's most similar merged token, as labels (B, N)."""
    dtype = np.result_type(tokens.dtype, np.float32)
    labels = np.empty(tokens.shape[:-1], np.intp)
    for index in np.ndindex(counts.shape):
        unit = _unit_tokens(merged[index][: counts[index]].astype(dtype))
        labels[index] = np.argmax(
            _unit_tokens(tokens[index].astype(dtype)) @ unit.T, -1
        )
    return labels


def _reconstruction_error_cuda(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> Any:
    given = _rebuilding_cuda(tokens, merged, labels, counts, mask)
    errors, squares = _token_errors_cuda(*given)
    batch, num_tokens = errors.shape
    out = _cuda.empty(tokens.shape[:-2], errors.dtype)
    chosen = _cuda.implementation()
    threads = batch * (1 if chosen == "basic" else _cuda.BLOCK)
    args = (errors, squares, batch, num_tokens, out)
    kernel = f"{chosen}/reconstruction_error", "reconstruction_error"
    _cuda.launch(*kernel, errors.dtype, threads, args)
    return out


def _rebuilding_cuda(
    tokens: Any, merged: Any, labels: Any, counts: NDArray[np.int64], mask: Any
) -> tuple[Any, Any, Any]:
    """Return tokens, merged tokens and labels, -1 for padding, as kernels take them."""
    if labels is None:
        labels = _most_similar_cuda(tokens, merged, counts)
    if mask is not None:
        labels = labels * mask + (mask - 1)
    arrays = _cuda.contiguous(tokens), _cuda.contiguous(merged)
    return *arrays, _cuda.contiguous(labels, np.int32)


def _token_errors_cuda(tokens: Any, merged: Any, labels: Any) -> tuple[Any, Any]:
    """Return squared error and squared norm of each token, (B, N)."""
    *leading, num_tokens, dim = tokens.shape
    batch, num_groups = math.prod(leading), merged.shape[-2]
    kind = _cuda.accumulation(tokens.dtype)
    errors, squares = (_cuda.empty((batch, num_tokens), kind) for _ in range(2))
    chosen = _cuda.implementation()
    threads = errors.size * (1 if chosen == "basic" else _cuda.WARP)
    sizes = batch, num_tokens, dim, num_groups
    args = (tokens, merged, labels, *sizes, errors, squares)
    kernel = f"{chosen}/reconstruction_error", "token_errors"
    _cuda.launch(*kernel, tokens.dtype, threads, args)
    return errors, squares


def _most_similar_cuda(tokens: Any, merged: Any, counts: NDArray[np.int64]) -> Any:
    """Return each token's most similar merged token, as labels (B, N)."""
    each, _ = _cuda.counts(counts)
    labels, _ = nearest_anchors_cuda(tokens, merged, each)
    return labels


@on_callers_stream
def fidelity_loss(
    tokens: Array,
    merged: Array,
    *,
    labels: Array | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: Array | None = None,
) -> Array:
    r"""How far the reconstruction error exceeds the norm-mass bound, over the batch.

    .. math:: \operatorname{mean}_b \max\bigl(0,
        \lVert X - \hat X \rVert^2 / \lVert X \rVert^2 - (1 - \gamma)^2\bigr)

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        As in `reconstruction_error`.
    gamma : float, default 0.8
        Norm mass γ to retain, within [0, 1].
    num_groups : int or ndarray of int of shape (B,), optional
        As in `reconstruction_error`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.

    Returns
    -------
    ndarray of shape ()
        float32, or float64 for float64 input. 0 while the bound holds.

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
    >>> float(fidelity_loss(np.ones((4, 2)), np.ones((1, 2))))
    0.0
    """
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    leave, *arrays, _ = _enter_fidelity(tokens, merged, labels, num_groups, mask)
    error = _reconstruction_error(*arrays)
    excess = (error - error.dtype.type((1 - gamma) ** 2)).clip(0)
    return leave(excess.sum(dtype=error.dtype) / error.dtype.type(max(error.size, 1)))
