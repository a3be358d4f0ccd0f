"""Merging: the weighted mean of the tokens of each group.

There are B sequences of N tokens of width D, and K groups in each sequence. x_j is
token j of a sequence, m_j is its mass, and k is its group. G_k is the set of the
members of group k, |G_k| is their number, and W_k = Σ_{j∈G_k} m_j is their mass. x̃_k
is the merged token: the mean of the members with the weights m_j / W_k. g_k is the
gradient of a loss with respect to x̃_k. A bar means the gradient of the loss with
respect to the quantity, such as m̄_j. A label is the group of a token, or -1 for
padding.
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
    check_out,
)
from ...arrays.conversion import (
    Array,
    FloatArray,
    IntArray,
    convert_inputs,
    deliver,
    on_callers_stream,
)
from ...arrays.counts import GroupCounts, check_group_counts
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import all_finite
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import Shape
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import implementation
from .groups import flat_groups, members_cuda
from .member_weights import clip_to_members, member_weights

# Tokens that the reference of the gradient processes at once. For D = 1024, a block in
# float64 has 2 MB.
_BLOCK = 256


def _merged_shape(tokens: Any, *others: Any) -> tuple[Shape, ...]:
    """Return the shape of the result; an operator passes the largest K last."""
    return ((*tokens.shape[:-2], others[-1], tokens.shape[-1]),)  # (B, K, D)


@operation(
    differentiable=("tokens", "mass?"),
    constants=("labels",),
    count_parameter="num_groups",
    dtype="stored",  # that of the first array
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
    r"""Return the mass-weighted mean of the tokens of each group.

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
        Number of groups K, for all sequences or for each one. The result is padded
        with 0 to the largest K.
    mass : ndarray of shape (N,) or (B, N), optional
        Non-negative weights m, such as the saliency mass; 1 by default. A group of mass
        0 gets the plain mean of its members.
    out : ndarray of shape (K, D) or (B, K, D), optional
        Array for the result. It must have the dtype of `tokens`, be C-contiguous and
        share no memory with another array of the call. It cannot be a JAX array.

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
    # `target` is `out` as a NumPy or CuPy array.
    convert_back, tokens, labels, mass, num_groups, target = convert_inputs(
        {"tokens": tokens, "labels": labels, "mass": mass},
        counts={"num_groups": num_groups},
        outputs={"out": out},
    )
    check_layout("tokens", tokens, "ND", "BND")
    batch = tokens.shape[:-2]  # (B,), or () for one sequence
    groups = check_group_counts(num_groups, batch)
    # A label must be below the K of its own sequence.
    check_labels(labels, tokens.shape[:-1], groups.counts)
    check_labelled_tokens(tokens, labels, mass=mass)
    wanted = (*batch, groups.max_groups, tokens.shape[-1])
    check_out(target, wanted, tokens.dtype)
    merged = compute_merge_tokens(tokens, labels, groups, mass=mass, out=target)
    return deliver(convert_back, merged, out, target)


def compute_merge_tokens(
    tokens: Any,
    labels: Any,
    num_groups: GroupCounts,
    *,
    mass: Any = None,
    out: Any = None,
) -> Any:
    """Return the merged tokens of converted and checked arrays.

    The kernels write into `out`. The NumPy reference returns a new array, which the
    caller copies to `out`.
    """
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
    flat_tokens = tokens.reshape(-1, dim).astype(dtype, copy=False)  # (B·N, D)
    # The weights are a sparse matrix (B·K, B·N). Its product with the tokens adds the
    # members of each group in index order.
    weights = member_weights(labels, num_groups, mass).astype(dtype)
    merged = weights @ flat_tokens  # (B·K, D)
    if not all_finite(merged):
        clip_to_members(merged, weights, flat_tokens)
    merged = merged.astype(tokens.dtype, copy=False)
    return merged.reshape(*batch, num_groups, dim)


