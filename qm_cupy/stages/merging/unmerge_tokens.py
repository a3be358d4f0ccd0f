"""Unmerging: every token gets the value of its group.

There are B sequences of N tokens of width D, and K groups in each sequence. x̃_k is the
merged token of group k. If token j is in group k, its rebuilt token is x̂_j = x̃_k. G_k
is the set of the members of group k. g_j is the gradient of a loss with respect to x̂_j.
A label is the group of a token, or -1 for padding.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import (
    check_gradient,
    check_is_array,
    check_labels,
    check_out,
    check_tokens,
)
from ...arrays.conversion import (
    Array,
    IntArray,
    convert_inputs,
    deliver,
    on_callers_stream,
)
from ...arrays.counts import check_group_counts
from ...arrays.dtypes import narrow
from ...arrays.finite import all_finite
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import Shape
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from ...settings import check_finite, implementation
from .groups import flat_groups, members_cuda


def _unmerged_shape(merged: Any, labels: Any) -> tuple[Shape, ...]:
    """Return the shape of the result from the shapes of the arguments."""
    return ((*labels.shape, merged.shape[-1]),)  # (B, N, D)


@operation(
    differentiable=("merged",),
    constants=("labels",),
    dtype="stored",  # that of the first array
    shapes=_unmerged_shape,
    vjp="_unmerge_tokens_vjp",
)
def unmerge_tokens(
    merged: Array, labels: IntArray, *, out: Array | None = None
) -> Array:
    """Return, for every token, the value of its group: the gather by labels.

    Parameters
    ----------
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens; float16, bfloat16, float32 or float64.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding. Padded tokens are 0.
    out : ndarray of shape (N, D) or (B, N, D), optional
        Array for the result. It must have the dtype of `merged`, be C-contiguous and
        share no memory with another array of the call. It cannot be a JAX array.

    Returns
    -------
    ndarray of shape (N, D) or (B, N, D)
        Rebuilt tokens, in the dtype of `merged`.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> unmerge_tokens(np.array([[3.0], [7.0]]), np.array([0, 0, 1])).ravel()
    array([3., 3., 7.])
    """
    # `target` is `out` as a NumPy or CuPy array.
    convert_back, merged, labels, target = convert_inputs(
        {"merged": merged, "labels": labels}, outputs={"out": out}
    )
    check_tokens(merged, "merged")
    check_is_array("labels", labels)
    # `labels` may have any N, so the wanted shape ends in the N of `labels`. A scalar
    # has no N; then the wanted shape ends in 1, and the check raises.
    wanted = (*merged.shape[:-2], *(labels.shape[-1:] or (1,)))  # (B, N)
    check_labels(labels, wanted, merged.shape[-2])
    wanted = (*labels.shape, merged.shape[-1])  # (B, N, D)
    check_out(target, wanted, merged.dtype)
    if is_cuda(merged):
        tokens = unmerge_tokens_cuda(merged, labels, target)
    else:
        tokens = unmerge_tokens_reference(merged, labels)
    return deliver(convert_back, tokens, out, target)


def unmerge_tokens_reference(
    merged: NDArray[Any], labels: NDArray[Any]
) -> NDArray[Any]:
    """Return the gather by labels, with 0 for padding."""
    index = labels.astype(np.intp)[..., None]  # (B, N, 1)
    # Padding has label -1. It reads group 0 here and is set to 0 below.
    tokens = np.take_along_axis(merged, np.maximum(index, 0), axis=-2)  # (B, N, D)
    if (labels < 0).any():
        tokens[labels < 0] = 0
    return tokens


def unmerge_tokens_cuda(merged: Any, labels: Any, out: Any) -> Any:
    """Return the gather by labels, with 0 for padding, written to `out` if not None."""
    *leading, num_groups, dim = merged.shape
    batch, num_tokens = math.prod(leading), labels.shape[-1]
    if out is None:
        out = empty((*leading, num_tokens, dim), merged.dtype)
    arrays = contiguous(merged), contiguous(labels, np.int32)
    args = (*arrays, batch, num_tokens, dim, num_groups, out)
    # A thread for each 16 bytes of a token. The basic kernel has a thread for each
    # element.
    launch("unmerge_tokens", "unmerge_tokens", merged.dtype, args, vector_output=out)
    return out


@on_callers_stream
def unmerge_tokens_vjp(gradient: Array, labels: IntArray, num_groups: Any) -> Array:
    r"""Return the gradient of `unmerge_tokens`: sums over the members of each group.

    .. math:: \frac{\partial \mathcal{L}}{\partial \tilde x_k} = \sum_{j \in G_k} g_j

    Parameters
    ----------
    gradient : ndarray of shape (N, D) or (B, N, D)
        Gradient g of a loss with respect to the rebuilt tokens; float16, bfloat16,
        float32 or float64. The gradient of padding is not read.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding. They have no gradient.
    num_groups : int or ndarray of int of shape (B,)
        Number of groups K, for all sequences or for each one. The result is padded
        with 0 to the largest K.

    Returns
    -------
    ndarray of shape (K, D) or (B, K, D)
        Gradient of the loss with respect to the merged tokens, in the dtype of
        `gradient`. The sums are in float32 at least, and in index order. Groups without
        members have 0.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, or a label is outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = np.array([[1.0], [2.0], [4.0]])
    >>> unmerge_tokens_vjp(gradient, np.array([0, 0, 1]), 2).ravel()
    array([3., 4.])
    """
    convert_back, labels, num_groups, gradient = convert_inputs(
        {"labels": labels},
        counts={"num_groups": num_groups},
        gradients={"gradient": gradient},
    )
    # The gradient of padding may be NaN, and the labels say which tokens are padding.
    # So check the dtype and the shape of the gradient first, then the labels, and then
    # that the gradient of the other tokens is finite.
    with check_finite(False):
        check_tokens(gradient, "gradient")
    counts, max_groups = check_group_counts(num_groups, gradient.shape[:-2])
    check_labels(labels, gradient.shape[:-1], counts)
    # Arrays on a GPU are not checked for NaN, so they need no mask.
    is_token = None if is_cuda(gradient) else (labels >= 0)[..., None]  # (B, N, 1)
    check_gradient(gradient, gradient.shape, "BND", mask=is_token)
    if is_cuda(gradient):
        return convert_back(_unmerge_tokens_vjp_cuda(gradient, labels, max_groups))
    return convert_back(unmerge_tokens_vjp_reference(gradient, labels, max_groups))


def _unmerge_tokens_vjp(gradient: Any, merged: Any, labels: Any) -> Any:
    """Return the gradient for `merged`, from the arguments of `unmerge_tokens`.

    torch and JAX call this function. It has no `num_groups`: K is an axis of `merged`.
    """
    return unmerge_tokens_vjp(gradient, labels, merged.shape[-2])


def unmerge_tokens_vjp_reference(
    gradient: NDArray[Any], labels: NDArray[Any], num_groups: int
) -> NDArray[Any]:
    """Return the sums over the members of each group, (B, K, D)."""
    # Imported here: at the top of the file it doubles the time of `import qm_cupy`.
    from scipy.sparse import csr_array

    *batch, _, dim = gradient.shape
    # For each token that is not padding: its index in (B·N,) and its group in (B·K,).
    flat, group, num_all_groups = flat_groups(labels, num_groups)
    # Sums in float16 would overflow and lose digits.
    dtype = np.result_type(gradient.dtype, np.float32)
    # A sparse matrix (B·K, B·N) with a 1 for every member. Its product with the
    # gradients adds the gradients of each group in index order.
    is_member = csr_array(
        (np.ones(len(flat), dtype), (group, flat)), shape=(num_all_groups, labels.size)
    )
    flat_gradient = gradient.reshape(-1, dim).astype(dtype, copy=False)  # (B·N, D)
    with np.errstate(over="ignore"):
        total = (is_member @ flat_gradient).astype(gradient.dtype, copy=False)
    if not all_finite(total):
        # A part of a sum can overflow where the whole sum does not. The factor is a
        # power of two, so it changes no digits.
        factor = 2.0 ** -int(np.ceil(np.log2(len(flat)) + 1))
        with np.errstate(over="ignore"):
            scaled = (is_member @ (flat_gradient * dtype.type(factor))) / factor
        total = np.where(np.isfinite(total), total, narrow(scaled, gradient.dtype))
    return total.reshape(*batch, num_groups, dim)


def _unmerge_tokens_vjp_cuda(gradient: Any, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens, dim = gradient.shape
    out = empty((*leading, num_groups, dim), gradient.dtype)
    gradient, labels = contiguous(gradient), contiguous(labels, np.int32)
    sizes = math.prod(leading), num_tokens, dim, num_groups
    # The optimized kernel reads lists of the members of each group, so a thread does
    # not search all labels. The basic kernel reads the labels.
    basic = implementation() == "basic"
    groups = (labels,) if basic else members_cuda(labels, num_groups)
    args = (gradient, *groups, *sizes, out)
    # A thread for each 16 bytes of a merged token. The basic kernel has a thread for
    # each element.
    kernel = "unmerge_tokens_vjp", "unmerge_tokens_vjp"
    launch(*kernel, gradient.dtype, args, vector_output=out)
    return out
