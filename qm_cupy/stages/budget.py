"""Budgets: how many tokens, or groups of tokens, a sequence keeps.

B is the number of sequences, N is the number of tokens in a sequence, D is the width of
a token, and K is the number of tokens or groups to keep. In this file, the norm mass of
a set of tokens is the sum of the L2 norms ‖x_i‖ of its tokens x_i. The function
`norm_mass` returns such a sum divided by the sum of all norms.
"""

import functools
import math
from decimal import Decimal
from fractions import Fraction
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
    budget : number or ndarray of int of shape (B,)
        An integer K, one K for each sequence, or a ratio r within (0, 1] of the tokens:
        a float of any width, a `Fraction` or a `Decimal`. For a ratio,
        K = max(1, ⌊N · r⌋). A float means the fraction that it was rounded from: of all
        fractions that round to it, the one with the smallest denominator. So 0.29 of
        100 tokens is 29, and ``np.float32(1) / 9`` of 18 tokens is 2. For float64 the
        fraction lies within 2⁻⁵² of the float, so that ``1 - 0.9`` means 0.1. Arrays
        without axes count as numbers.
    num_tokens : int or ndarray of int of shape (B,)
        N, or N of each sequence.

    Returns
    -------
    int or ndarray of int64 of shape (B,)
        K, or K of each sequence if one argument is an array.

    Raises
    ------
    TypeError
        If the budget is not a real number, or N is not an integer.
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
    counts = groups_within(counts, sizes)
    return convert_back(counts) if counts.ndim else int(counts)


def groups_within(budget: Any, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return K () or (B,) for a converted budget; `sizes` are N, () or (B,)."""
    if is_ratio(budget):
        numerator, denominator = exact_fraction(budget)
        return np.maximum(sizes * numerator // denominator, 1)
    check_budget_type(budget)
    # With one K for each sequence and one N for all, only the budget gives B.
    only_budget = is_per_sequence(budget) and not sizes.ndim
    batch = budget.shape if only_budget else sizes.shape
    return check_num_groups(budget, batch, sizes, name="budget")


def check_budget_type(budget: Any) -> None:
    """Raise unless a converted budget is a number or an array."""
    if not is_ratio(budget) and not hasattr(budget, "__index__"):
        raise TypeError(
            "`budget` must be an integer K, a fraction of the tokens such as 0.25, or "
            f"an array of integers, got {type(budget).__name__}"
        )


def is_ratio(budget: Any) -> bool:
    """Return whether a budget is a fraction of the tokens, not a count."""
    if isinstance(budget, float | Fraction | Decimal):
        return True
    # The dtypes of all libraries have names such as "float32" and "torch.bfloat16".
    return getattr(budget, "shape", None) == () and "float" in str(budget.dtype)


@known_while_tracing
def exact_fraction(ratio: Any) -> tuple[int, int]:
    """Return numerator and denominator of a ratio r within (0, 1].

    The denominator is at most 2³¹, so that products with a number of tokens fit int64.
    """
    number: Any = ratio[()] if isinstance(ratio, np.ndarray) else ratio
    return _fraction(number)


# Cached, because the search takes longer than all other checks of `quickmerge`. The
# type is part of the key: np.float32(0.3) may be the fraction 3/10, and 0.30000001192
# is another one.
@functools.lru_cache(maxsize=256, typed=True)
def _fraction(ratio: Any) -> tuple[int, int]:
    is_exact = isinstance(ratio, Fraction | Decimal)
    try:
        exact = Fraction(ratio if is_exact else float(ratio))
    except (ValueError, OverflowError):  # NaN and infinities have no fraction
        exact = Fraction(-1)
    if not 0 < exact <= 1:
        hint = f": pass {int(exact)} for {int(exact)} groups" if exact >= 2 else ""
        raise ValueError(
            "`budget` must lie in (0, 1] if it is a fraction of the tokens, got "
            f"{ratio}{hint}"
        )
    if not is_exact:
        # All numbers within half a unit of the last place round to this float. For
        # float64 the interval is a little wider: `1 - 0.9` is not the float nearest
        # to 0.1.
        above = float(np.nextafter(ratio, type(ratio)(2)))
        half_unit = max((Fraction(above) - exact) / 2, Fraction(1, 2**52))
        exact = _simplest(exact - half_unit, exact + half_unit)
    exact = exact.limit_denominator(2**31)
    return exact.numerator, exact.denominator


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction with the smallest denominator within [low, high]."""
    # The continued fractions of both limits agree up to some term. The simplest
    # fraction has the common terms, and then the smallest term that is possible.
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    below = whole - 1
    return below + 1 / _simplest(1 / (high - below), 1 / (low - below))


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
        Boolean or integer, True or 1 = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        K of each sequence, int32, at least 1.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` is not boolean or integer.
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