def merge_tokens_cuda(
    tokens: Any, labels: Any, num_groups: int, mass: Any, out: Any
) -> Any:
    """Return the merged tokens.

    The kernels use no float atomics, so every run gives the same bits.
    """
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    if out is None:
        out = empty((*leading, num_groups, dim), tokens.dtype)
    tokens, labels = contiguous(tokens), contiguous(labels, np.int32)
    mass = contiguous(mass, accumulation_dtype(tokens.dtype))
    sizes = batch, num_tokens, dim, num_groups
    args: tuple[Any, ...]
    if implementation() == "basic":
        # Each thread reads all labels of its sequence to find the members of its group.
        args = (tokens, mass, labels, *sizes, out)
    else:
        # The labels become one list of tokens, sorted by group, and the index in it at
        # which each group ends. So a thread reads only the tokens of its group.
        args = (tokens, mass, *members_cuda(labels, num_groups), *sizes, out)
    # A thread for each 16 bytes of a merged token. The basic kernel has a thread for
    # each element.
    launch("merge_tokens", "merge_tokens", tokens.dtype, args, vector_output=out)
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

    .. math:: \bar x_j = \frac{m_j}{W_k} g_k, \qquad
        \bar m_j = \frac{1}{W_k} g_k \cdot (x_j - \tilde x_k), \qquad
        W_k = \sum_{i \in G_k} m_i

    Here k is the group of token j, and :math:`\bar x_j` and :math:`\bar m_j` are the
    gradients of the loss with respect to the token and its mass.

    Parameters
    ----------
    gradient : ndarray of shape (K, D) or (B, K, D)
        Gradient g of a loss with respect to the merged tokens; any float dtype, which
        is converted to the dtype of `tokens`. Groups without members have no effect.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, the argument of `merge_tokens`.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding. They have no gradient.
    num_groups : int or ndarray of int of shape (B,)
        Number of groups K, for all sequences or for each one.
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
    >>> token_gradient, mass_gradient = merge_tokens_vjp(
    ...     gradient, tokens, labels, 2, mass=mass
    ... )
    >>> token_gradient.ravel()
    array([0.25, 0.75, 2.  ])
    >>> mass_gradient
    array([-0.75,  0.25,  0.  ])
    """
    convert_back, tokens, labels, mass, num_groups, gradient = convert_inputs(
        {"tokens": tokens, "labels": labels, "mass": mass},
        counts={"num_groups": num_groups},
        gradients={"gradient": gradient},
    )
    check_layout("tokens", tokens, "ND", "BND")
    batch = tokens.shape[:-2]
    counts, max_groups = check_group_counts(num_groups, batch)
    wanted = (*batch, max_groups, tokens.shape[-1])
    # A sequence with a smaller K has rows without a group. The gradient may be NaN in
    # these rows, so the check leaves them out.
    has_group = (np.arange(max_groups) < counts[..., None])[..., None]  # (B, K, 1)
    gradient = check_gradient(gradient, wanted, "BKD", tokens, mask=has_group)
    check_labels(labels, tokens.shape[:-1], counts)
    check_labelled_tokens(tokens, labels, mass=mass)
    # The kernels have one dtype for tokens and gradient.
    args = gradient.astype(tokens.dtype, copy=False), tokens, labels, max_groups, mass
    if is_cuda(tokens):
        x_gradient, m_gradient = _merge_tokens_vjp_cuda(*args)
    else:
        x_gradient, m_gradient = merge_tokens_vjp_reference(*args)
    return convert_back(x_gradient), None if m_gradient is None else convert_back(
        m_gradient
    )


def merge_tokens_vjp_reference(
    gradient: NDArray[Any],
    tokens: NDArray[Any],
    labels: NDArray[Any],
    num_groups: int,
    mass: NDArray[Any] | None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return the gradients (B, N, D) of the tokens and (B, N) of the mass, or None."""
    dim = tokens.shape[-1]
    # `flat` and `group` have one entry for each token that is not padding, in index
    # order.
    members = flat, group, _ = flat_groups(labels, num_groups)
    # m_j / W_k in index order. Rows of the sparse matrix are groups, and columns are
    # tokens. The column of padding is empty, and every other column has one entry. A
    # csc_array stores the columns in order.
    weights = member_weights(labels, num_groups, mass).tocsc().data
    group_gradient, x = gradient.reshape(-1, dim), tokens.reshape(-1, dim)
    x_gradient, product = np.zeros(x.shape, x.dtype), np.empty(len(flat))
    for first in range(0, len(flat), _BLOCK):
        block = slice(first, first + _BLOCK)
        g = group_gradient[group[block]].astype(np.float64)  # g_k, (block, D)
        x_gradient[flat[block]] = weights[block, None] * g  # x̄_j = (m_j / W_k) g_k
        if mass is not None:
            block_x = x[flat[block]].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                product[block] = np.einsum("md,md->m", g, block_x)  # g_k · x_j
    x_gradient = x_gradient.reshape(tokens.shape)
    if mass is None:
        return x_gradient, None
    # Sums of float16 masses would lose digits.
    masses = mass.ravel()[flat].astype(np.float64)
    by_mass = _mass_gradient(product, masses, weights, members)
    if not all_finite(by_mass):
        # Divide the three factors by powers of two, then multiply the result by them.
        factors = [y.astype(np.float64) for y in (group_gradient, x, masses)]
        exponents = [int(np.frexp(np.abs(y).max(initial=0))[1]) for y in factors]
        g, x, masses = map(np.ldexp, factors, np.negative(exponents))
        product = np.einsum("md,md->m", g[group], x[flat])
        scaled = _mass_gradient(product, masses, weights, members)
        with np.errstate(over="ignore"):  # ±inf is right for a gradient out of range
            scaled = np.ldexp(scaled, exponents[0] + exponents[1] - exponents[2])
        by_mass = np.where(np.isfinite(by_mass), by_mass, scaled)
    m_gradient = np.zeros(labels.size)
    m_gradient[flat] = by_mass
    return x_gradient, narrow(m_gradient.reshape(labels.shape), mass.dtype)


