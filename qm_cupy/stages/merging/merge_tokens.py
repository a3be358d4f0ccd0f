"""Merging: the weighted mean of the tokens of each group."""

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

_BLOCK = 256  # tokens at a time: float64 blocks have 2 MB for D = 1024


def _merged_shape(tokens: Any, *others: Any) -> tuple[Shape, ...]:
    """Return the shape of the result; K is the last of the other arguments."""
    return ((*tokens.shape[:-2], others[-1], tokens.shape[-1]),)  # (B, K, D)


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
    r"""Return the saliency-weighted mean of the tokens of each group.

    .. math:: \tilde x_k = \sum_{j \in G_k} m_j x_j \Big/ \sum_{j \in G_k} m_j

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, or any other values of the tokens; float16, bfloat16, float32
        or float64.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding, as returned by
        `cluster_tokens`.
    num_groups : int or ndarray of int of shape (B,)
        K for all sequences, or for each one. The result is padded with 0 to the largest
        K.
    mass : ndarray of shape (N,) or (B, N), optional
        Non-negative weights m; 1 by default. A group of mass 0 gets the plain mean.
    out : ndarray of shape (K, D) or (B, K, D), optional
        Array for the result. It must have the dtype of `tokens`, be C-contiguous and
        share no memory with an input. It cannot be a JAX array.

    Returns
    -------
    ndarray of shape (K, D) or (B, K, D)
        Merged tokens in the dtype of `tokens`. The sums are in float32 at least, and in
        index order. Groups without members are 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative, or a label
        is outside -1..K-1.

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
    # A label must be below the K of its own sequence.
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
    """Return the merged tokens of checked arrays; only kernels write into `out`."""
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
    # Sums in float16 would overflow and lose digits.
    dtype = np.result_type(tokens.dtype, np.float32)
    values = tokens.reshape(-1, dim).astype(dtype, copy=False)  # (B·N, D)
    # A sparse matrix product adds the members of each group in index order.
    weights = _weights_reference(labels, num_groups, mass).astype(dtype)
    merged = (weights @ values).astype(tokens.dtype, copy=False)  # (B·K, D)
    return merged.reshape(*batch, num_groups, dim)


def _weights_reference(
    labels: NDArray[Any], num_groups: int, mass: NDArray[Any] | None
) -> Any:
    """Return m_j / Σ m of each token in its group, as a csr_array (B·K, B·N)."""
    # Imported here: at the top of the file it doubles the time of `import qm_cupy`.
    from scipy.sparse import csr_array

    flat, group, num_rows = flat_groups(labels, num_groups)
    masses = np.ones(labels.size) if mass is None else mass.ravel().astype(np.float64)
    masses = masses[flat]  # of the tokens that are not padding
    # Relative to the largest mass of the group, so that no total overflows or vanishes.
    peak = np.zeros(num_rows)  # (B·K,)
    np.maximum.at(peak, group, masses)
    masses /= np.where(peak > 0, peak, 1)[group]
    total = np.bincount(group, masses, num_rows)[group]  # for each token, of its group
    size = np.bincount(group, minlength=num_rows)[group]
    # A group of mass 0 gets the plain mean.
    weights = np.where(total > 0, masses / np.where(total > 0, total, 1), 1 / size)
    return csr_array((weights, (group, flat)), shape=(num_rows, labels.size))


def merge_tokens_cuda(
    tokens: Any, labels: Any, num_groups: int, mass: Any, out: Any
) -> Any:
    """Return the merged tokens; no float atomics, so every run gives the same bits."""
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    if out is None:
        out = empty((*leading, num_groups, dim), tokens.dtype)
    tokens, labels = contiguous(tokens), contiguous(labels, np.int32)
    mass = contiguous(mass, accumulation_dtype(tokens.dtype))
    sizes = batch, num_tokens, dim, num_groups
    args: tuple[Any, ...]
    if implementation() == "basic":
        # Each thread reads all labels of its sequence.
        args = (tokens, mass, labels, *sizes, out)
    else:
        # Labels become member lists, so a thread reads only the tokens of its group.
        args = (tokens, mass, *members_cuda(labels, num_groups), *sizes, out)
    # A thread for each 16 bytes of a merged token; the basic kernel: for each element.
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
    r"""Return the gradients of `merge_tokens` with respect to tokens and mass.

    .. math:: \bar x_j = \frac{m_j}{W_k} \bar x_k, \qquad
        \bar m_j = \frac{1}{W_k} \bar x_k \cdot (x_j - \tilde x_k), \qquad
        W_k = \sum_{i \in G_k} m_i

    Parameters
    ----------
    gradient : ndarray of shape (K, D) or (B, K, D)
        Gradient of a loss with respect to the merged tokens; any float dtype, which is
        converted to the dtype of `tokens`. Groups without members have no effect.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, the argument of `merge_tokens`.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding. They have no gradient.
    num_groups : int or ndarray of int of shape (B,)
        K for all sequences, or for each one.
    mass : ndarray of shape (N,) or (B, N), optional
        Non-negative weights m; 1 by default.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient of the loss with respect to the tokens, in their dtype; 0 for padding.
    mass : ndarray of shape (N,) or (B, N), or None
        Gradient of the loss with respect to the mass, in its dtype; None if no mass was
        passed. A group of mass 0 gets the plain mean, so its masses have gradient 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative, or a label
        is outside -1..K-1.

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
    # Rows that pad K to the largest may hold NaN.
    kept = (np.arange(max_groups) < counts[..., None])[..., None]  # (B, K, 1)
    gradient = check_gradient(gradient, wanted, "BKD", tokens, mask=kept)
    check_labels(labels, tokens.shape[:-1], counts)
    check_mass(mass, tokens.shape[:-1])
    # Kernels have one dtype for tokens and gradient.
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
    """Return the gradients with respect to the tokens and the mass, or None."""
    dim = tokens.shape[-1]
    flat, group, num_rows = flat_groups(labels, num_groups)
    # Column order is token order, the order of `flat`.
    weights = _weights_reference(labels, num_groups, mass).tocsc().data
    slopes, x = gradient.reshape(-1, dim), tokens.reshape(-1, dim)
    by_tokens, product = np.zeros(x.shape, x.dtype), np.empty(len(flat))
    for first in range(0, len(flat), _BLOCK):
        block = slice(first, first + _BLOCK)
        slope = slopes[group[block]].astype(np.float64)  # x̄_k, (block, D)
        by_tokens[flat[block]] = weights[block, None] * slope
        if mass is not None:
            values = x[flat[block]].astype(np.float64)
            product[block] = np.einsum("md,md->m", slope, values)  # x̄_k · x_j
    by_tokens = by_tokens.reshape(tokens.shape)
    if mass is None:
        return by_tokens, None
    # W_k of each token. Sums of float16 masses would lose digits.
    total = np.bincount(group, mass.ravel()[flat].astype(np.float64), num_rows)[group]
    # x̄_k · x̃_k is the weighted mean of the products of the group.
    gap = product - np.bincount(group, weights * product, num_rows)[group]
    by_mass = np.zeros(labels.size)
    # A group of mass 0 uses the plain mean, which does not depend on its masses.
    by_mass[flat] = np.where(total > 0, gap / np.where(total > 0, total, 1), 0)
    return by_tokens, by_mass.reshape(labels.shape).astype(mass.dtype)


