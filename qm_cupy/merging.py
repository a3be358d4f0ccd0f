"""Merging: groups of tokens to one token each, and back."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import (
    check_given,
    check_labels,
    check_mass,
    check_num_groups,
    check_out,
    check_tokens,
    largest,
)

_GLOBAL_RUNS = 8  # of tokens sorted at once, if their counts are in global memory


@on_callers_stream
def merge_tokens(
    tokens: Array,
    labels: Array,
    num_groups: Any,
    *,
    mass: Array | None = None,
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
    leave, tokens, labels, num_groups, mass, target = enter(
        tokens=tokens, labels=labels, num_groups=num_groups, mass=mass, out=out
    )
    check_tokens(tokens)
    batch = tokens.shape[:-2]
    counts = check_num_groups(num_groups, batch)
    most = largest(num_groups, counts)
    check_labels(labels, tokens.shape[:-1], counts)
    check_mass(mass, tokens.shape[:-1])
    wanted = (*batch, most, tokens.shape[-1])
    check_out(target, wanted, tokens.dtype, tokens, labels, mass)
    merged = _merge_tokens(tokens, labels, most, mass, target)
    return _deliver(leave, merged, out, target)


def _merge_tokens(
    tokens: Any, labels: Any, num_groups: int, mass: Any, out: Any
) -> Any:
    """Return the merged tokens, in `out` if it is given and a kernel writes them."""
    if _cuda.is_cuda(tokens):
        return _merge_tokens_cuda(tokens, labels, num_groups, mass, out)
    return _merge_tokens_reference(tokens, labels, num_groups, mass)


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

    flat, group, num_rows = _flat_groups(labels, num_groups)
    weight = np.ones(labels.size) if mass is None else mass.ravel().astype(np.float64)
    weight = weight[flat]
    peak = np.zeros(num_rows)
    np.maximum.at(peak, group, weight)
    weight /= np.where(peak > 0, peak, 1)[group]  # so that no total overflows
    total = np.bincount(group, weight, num_rows)[group]
    size = np.bincount(group, minlength=num_rows)[group]
    share = np.where(total > 0, weight / np.where(total > 0, total, 1), 1 / size)
    return csr_array((share, (group, flat)), shape=(num_rows, labels.size))


def _merge_tokens_cuda(
    tokens: Any, labels: Any, num_groups: int, mass: Any, out: Any
) -> Any:
    *leading, num_tokens, dim = tokens.shape
    batch = math.prod(leading)
    if out is None:
        out = _cuda.empty((*leading, num_groups, dim), tokens.dtype)
    tokens, labels = _cuda.contiguous(tokens), _cuda.contiguous(labels, np.int32)
    mass = _cuda.contiguous(mass, _cuda.accumulation(tokens.dtype))
    sizes = batch, num_tokens, dim, num_groups
    args: tuple[Any, ...]
    if _cuda.implementation() == "basic":
        args = (tokens, mass, labels, *sizes, out)
        _cuda.launch("basic/merge_tokens", "merge_tokens", tokens.dtype, out.size, args)
        return out
    args = (tokens, mass, *_members_cuda(labels, num_groups), *sizes, out)
    kernel = "optimized/merge_tokens", "merge_tokens"
    _cuda.launch(*kernel, tokens.dtype, _cuda.vectors(out), args)
    return out


def _members_cuda(labels: Any, num_groups: int) -> tuple[Any, Any]:
    """Return where groups end, (B·K), and the tokens (B·N) of one after the other."""
    num_tokens = labels.shape[-1]
    batch = math.prod(labels.shape[:-1])
    ends = _cuda.empty((batch, num_groups), np.int32)
    members = _cuda.empty((batch, num_tokens), np.int32)
    kernel = "optimized/groups", "sort_members", np.float32
    room = _cuda.dynamic_shared_bytes(*kernel)
    runs, shared = _sort_layout(num_tokens, num_groups, room)
    counts = None
    if not shared:
        counts = _cuda.empty((batch, runs + 1, num_groups), np.int32)
    # A warp for each run, and a thread for each group.
    warps = max(runs, -(-num_groups // _cuda.WARP))
    block = min(_cuda.WARP * warps, _cuda.SORT_THREADS)
    args = (labels, batch, num_tokens, num_groups, runs, counts, ends, members)
    _cuda.launch(*kernel, batch * block, args, block=block, shared=shared)
    return ends, members


def _sort_layout(num_tokens: int, num_groups: int, room: int) -> tuple[int, int]:
    """Return how many runs of tokens are sorted at once, and bytes of shared memory.

    Each run has a warp and a count of every group. With W runs, the counts are cleared,
    read and written in 3 K W / 32 cycles (shared memory moves 128 bytes a cycle), and
    each warp places its tokens in N / (32 W) steps of about 210 cycles. The sum is
    least at W² = 70 N / K. The bytes are 0 if not even one run fits in the `room`: the
    counts are then in global memory.
    """
    steps = -(-num_tokens // _cuda.WARP)
    runs = math.isqrt(70 * num_tokens // num_groups)
    runs = max(1, min(runs, steps, _cuda.SORT_THREADS // _cuda.WARP))
    each = 4 * num_groups
    fitting = room // each - 1  # beside the counts: where each group begins
    if fitting < 1:
        return min(_GLOBAL_RUNS, steps), 0
    runs = min(runs, fitting)
    return runs, (runs + 1) * each


@on_callers_stream
def unmerge_tokens(merged: Array, labels: Array, *, out: Array | None = None) -> Array:
    """Give every token the value of its group: the gather by labels.

    Parameters
    ----------
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens; float16, bfloat16, float32 or float64.
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding, whose tokens are zero.
    out : ndarray of shape (N, D) or (B, N, D), optional
        Where to write the result: the dtype of `merged`, C-contiguous, and no memory
        of an input. JAX arrays cannot be written.

    Returns
    -------
    ndarray of shape (N, D) or (B, N, D)
        Tokens rebuilt, in the dtype of `merged`.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite or a label outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> unmerge_tokens(np.array([[3.0], [7.0]]), np.array([0, 0, 1])).ravel()
    array([3., 3., 7.])
    """
    leave, merged, labels, target = enter(merged=merged, labels=labels, out=out)
    check_tokens(merged, "merged")
    check_given("labels", labels)
    wanted = (*merged.shape[:-2], *(labels.shape[-1:] or (1,)))
    check_labels(labels, wanted, merged.shape[-2])
    wanted = (*labels.shape, merged.shape[-1])
    check_out(target, wanted, merged.dtype, merged, labels)
    if _cuda.is_cuda(merged):
        tokens = _unmerge_tokens_cuda(merged, labels, target)
    else:
        tokens = _unmerge_tokens_reference(merged, labels)
    return _deliver(leave, tokens, out, target)


def _unmerge_tokens_reference(
    merged: NDArray[Any], labels: NDArray[Any]
) -> NDArray[Any]:
    index = labels.astype(np.intp)[..., None]  # (B, N, 1)
    tokens = np.take_along_axis(merged, np.maximum(index, 0), axis=-2)  # (B, N, D)
    if (labels < 0).any():
        tokens[labels < 0] = 0
    return tokens


def _unmerge_tokens_cuda(merged: Any, labels: Any, out: Any) -> Any:
    *leading, num_groups, dim = merged.shape
    batch, num_tokens = math.prod(leading), labels.shape[-1]
    if out is None:
        out = _cuda.empty((*leading, num_tokens, dim), merged.dtype)
    arrays = _cuda.contiguous(merged), _cuda.contiguous(labels, np.int32)
    args = (*arrays, batch, num_tokens, dim, num_groups, out)
    chosen = _cuda.implementation()
    threads = out.size if chosen == "basic" else _cuda.vectors(out)
    _cuda.launch(
        f"{chosen}/unmerge_tokens", "unmerge_tokens", merged.dtype, threads, args
    )
    return out


def _deliver(leave: Any, result: NDArray[Any], out: Any, target: Any) -> Any:
    """Return the result, through the caller's `out` (inside: `target`) if given."""
    if out is None:
        return leave(result)
    if target is not result:  # a kernel has written it already
        target[...] = result
    return out


