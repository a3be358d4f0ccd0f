"""Vector–Jacobian products of merging: from the gradient of a result to its inputs.

Labels are constants.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_gradient,
    check_labels,
    check_mass,
    check_num_groups,
    check_tokens,
    largest,
)
from .merging import (
    _flat_groups,
    _members_cuda,
    _shares_reference,
)
from .settings import check_finite

_BLOCK = 256  # tokens at a time: 2 MB of each array for D = 1024


@on_callers_stream
def merge_tokens_vjp(
    gradient: Array,
    tokens: Array,
    labels: Array,
    num_groups: Any,
    *,
    mass: Array | None = None,
) -> tuple[Array, Array | None]:
    r"""Gradients of `merge_tokens` with respect to the tokens and to their mass.

    .. math:: \bar x_j = \frac{m_j}{W_k} \bar x_k, \qquad
        \bar m_j = \frac{1}{W_k} \bar x_k \cdot (x_j - \tilde x_k), \qquad
        W_k = \sum_{i \in G_k} m_i

    Parameters
    ----------
    gradient : ndarray of shape (K, D) or (B, K, D)
        Gradient of a loss with respect to the merged tokens; any float dtype, taken in
        that of `tokens`. That of groups without members does not count.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, as `merge_tokens` takes them.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding: constants.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    mass : ndarray of shape (N,) or (B, N), optional
        Non-negative weights m; 1 by default.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient of the loss with respect to the tokens, in their dtype; 0 for padding.
    mass : ndarray of shape (N,) or (B, N), or None
        That with respect to the mass, in its dtype; None without one. A group of mass 0
        takes the plain mean: its mass has gradient 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative or a label
        outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, mass = np.array([[0.0], [4.0], [7.0]]), np.array([1.0, 3.0, 1.0])
    >>> labels, gradient = np.array([0, 0, 1]), np.array([[1.0], [2.0]])
    >>> by_tokens, by_mass = merge_tokens_vjp(gradient, tokens, labels, 2, mass=mass)
    >>> by_tokens.ravel()
    array([0.25, 0.75, 2.  ])
    >>> by_mass
    array([-0.75,  0.25,  0.  ])
    """
    leave, gradient, tokens, labels, num_groups, mass = enter(
        gradient=gradient,
        tokens=tokens,
        labels=labels,
        num_groups=num_groups,
        mass=mass,
    )
    check_tokens(tokens)
    batch = tokens.shape[:-2]
    counts = check_num_groups(num_groups, batch)
    most = largest(num_groups, counts)
    wanted = (*batch, most, tokens.shape[-1])
    kept = (np.arange(most) < counts[..., None])[..., None]  # (B, K, 1)
    gradient = check_gradient(gradient, wanted, "BKD", tokens, mask=kept)
    check_labels(labels, tokens.shape[:-1], counts)
    check_mass(mass, tokens.shape[:-1])
    find = _merge_tokens_vjp_reference
    if _cuda.is_cuda(tokens):
        find = _merge_tokens_vjp_cuda
    gradient = gradient.astype(tokens.dtype, copy=False)
    by_tokens, by_mass = find(gradient, tokens, labels, most, mass)
    return leave(by_tokens), None if by_mass is None else leave(by_mass)


def _merge_tokens_vjp_reference(
    gradient: NDArray[Any],
    tokens: NDArray[Any],
    labels: NDArray[Any],
    num_groups: int,
    mass: NDArray[Any] | None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    dim = tokens.shape[-1]
    flat, group, num_rows = _flat_groups(labels, num_groups)
    share = _shares_reference(labels, num_groups, mass).tocsc().data  # by token
    slopes, x = gradient.reshape(-1, dim), tokens.reshape(-1, dim)
    by_tokens, product = np.zeros(x.shape, x.dtype), np.empty(len(flat))
    for first in range(0, len(flat), _BLOCK):
        some = slice(first, first + _BLOCK)
        slope = slopes[group[some]].astype(np.float64)
        by_tokens[flat[some]] = share[some, None] * slope
        if mass is not None:
            near = x[flat[some]].astype(np.float64)
            product[some] = np.einsum("md,md->m", slope, near)
    by_tokens = by_tokens.reshape(tokens.shape)
    if mass is None:
        return by_tokens, None
    total = np.bincount(group, mass.ravel()[flat].astype(np.float64), num_rows)[group]
    gap = product - np.bincount(group, share * product, num_rows)[group]
    by_mass = np.zeros(labels.size)
    by_mass[flat] = np.where(total > 0, gap / np.where(total > 0, total, 1), 0)
    return by_tokens, by_mass.reshape(labels.shape).astype(mass.dtype)


def _merge_tokens_vjp_cuda(
    gradient: Any, tokens: Any, labels: Any, num_groups: int, mass: Any
) -> tuple[Any, Any]:
    *leading, num_tokens, dim = tokens.shape
    batch, kind = math.prod(leading), _cuda.accumulation(tokens.dtype)
    gradient, tokens = _cuda.contiguous(gradient), _cuda.contiguous(tokens)
    labels, weight = _cuda.contiguous(labels, np.int32), _cuda.contiguous(mass, kind)
    shares, out = (
        _cuda.empty(labels.shape, kind),
        _cuda.empty(tokens.shape, tokens.dtype),
    )
    slope = None if mass is None else _cuda.empty(labels.shape, kind)
    sizes = batch, num_tokens, dim, num_groups
    find = _merge_vjp_optimized
    if _cuda.implementation() == "basic":
        find = _merge_vjp_basic
    find(gradient, tokens, labels, weight, sizes, shares, slope, out)
    return out, None if slope is None else slope.astype(mass.dtype, copy=False)


def _merge_vjp_basic(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    shares: Any,
    slope: Any,
    out: Any,
) -> None:
    batch, num_tokens, _, num_groups = sizes
    file, few = "basic/merge_tokens_vjp", (batch, num_tokens, num_groups)
    args: tuple[Any, ...] = (mass, labels, *few, shares)
    _cuda.launch(file, "member_shares", tokens.dtype, shares.size, args)
    args = (gradient, labels, shares, *sizes, out)
    _cuda.launch(file, "merge_tokens_vjp", tokens.dtype, out.size, args)
    if slope is None:
        return
    products = _cuda.empty(slope.shape, slope.dtype)
    args = (gradient, tokens, labels, *sizes, products)
    _cuda.launch(file, "member_products", tokens.dtype, products.size, args)
    args = (mass, labels, shares, products, *few, slope)
    _cuda.launch(file, "merge_mass_vjp", tokens.dtype, slope.size, args)


def _merge_vjp_optimized(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    shares: Any,
    slope: Any,
    out: Any,
) -> None:
    batch, num_tokens, _, num_groups = sizes
    file, few = "optimized/merge_tokens_vjp", (batch, num_tokens, num_groups)
    groups, lists = batch * num_groups * _cuda.WARP, _members_cuda(labels, num_groups)
    args: tuple[Any, ...] = (mass, *lists, *few, shares)
    _cuda.launch(file, "member_shares", tokens.dtype, groups, args)
    args = (gradient, tokens, labels, shares, *sizes, slope, out)
    threads = shares.size * _cuda.WARP
    _cuda.launch(file, "merge_tokens_vjp", tokens.dtype, threads, args)
    if slope is None:
        return
    args = (mass, *lists, shares, *few, slope)
    _cuda.launch(file, "merge_mass_vjp", tokens.dtype, groups, args)


@on_callers_stream
def unmerge_tokens_vjp(gradient: Array, labels: Array, num_groups: Any) -> Array:
    r"""Gradient of `unmerge_tokens` with respect to the merged tokens: sums by labels.

    .. math:: \bar x_k = \sum_{j \in G_k} \bar x_j

    Parameters
    ----------
    gradient : ndarray of shape (N, D) or (B, N, D)
        Gradient of a loss with respect to the tokens rebuilt; float16, bfloat16,
        float32 or float64. That of padding does not count.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding: constants.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest.

    Returns
    -------
    ndarray of shape (K, D) or (B, K, D)
        Gradient of the loss with respect to the merged tokens in the dtype of
        `gradient`, summed in float32 at least and in index order. Groups without
        members have 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite or a label outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = np.array([[1.0], [2.0], [4.0]])
    >>> unmerge_tokens_vjp(gradient, np.array([0, 0, 1]), 2).ravel()
    array([3., 4.])
    """
    leave, gradient, labels, num_groups = enter(
        gradient=gradient, labels=labels, num_groups=num_groups
    )
    with check_finite(False):  # which of it is padding, the labels say
        check_tokens(gradient, "gradient")
    counts = check_num_groups(num_groups, gradient.shape[:-2])
    check_labels(labels, gradient.shape[:-1], counts)
    kept = None if _cuda.is_cuda(gradient) else (labels >= 0)[..., None]
    check_gradient(gradient, gradient.shape, "BND", mask=kept)
    most = largest(num_groups, counts)
    if _cuda.is_cuda(gradient):
        return leave(_unmerge_tokens_vjp_cuda(gradient, labels, most))
    return leave(_unmerge_tokens_vjp_reference(gradient, labels, most))


def _unmerge_tokens_vjp_reference(
    gradient: NDArray[Any], labels: NDArray[Any], num_groups: int
) -> NDArray[Any]:
    from scipy.sparse import csr_array  # here, or `import qm_cupy` takes twice as long

    *batch, _, dim = gradient.shape
    flat, group, num_rows = _flat_groups(labels, num_groups)
    dtype = np.result_type(gradient.dtype, np.float32)
    member = csr_array(
        (np.ones(len(flat), dtype), (group, flat)), shape=(num_rows, labels.size)
    )
    values = gradient.reshape(-1, dim).astype(dtype, copy=False)
    total: NDArray[Any] = (member @ values).astype(gradient.dtype, copy=False)
    return total.reshape(*batch, num_groups, dim)


def _unmerge_tokens_vjp_cuda(gradient: Any, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens, dim = gradient.shape
    out = _cuda.empty((*leading, num_groups, dim), gradient.dtype)
    gradient, labels = _cuda.contiguous(gradient), _cuda.contiguous(labels, np.int32)
    sizes = math.prod(leading), num_tokens, dim, num_groups
    chosen = _cuda.implementation()
    basic = chosen == "basic"
    groups = (labels,) if basic else _members_cuda(labels, num_groups)
    args = (gradient, *groups, *sizes, out)
    threads = out.size if basic else _cuda.vectors(out)
    kernel = f"{chosen}/unmerge_tokens_vjp", "unmerge_tokens_vjp"
    _cuda.launch(*kernel, gradient.dtype, threads, args)
    return out
