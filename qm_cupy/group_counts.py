"""How many groups `quickmerge` makes: K from a budget, or from labels.

There are B sequences of N tokens, and K groups in a sequence.
"""

import sys
from typing import Any

import numpy as np

from .arrays.conversion import convert_inputs
from .arrays.counts import GroupCounts, check_group_counts
from .arrays.shapes import num_valid
from .cuda.device import to_host
from .stages.budget import check_budget_type, exact_fraction, is_ratio, token_budget
from .stages.clustering.checks import check_protect


def num_groups_of(
    shape: tuple[int, ...], budget: Any, protect: Any, method: str, mask: Any
) -> GroupCounts:
    """Return K of every sequence, for converted arrays; `shape` is (N,) or (B, N)."""
    limit = num_valid(shape, mask)
    check_budget_type(budget)
    wanted = token_budget(budget, limit) if is_ratio(budget) else budget
    num_groups = check_group_counts(wanted, shape[:-1], limit, name="budget")
    check_protect(protect, method, num_groups.counts, shape, mask, "budget")
    return num_groups


def traced_num_groups(framework: str, budget: Any, num_tokens: Any, mask: Any) -> Any:
    """Return K, or K of each sequence, for a budget.

    `torch.compile` traces through this code, so it uses only plain arithmetic and
    tensor operations.
    """
    if framework == "jax":
        from .autodiff.jax_operators import check_known

        check_known("budget", budget)  # JAX needs every shape while it traces
    # The usual case needs no conversion: `token_budget` would return the same K.
    if type(budget) is int and 1 <= budget <= num_tokens:
        return budget
    if is_ratio(budget):
        if framework == "jax" and mask is not None:
            check_known("mask", mask)  # K depends on the number of valid tokens
            return token_budget(budget, np.asarray(mask).sum(axis=-1))
        ratio = _traced_ratio(budget)
        if not 0 < ratio <= 1:
            exact_fraction(ratio)  # raises
        # max(1, ⌊N · r⌋) for each N, as in `exact_fraction`: the fraction is at most
        # 2⁻⁵² above the float r. N and r may be symbols.
        factor = ratio + 2.0**-52
        if mask is None:
            return max(1, int(num_tokens * factor))
        return (mask.sum(-1).double() * factor).floor().clamp(min=1).long()  # (B,)
    check_budget_type(budget)
    if hasattr(budget, "shape"):
        return budget  # an array (B,); the stage functions check its values
    return token_budget(budget, num_tokens)  # converts other numbers, or raises


def _traced_ratio(ratio: Any) -> Any:
    """Return a ratio as a float; raise if the compiler does not know its value."""
    if isinstance(ratio, float):
        return ratio
    torch = sys.modules.get("torch")
    is_array = hasattr(ratio, "__dlpack__")
    if is_array and torch is not None and torch.compiler.is_compiling():
        raise TypeError(
            "`budget` must be a number while torch compiles, got a tensor: pass a "
            "Python float"
        )
    if is_array:
        ratio = convert_inputs({}, counts={"budget": ratio})[1]
    numerator, denominator = exact_fraction(ratio)
    return numerator / denominator


def counted_groups(labels: Any) -> GroupCounts:
    """Return K of every sequence from its labels (N,) or (B, N).

    For labels on a GPU, the CPU waits.
    """
    counts = np.asarray(to_host(labels.max(axis=-1) + 1), np.int64)  # () or (B,)
    return GroupCounts(counts, int(counts.max(initial=0)))