@on_callers_stream
def group_sizes(labels: Array, num_groups: Any) -> Array:
    """Number of tokens of each group.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest with 0.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        int32. Attention over merged tokens adds log(size) to its scores.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label lies outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> group_sizes(np.array([0, 1, 0, -1]), 2)
    array([2, 1], dtype=int32)
    """
    leave, labels, num_groups = enter(labels=labels, num_groups=num_groups)
    return leave(_group_sizes(labels, _check_groups(labels, num_groups)))


def _group_sizes(labels: Any, num_groups: int) -> Any:
    if _cuda.is_cuda(labels):
        return _groups_cuda("group_sizes", labels, num_groups)
    return _group_sizes_reference(labels, num_groups)


def _group_sizes_reference(labels: NDArray[Any], num_groups: int) -> NDArray[np.int32]:
    _, group, num_rows = _flat_groups(labels, num_groups)
    sizes = np.bincount(group, minlength=num_rows).astype(np.int32)
    return sizes.reshape(*labels.shape[:-1], num_groups)


@on_callers_stream
def group_positions(labels: Array, num_groups: Any) -> Array:
    """Position of each group: that of its last member.

    Parameters
    ----------
    labels : ndarray of shape (N,) or (B, N)
        Group of each token within 0..K-1, or -1 for padding.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence: then the result is padded to the largest with -1.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        int32; -1 for a group without members.

    Raises
    ------
    TypeError
        If `labels` or `num_groups` is not integer.
    ValueError
        If a shape does not fit or a label lies outside -1..K-1.

    Examples
    --------
    >>> import numpy as np
    >>> group_positions(np.array([0, 1, 0, -1]), 2)
    array([2, 1], dtype=int32)
    """
    leave, labels, num_groups = enter(labels=labels, num_groups=num_groups)
    return leave(_group_positions(labels, _check_groups(labels, num_groups)))


