"""Budgets: how many tokens, or groups of tokens, a sequence keeps.

B is the number of sequences, N is the number of tokens in a sequence, D is the width of
a token, and K is the number of tokens or groups to keep. In this file, the norm mass of
a set of tokens is the sum of the L2 norms ‖x_i‖ of its tokens x_i. The function
`norm_mass` returns such a sum divided by the sum of all norms.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_number, check_tokens
from ..arrays.conversion import (
    Array,
    BoolArray,
    IntArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.counts import check_num_groups, is_per_sequence
from ..autodiff.dispatch import known_while_tracing, operation
from ..autodiff.operations import without_two_axes
from .saliency.token_norms import relative_norms


@known_while_tracing
@on_callers_stream
def token_budget(budget: Any, num_tokens: Any) -> Any:
    """Return the number of groups K that a budget allows for sequences of N tokens.

    Parameters
    ----------
    budget : int, float or ndarray of int of shape (B,)
        An integer is K itself, for all sequences or for each one. A float is the ratio
        of tokens to keep, within (0, 1]: K = max(1, ⌊N·ratio⌋).
    num_tokens : int or ndarray of int of shape (B,)
        Number of tokens N, for all sequences or for each one.

    Returns
    -------
    int or ndarray of int of shape (B,)
        K; an array if one of the two arguments is an array.

    Raises
    ------
    TypeError
        If the budget is neither an integer nor a float, or N is not an integer.
    ValueError
        If K is outside 1..N, the ratio is outside (0, 1], N is less than 1, or a shape
        does not fit.

    Examples
    --------
    >>> token_budget(0.2, 100), token_budget(12, 100)
    (20, 12)
    >>> import numpy as np
    >>> token_budget(0.5, np.array([7, 100]))
    array([ 3, 50])
    """
    # `counts` and `sizes` are numbers, or arrays (B,) with one entry for each sequence.
    convert_back, counts, sizes = convert_inputs(
        {}, counts={"budget": budget, "num_tokens": num_tokens}
    )
    per_sequence = is_per_sequence(sizes)
    sizes = check_num_groups(
        sizes, sizes.shape if per_sequence else (), name="num_tokens"
    )
    if isinstance(budget, float | np.floating):
        check_number("budget", budget, 0, 1, "(]")
        # The string is the shortest decimal that gives this float, for any float type:
        # a float32 0.29 is 0.28999999… as a double, and its string is "0.29".
        ratio = float(str(budget))
        # In binary, 100 · 0.29 is 28.999999999999996. Rounding to 9 decimals before
        # the floor makes it 29.
        kept = np.floor(np.round(sizes * ratio, 9))
        counts = np.maximum(kept, 1).astype(np.int64)
    else:
        # With one K for each sequence and one N for all, only the budget gives B.
        only_budget = is_per_sequence(counts) and not per_sequence
        batch = counts.shape if only_budget else sizes.shape
        counts = check_num_groups(counts, batch, sizes, name="budget")
    return convert_back(counts) if counts.ndim else int(counts)


def kept_tokens(ratio: float, num_tokens: int) -> int:
    """Return K for one ratio and one N, as `token_budget` does, without NumPy.

    `torch.compile` and JAX trace this code.
    """
    # Rounding to 9 decimals before the floor, as in `token_budget`.
    return max(1, math.floor(round(num_tokens * ratio * 1e9) / 1e9))


@operation(
    constants=("tokens", "mask?"),
    options=("float gamma",),
    dtype="int32",
    shapes=without_two_axes,
)
def norm_budget(
    tokens: Array, gamma: float = 0.8, *, mask: BoolArray | None = None
) -> IntArray:
    r"""Return the least K whose K largest norms contain at least γ of the norm mass.

    .. math:: \min \Bigl\{ K : \sum_{i \in \operatorname{top}K} \lVert x_i \rVert
        \ge \gamma \sum_i \lVert x_i \rVert \Bigr\}

    Here topK is the set of the K tokens with the largest norms.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    gamma : float, default 0.8
        Fraction γ of the norm mass to keep, within (0, 1].
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        K of each sequence, int32, at least 1.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` is not boolean.
    ValueError
        If a shape does not fit, an entry is not finite, or γ is outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> int(norm_budget(np.array([[6.0], [1.0], [3.0]]), gamma=0.9))
    2
    """
    convert_back, tokens, mask = convert_inputs({"tokens": tokens, "mask": mask})
    mask = check_tokens(tokens, mask=mask)
    gamma = check_number("gamma", gamma, 0, 1, "(]")
    return convert_back(_norm_budget_reference(tokens, gamma, mask))


def _norm_budget_reference(
    tokens: NDArray[Any], gamma: float, mask: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    # NumPy functions accept CuPy arrays, so this code runs on a GPU too. Entry K - 1 of
    # `top_mass` is the norm mass of the K largest norms. So the entries ascend along N,
    # and the last one is the mass of all tokens.
    top_mass = top_norm_mass(tokens, mask)  # (B, N)
    # The factor 1 - 1e-12 allows for rounding: 0.07 · 100 is greater than 7 in binary.
    wanted = gamma * top_mass[..., -1:] * (1 - 1e-12)  # (B, 1)
    # The entries ascend, so K is one more than the number of entries below `wanted`.
    return np.sum(top_mass < wanted, axis=-1).astype(np.int32) + np.int32(1)


def top_norm_mass(tokens: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return the norm mass of the 1, 2, ..., N tokens with the largest norms, (B, N).

    The unit of the norms is the largest absolute value in the sequence. Callers compare
    sums with the last sum, so this unit cancels.
    """
    norms = relative_norms(tokens, mask)  # (B, N)
    # NumPy sorts ascending; the two minus signs make the order descending.
    return np.cumsum(-np.sort(-norms, axis=-1), axis=-1)