def _merge_tokens_vjp_cuda(
    gradient: Any, tokens: Any, labels: Any, num_groups: int, mass: Any
) -> tuple[Any, Any]:
    *leading, num_tokens, dim = tokens.shape
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    gradient, tokens = contiguous(gradient), contiguous(tokens)
    labels, masses = contiguous(labels, np.int32), contiguous(mass, acc_dtype)
    # m_j / W_k of each token, (B, N), and the gradient of the tokens.
    weights, out = (
        empty(labels.shape, acc_dtype),
        empty(tokens.shape, tokens.dtype),
    )
    slope = None if mass is None else empty(labels.shape, acc_dtype)  # m̄, (B, N)
    sizes = batch, num_tokens, dim, num_groups
    launch_kernels = _merge_vjp_optimized
    if implementation() == "basic":
        launch_kernels = _merge_vjp_basic
    launch_kernels(gradient, tokens, labels, masses, sizes, weights, slope, out)
    return out, None if slope is None else slope.astype(mass.dtype, copy=False)


def _merge_vjp_basic(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    weights: Any,
    slope: Any,
    out: Any,
) -> None:
    """Launch two kernels, or four with a mass: one thread for each output."""
    batch, num_tokens, _, num_groups = sizes
    page, label_sizes = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    # m_j / W_k, or 1 / |G_k| without mass.
    args: tuple[Any, ...] = (mass, labels, *label_sizes, weights)
    launch(page, "member_shares", tokens.dtype, args, outputs=weights.size)
    # x̄_j = (m_j / W_k) x̄_k
    args = (gradient, labels, weights, *sizes, out)
    launch(page, page, tokens.dtype, args, outputs=out.size)
    if slope is None:
        return
    products = empty(slope.shape, slope.dtype)  # x̄_k · x_j, (B, N)
    # m̄_j = (x̄_k · x_j - x̄_k · x̃_k) / W_k in two passes over the members: first the
    # products, then their weighted mean in each group.
    args = (gradient, tokens, labels, *sizes, products)
    launch(page, "member_products", tokens.dtype, args, outputs=products.size)
    args = (mass, labels, weights, products, *label_sizes, slope)
    launch(page, "merge_mass_vjp", tokens.dtype, args, outputs=slope.size)


def _merge_vjp_optimized(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    weights: Any,
    slope: Any,
    out: Any,
) -> None:
    """Launch a warp for each group, then for each token, then for each group."""
    batch, num_tokens, _, num_groups = sizes
    page, label_sizes = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    groups, lists = batch * num_groups, members_cuda(labels, num_groups)
    # m_j / W_k: the lanes of a warp add up the masses of one group.
    args: tuple[Any, ...] = (mass, *lists, *label_sizes, weights)
    launch(page, "member_shares", tokens.dtype, args, rows=groups)
    # x̄_j = (m_j / W_k) x̄_k. The same pass over the tokens writes the products x̄_k · x_j
    # to `slope`.
    args = (gradient, tokens, labels, weights, *sizes, slope, out)
    launch(page, page, tokens.dtype, args, rows=weights.size)
    if slope is None:
        return
    # m̄_j = (x̄_k · x_j - x̄_k · x̃_k) / W_k, in place of the products.
    args = (mass, *lists, weights, *label_sizes, slope)
    launch(page, "merge_mass_vjp", tokens.dtype, args, rows=groups)
