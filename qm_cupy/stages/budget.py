import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_mask,
    check_num_groups,
    check_number,
    check_tokens,
    is_per_sequence,
)
from ..arrays.conversion import Array, BoolArray, IntArray, enter, on_callers_stream
from ..autodiff.dispatch import known_while_tracing, operation
from ..autodiff.operations import without_two_axes
from .saliency.token_norms import relative_norms


@known_while_tracing
@on_callers_stream
def token_budget(budget: Any, num_tokens: Any) -> Any:
    """Number of groups K that a budget means for sequences of N tokens.

    Parameters
    ----------
    budget : int, float or ndarray of int of shape (B,)
        K itself (one, or one per sequence), or the share of the tokens to keep within
        (0, 1]: K = max(1, ⌊N·share⌋).
    num_tokens : int or ndarray of int of shape (B,)
        N, or the tokens of each sequence.

    Returns
    -------
    int or ndarray of int of shape (B,)
        K, an array where either argument is one.

    Raises
    ------
    TypeError
        If the budget is neither an integer nor a float.
    ValueError
        If K is outside 1..N or the share outside (0, 1].

    Examples
    --------
    >>> token_budget(0.2, 100), token_budget(12, 100)
    (20, 12)
    >>> import numpy as np
    >>> token_budget(0.5, np.array([7, 100]))
    array([ 3, 50])
    """
    leave, counts, sizes = enter(
        {}, counts={"budget": budget, "num_tokens": num_tokens}
    )
    many = is_per_sequence(sizes)
    sizes = check_num_groups(sizes, sizes.shape if many else (), name="num_tokens")
    if isinstance(budget, float | np.floating):
        check_number("budget", budget, 0, 1, "(]")
        share = float(str(budget))  # 0.29 as it is written, of float32 too
        kept = np.floor(np.round(sizes * share, 9))  # 0.29 · 100 is 29, not 28.999…
        counts = np.maximum(kept, 1).astype(np.int64)
    else:
        alone = is_per_sequence(counts) and not many
        batch = counts.shape if alone else sizes.shape
        counts = check_num_groups(counts, batch, sizes, name="budget")
    return leave(counts) if counts.ndim else int(counts)


def kept_tokens(share: float, num_tokens: int) -> int:
    """Return K for a share of one N, as `token_budget` does, in plain arithmetic."""
    return max(1, math.floor(round(num_tokens * share * 1e9) / 1e9))


@operation(
    constants=("tokens", "mask?"),
    options=("float gamma",),
    dtype="int32",
    shapes=without_two_axes,
)
def norm_budget(
    tokens: Array, gamma: float = 0.8, *, mask: BoolArray | None = None
) -> IntArray:
    r"""Least K whose K largest token norms hold at least γ of the norm mass.

    .. math:: \min \Bigl\{ K : \sum_{i \in \operatorname{top}K} \lVert x_i \rVert
        \ge \gamma \sum_i \lVert x_i \rVert \Bigr\}

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    gamma : float, default 0.8
        Share γ of the norm mass to hold, within (0, 1].
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        int32, K of each sequence, at least 1.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` not boolean.
    ValueError
        If a shape does not fit, an entry is not finite or γ lies outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> int(norm_budget(np.array([[6.0], [1.0], [3.0]]), gamma=0.9))
    2
    """
    leave, tokens, mask = enter({"tokens": tokens, "mask": mask})
    check_tokens(tokens)
    check_mask(mask, tokens.shape[:-1])
    gamma = check_number("gamma", gamma, 0, 1, "(]")
    return leave(_norm_budget_reference(tokens, gamma, mask))


def _norm_budget_reference(
    tokens: NDArray[Any], gamma: float, mask: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    held = held_mass(tokens, mask)
    wanted = gamma * held[..., -1:] * (1 - 1e-12)  # γ is met to rounding
    return np.sum(held < wanted, axis=-1).astype(np.int32) + np.int32(1)


def held_mass(tokens: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return the norm mass that the 1, 2, ... N largest tokens hold, (B, N)."""
    norms = relative_norms(tokens, mask)
    return np.cumsum(-np.sort(-norms, axis=-1), axis=-1)
