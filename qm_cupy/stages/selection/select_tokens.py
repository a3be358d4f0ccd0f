"""Selection of the K tokens with the highest scores.

N is the number of tokens in a sequence; B is the number of sequences. `counts` (B,)
holds K of every sequence, and `max_groups` is the largest K. Names call K a number of
groups, because a budget counts tokens or groups (budget.py). `top_tokens_cuda` gets
`counts` on the GPU, or None if all K are equal.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_finite_values, check_layout, check_mask
from ...arrays.conversion import Array, BoolArray, IntArray, convert_inputs
from ...arrays.counts import GroupCounts, check_group_counts
from ...arrays.libraries import is_cuda
from ...arrays.shapes import num_valid, rows_of
from ...autodiff.dispatch import operation
from ...autodiff.operations import groups_of_tokens
from ...cuda.constants import SELECTION_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, counts_on_device, launch
from .perturbed_scores import perturbed_scores_cuda


@operation(
    constants=("scores", "mask?"),
    count_parameter="num_groups",
    dtype="int32",
    shapes=groups_of_tokens,
)
def select_tokens(
    scores: Array, num_groups: Any, *, mask: BoolArray | None = None
) -> IntArray:
    """Return the positions of the K highest scores of each sequence, ascending.

    Parameters
    ----------
    scores : ndarray of shape (N,) or (B, N)
        A score for each token, such as the saliency; float16, bfloat16, float32 or
        float64.
    num_groups : int or ndarray of int of shape (B,)
        Number of tokens K to select, for all sequences or for each one.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens are never selected.

    Returns
    -------
    ndarray of shape (K,) or (B, K)
        Positions, int32. Of equal scores, the lower index is selected. With one K per
        sequence, rows are padded with -1 to the largest K.

    Raises
    ------
    TypeError
        If `scores` is not floating, `mask` is not boolean or integer, or `num_groups`
        is not integer.
    ValueError
        If a shape does not fit, an entry is not finite, or K is greater than the number
        of tokens.

    Examples
    --------
    >>> import numpy as np
    >>> select_tokens(np.array([0.1, 0.9, 0.3, 0.9]), 2)
    array([1, 3], dtype=int32)
    """
    convert_back, scores, mask, num_groups = convert_inputs(
        {"scores": scores, "mask": mask}, counts={"num_groups": num_groups}
    )
    check_layout("scores", scores, "N", "BN")
    mask = check_mask(mask, scores.shape)
    check_finite_values("scores", scores, mask)
    # K is at most the number of tokens of its sequence. `limit` is this number:
    # N without a mask, or an array (B,) with a mask.
    limit = num_valid(scores.shape, mask)
    groups = check_group_counts(num_groups, scores.shape[:-1], limit)
    return convert_back(compute_select_tokens(scores, groups, mask=mask))


def compute_select_tokens(
    scores: Any, num_groups: GroupCounts, *, mask: Any = None
) -> Any:
    """Return the positions for scores that are already converted and checked."""
    if is_cuda(scores):
        return _select_tokens_cuda(scores, *num_groups, mask)
    return select_tokens_reference(scores, *num_groups, mask)


def select_tokens_reference(
    scores: NDArray[Any],
    counts: NDArray[np.int64],
    max_groups: int,
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.int32]:
    """Return positions (B, K), ascending; a row with a smaller K ends with -1."""
    selected = top_tokens_reference(scores, counts, mask)  # (B, N)
    # False sorts before True, so the sort of `~selected` puts selected tokens first.
    # The sort is stable, so the selected tokens are in index order.
    positions = np.argsort(~selected, axis=-1, stable=True)[..., :max_groups]  # (B, K)
    padded = np.arange(max_groups) >= counts[..., None]  # (B, K)
    return np.where(padded, -1, positions).astype(np.int32)


def _select_tokens_cuda(
    scores: Any, counts: NDArray[np.int64], max_groups: int, mask: Any
) -> Any:
    # With seed None there is no noise: `perturbed_scores_cuda` only converts the scores
    # to the accumulation dtype and sets padding to -inf.
    scores = perturbed_scores_cuda(scores, (None, 0), mask)
    return selected_positions_cuda(
        top_tokens_cuda(scores, *counts_on_device(counts)), max_groups
    )


def top_tokens_reference(
    scores: NDArray[Any], counts: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Return a mask (B, N) of the K highest scores of each sequence.

    Of equal scores, the lower index is selected.
    """
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)  # padding comes last
    # The minus sign makes the order descending. A stable sort keeps equal scores in
    # index order.
    order = np.argsort(-scores, axis=-1, stable=True)
    selected = np.zeros(scores.shape, np.bool_)
    # order[n] is the token of rank n; the ranks below K are selected.
    rank_is_selected = np.arange(scores.shape[-1]) < counts[..., None]  # (B, N)
    np.put_along_axis(selected, order, rank_is_selected, axis=-1)
    return selected


def top_tokens_cuda(scores: Any, counts: Any, max_groups: int) -> Any:
    """Return a mask (B, N) of the K highest scores of each sequence.

    The scores of padding must be below the scores of all tokens.
    """
    out = empty(scores.shape, np.bool_)
    batch, num_tokens = rows_of(scores)
    args = (scores, counts, batch, num_tokens, max_groups, out)
    kernel = "select_tokens", "top_tokens"
    # The block of a sequence finds its K-th highest score by radix selection, with a
    # thread for each token up to SELECTION_THREADS. The basic kernel has a thread for
    # each token.
    block = block_size(num_tokens, SELECTION_THREADS)
    launch(*kernel, scores.dtype, args, outputs=out.size, blocks=batch, block=block)
    return out


def selected_positions_cuda(selected: Any, max_groups: int) -> Any:
    """Return the positions (B, K) of selected tokens, ascending and padded with -1."""
    out = empty((*selected.shape[:-1], max_groups), np.int32)
    batch, num_tokens = rows_of(selected)
    args = (selected, batch, num_tokens, max_groups, out)
    # The block of a sequence counts the selected tokens before each token. The basic
    # kernel has a thread for each position.
    kernel = "select_tokens", "select_tokens"
    block = block_size(num_tokens, SELECTION_THREADS)
    # The kernel reads no floats, so one dtype is enough: it is compiled for float32.
    launch(*kernel, np.float32, args, outputs=out.size, blocks=batch, block=block)
    return out
