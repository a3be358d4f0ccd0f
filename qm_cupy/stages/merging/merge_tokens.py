"""Merging: groups of tokens to one token each."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    GroupCounts,
    check_gradient,
    check_group_counts,
    check_labels,
    check_mass,
    check_out,
    check_tokens,
)
from ...arrays.conversion import (
    Array,
    FloatArray,
    IntArray,
    deliver,
    enter,
    on_callers_stream,
)
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import Shape
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .groups import flat_groups, members_cuda

_BLOCK = 256  # tokens at a time: 2 MB of each array for D = 1024


def _merged_shape(tokens: Any, *others: Any) -> tuple[Shape, ...]:
    return ((*tokens.shape[:-2], others[-1], tokens.shape[-1]),)  # K is the last


@operation(
    inputs=("tokens", "mass?"),
    constants=("labels",),
    counts="num_groups",
    dtype="stored",
    shapes=_merged_shape,
)
def merge_tokens(
    tokens: Array,
    labels: IntArray,
    num_groups: Any,
    *,
    mass: FloatArray | None = None,
    out: Array | None = None,
) -> Array:
    r"""Saliency-weighted mean of the tokens of each group.

    .. math:: \tilde x_k = \sum_{j \in G_k} m_j x_j \Big/ \sum_{j \in G_k} m_j

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings or any values that go with them; float16, bfloat16, float32 or
        float64.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding, as `cluster_tokens` gives.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest.
    mass : ndarray of shape (N,) or (B, N), optional
        Non-negative weights m; 1 by default. A group of mass 0 takes the plain mean.
    out : ndarray of shape (K, D) or (B, K, D), optional
        Where to write the result: the dtype of `tokens`, C-contiguous, and no memory
        of an input. JAX arrays cannot be written.

    Returns
    -------
    ndarray of shape (K, D) or (B, K, D)
        Merged tokens in the dtype of `tokens`, summed in float32 at least and in index
        order. Groups without members are zero.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative or a label
        outside -1..K-1.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.array([[0.0], [4.0], [7.0]])
    >>> merge_tokens(tokens, np.array([0, 0, 1]), 2, mass=np.array([1.0, 3.0, 1.0]))
    array([[3.],
           [7.]])
    """
    leave, tokens, labels, mass, num_groups, target = enter(
        {"tokens": tokens, "labels": labels, "mass": mass},
        counts={"num_groups": num_groups},
        outputs={"out": out},
    )
    check_tokens(tokens)
    batch = tokens.shape[:-2]
    groups = check_group_counts(num_groups, batch)
    check_labels(labels, tokens.shape[:-1], groups.counts)
    check_mass(mass, tokens.shape[:-1])
    wanted = (*batch, groups.max_groups, tokens.shape[-1])
    check_out(target, wanted, tokens.dtype, tokens, labels, mass)
    merged = compute_merge_tokens(tokens, labels, groups, mass=mass, out=target)
    return deliver(leave, merged, out, target)


def compute_merge_tokens(
    tokens: Any,
    labels: Any,
    num_groups: GroupCounts,
    *,
    mass: Any = None,
    out: Any = None,
) -> Any:
    """Return the merged tokens, in `out` if it is given and a kernel writes them."""
    max_groups = num_groups.max_groups
    if is_cuda(tokens):
        return merge_tokens_cuda(tokens, labels, max_groups, mass, out)
    return _merge_tokens_reference(tokens, labels, max_groups, mass)


def _merge_tokens_reference(
    tokens: NDArray[Any],
    labels: NDArray[Any],
    num_groups: int,
    mass: NDArray[Any] | None,
) -> NDArray[Any]:
    *batch, _, dim = tokens.shape
    dtype = np.result_type(tokens.dtype, np.float32)
    values = tokens.reshape(-1, dim).astype(dtype, copy=False)
    shares = _shares_reference(labels, num_groups, mass).astype(dtype)
    merged = (shares @ values).astype(tokens.dtype, copy=False)  # (B·K, D)
    return merged.reshape(*batch, num_groups, dim)


def _shares_reference(
    labels: NDArray[Any], num_groups: int, mass: NDArray[Any] | None
) -> Any:
    """Return the shares of the tokens in the merged ones: a csr_array (B·K, B·N)."""
    from scipy.sparse import csr_array  # here, or `import qm_cupy` takes twice as long

    flat, group, num_rows = flat_groups(labels, num_groups)
    weight = np.ones(labels.size) if mass is None else mass.ravel().astype(np.float64)
    weight = weight[flat]
    peak = np.zeros(num_rows)
    np.maximum.at(peak, group, weight)
    weight /= np.where(peak > 0, peak, 1)[group]  # so that no total overflows
    total = np.bincount(group, weight, num_rows)[group]
    size = np.bincount(group, minlength=num_rows)[group]
    share = np.where(total > 0, weight / np.where(total > 0, total, 1), 1 / size)
    return csr_array((share, (group, flat)), shape=(num_rows, labels.size))


def merge_tokens_cuda(
    tokens: Any, labels: Any, num_groups: int, mass: Any, out: Any
) -> Any:
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    if out is None:
        out = empty((*leading, num_groups, dim), tokens.dtype)
    tokens, labels = contiguous(tokens), contiguous(labels, np.int32)
    mass = contiguous(mass, accumulation_dtype(tokens.dtype))
    sizes = batch, num_tokens, dim, num_groups
    args: tuple[Any, ...]
    if implementation() == "basic":
        args = (tokens, mass, labels, *sizes, out)
    else:
        args = (tokens, mass, *members_cuda(labels, num_groups), *sizes, out)
    launch("merge_tokens", "merge_tokens", tokens.dtype, args, vectors=out)
    return out


@on_callers_stream
def merge_tokens_vjp(
    gradient: FloatArray,
    tokens: Array,
    labels: IntArray,
    num_groups: Any,
    *,
    mass: FloatArray | None = None,
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
    leave, tokens, labels, mass, num_groups, gradient = enter(
        {"tokens": tokens, "labels": labels, "mass": mass},
        counts={"num_groups": num_groups},
        gradients={"gradient": gradient},
    )
    check_tokens(tokens)
    batch = tokens.shape[:-2]
    counts, max_groups = check_group_counts(num_groups, batch)
    wanted = (*batch, max_groups, tokens.shape[-1])
    kept = (np.arange(max_groups) < counts[..., None])[..., None]  # (B, K, 1)
    gradient = check_gradient(gradient, wanted, "BKD", tokens, mask=kept)
    check_labels(labels, tokens.shape[:-1], counts)
    check_mass(mass, tokens.shape[:-1])
    args = gradient.astype(tokens.dtype, copy=False), tokens, labels, max_groups, mass
    if is_cuda(tokens):
        by_tokens, by_mass = _merge_tokens_vjp_cuda(*args)
    else:
        by_tokens, by_mass = merge_tokens_vjp_reference(*args)
    return leave(by_tokens), None if by_mass is None else leave(by_mass)


def merge_tokens_vjp_reference(
    gradient: NDArray[Any],
    tokens: NDArray[Any],
    labels: NDArray[Any],
    num_groups: int,
    mass: NDArray[Any] | None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    dim = tokens.shape[-1]
    flat, group, num_rows = flat_groups(labels, num_groups)
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
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    gradient, tokens = contiguous(gradient), contiguous(tokens)
    labels, weight = contiguous(labels, np.int32), contiguous(mass, acc_dtype)
    shares, out = (
        empty(labels.shape, acc_dtype),
        empty(tokens.shape, tokens.dtype),
    )
    slope = None if mass is None else empty(labels.shape, acc_dtype)
    sizes = batch, num_tokens, dim, num_groups
    find = _merge_vjp_optimized
    if implementation() == "basic":
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
    page, few = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    args: tuple[Any, ...] = (mass, labels, *few, shares)
    launch(page, "member_shares", tokens.dtype, args, outputs=shares.size)
    args = (gradient, labels, shares, *sizes, out)
    launch(page, page, tokens.dtype, args, outputs=out.size)
    if slope is None:
        return
    products = empty(slope.shape, slope.dtype)
    args = (gradient, tokens, labels, *sizes, products)
    launch(page, "member_products", tokens.dtype, args, outputs=products.size)
    args = (mass, labels, shares, products, *few, slope)
    launch(page, "merge_mass_vjp", tokens.dtype, args, outputs=slope.size)


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
    page, few = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    groups, lists = batch * num_groups, members_cuda(labels, num_groups)
    args: tuple[Any, ...] = (mass, *lists, *few, shares)
    launch(page, "member_shares", tokens.dtype, args, rows=groups)
    args = (gradient, tokens, labels, shares, *sizes, slope, out)
    launch(page, page, tokens.dtype, args, rows=shares.size)
    if slope is None:
        return
    args = (mass, *lists, shares, *few, slope)
    launch(page, "merge_mass_vjp", tokens.dtype, args, rows=groups)