def _group_positions(labels: Any, num_groups: int) -> Any:
    if _cuda.is_cuda(labels):
        return _groups_cuda("group_positions", labels, num_groups)
    return _group_positions_reference(labels, num_groups)


def _group_positions_reference(
    labels: NDArray[Any], num_groups: int
) -> NDArray[np.int32]:
    flat, group, num_rows = _flat_groups(labels, num_groups)
    last = np.full(num_rows, -1, np.int32)
    np.maximum.at(last, group, (flat % labels.shape[-1]).astype(np.int32))
    return last.reshape(*labels.shape[:-1], num_groups)


def _groups_cuda(kernel: str, labels: Any, num_groups: int) -> Any:
    *leading, num_tokens = labels.shape
    batch = math.prod(leading)
    out = _cuda.empty((*leading, num_groups), np.int32)
    args = (_cuda.contiguous(labels, np.int32), batch, num_tokens, num_groups, out)
    chosen = _cuda.implementation()
    threads = out.size if chosen == "basic" else batch * _cuda.BLOCK
    _cuda.launch(f"{chosen}/groups", kernel, np.float32, threads, args)
    return out


def _check_groups(labels: NDArray[Any], num_groups: Any) -> int:
    check_given("labels", labels)
    counts = check_num_groups(num_groups, labels.shape[:-1])
    check_labels(labels, None, counts)
    return largest(num_groups, counts)


def _flat_groups(
    labels: NDArray[Any], num_groups: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return each token's place in the flat (B·N), its group in (B·K), and B·K."""
    rows = labels.reshape(-1, labels.shape[-1])  # (B, N)
    flat = np.flatnonzero(rows >= 0)
    group = rows.ravel()[flat].astype(np.intp)
    group += flat // rows.shape[-1] * num_groups
    return flat, group, len(rows) * num_groups