def _mass_gradient(
    product: NDArray[Any],
    mass: NDArray[Any],
    weights: NDArray[Any],
    members: tuple[NDArray[np.intp], NDArray[np.intp], int],
) -> NDArray[Any]:
    """Return m̄_j of the tokens of all groups; it is not finite if a sum overflows.

    `product` has g_k · x_j, and `members` is the result of `flat_groups`.
    """
    _, group, num_rows = members
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.bincount(group, mass, num_rows)[group]  # W_k
        # g_k · (x_j - x̃_k): the weighted mean of the products of a group is g_k · x̃_k.
        difference = product - np.bincount(group, weights * product, num_rows)[group]
        # A group of mass 0 uses the plain mean, which does not depend on its masses.
        quotient = np.where(total > 0, difference / np.where(total > 0, total, 1), 0)
    return np.where(np.isinf(total), np.nan, quotient)


def _merge_tokens_vjp_cuda(
    gradient: Any, tokens: Any, labels: Any, num_groups: int, mass: Any
) -> tuple[Any, Any]:
    *leading, num_tokens, dim = tokens.shape
    batch, acc_dtype = math.prod(leading), accumulation_dtype(tokens.dtype)
    gradient, tokens = contiguous(gradient), contiguous(tokens)
    labels, masses = contiguous(labels, np.int32), contiguous(mass, acc_dtype)
    # m_j / W_k of each token, (B, N), and the gradient x̄ of the tokens, (B, N, D)
    weights, out = (
        empty(labels.shape, acc_dtype),
        empty(tokens.shape, tokens.dtype),
    )
    m_gradient = None if mass is None else empty(labels.shape, acc_dtype)  # (B, N)
    sizes = batch, num_tokens, dim, num_groups
    launch_kernels = _merge_vjp_optimized
    if implementation() == "basic":
        launch_kernels = _merge_vjp_basic
    launch_kernels(gradient, tokens, labels, masses, sizes, weights, m_gradient, out)
    return (
        out,
        None if m_gradient is None else m_gradient.astype(mass.dtype, copy=False),
    )


def _merge_vjp_basic(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    weights: Any,
    m_gradient: Any,
    out: Any,
) -> None:
    """Write to `weights`, `out` and `m_gradient`, which is None without a mass.

    There are two launches, or four with a mass. A launch has a thread for each output.
    """
    batch, num_tokens, _, num_groups = sizes
    # The kernel of the tokens' gradient has the name of its file.
    file, label_sizes = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    # m_j / W_k, or 1 / |G_k| without a mass
    args: tuple[Any, ...] = (mass, labels, *label_sizes, weights)
    launch(file, "member_weights", tokens.dtype, args, outputs=weights.size)
    # x̄_j = (m_j / W_k) g_k
    args = (gradient, labels, weights, *sizes, out)
    launch(file, file, tokens.dtype, args, outputs=out.size)
    if m_gradient is None:
        return
    products = empty(m_gradient.shape, m_gradient.dtype)  # g_k · x_j, (B, N)
    # m̄_j = (g_k · x_j - g_k · x̃_k) / W_k in two launches: first the products g_k ·
    # x_j, then their weighted mean in each group, which is g_k · x̃_k.
    args = (gradient, tokens, labels, *sizes, products)
    launch(file, "member_products", tokens.dtype, args, outputs=products.size)
    args = (mass, labels, weights, products, *label_sizes, m_gradient)
    launch(file, "merge_mass_vjp", tokens.dtype, args, outputs=m_gradient.size)


def _merge_vjp_optimized(
    gradient: Any,
    tokens: Any,
    labels: Any,
    mass: Any,
    sizes: tuple[int, int, int, int],
    weights: Any,
    m_gradient: Any,
    out: Any,
) -> None:
    """Write to `weights`, `out` and `m_gradient`, which is None without a mass.

    `members_cuda` first sorts the labels, in a launch of its own. Two launches follow,
    or three with a mass: the first has a warp for each group, the second a warp for
    each token, and the third a warp for each group.
    """
    batch, num_tokens, _, num_groups = sizes
    # The kernel of the tokens' gradient has the name of its file.
    file, label_sizes = "merge_tokens_vjp", (batch, num_tokens, num_groups)
    num_all_groups, lists = batch * num_groups, members_cuda(labels, num_groups)
    # m_j / W_k: the lanes of a warp add up the masses of one group.
    args: tuple[Any, ...] = (mass, *lists, *label_sizes, weights)
    launch(file, "member_weights", tokens.dtype, args, rows=num_all_groups)
    # x̄_j = (m_j / W_k) g_k. With a mass, the same pass over the tokens also computes
    # the products g_k · x_j. They are stored in the array of the mass gradient.
    args = (gradient, tokens, labels, weights, *sizes, m_gradient, out)
    launch(file, file, tokens.dtype, args, rows=weights.size)
    if m_gradient is None:
        return
    # m̄_j = (g_k · x_j - g_k · x̃_k) / W_k overwrites the products.
    args = (mass, *lists, weights, *label_sizes, m_gradient)
    launch(file, "merge_mass_vjp", tokens.dtype, args, rows=num_all_groups)
