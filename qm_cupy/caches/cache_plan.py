"""What a merge makes of the groups of a cache: keys, values and biases.

S sequences of N entries have K groups each. G is a group, k̄ its merged key, and b_j the
bias of an entry. Z_i is the logarithm of Σ_j exp(s_ij) over the scores s_ij of query i.
"""

from typing import Any, NamedTuple

import numpy as np

from ..arrays.counts import GroupCounts
from ..arrays.dtypes import accumulation_dtype
from ..stages.merging.groups import compute_group_positions, compute_group_sizes
from ..stages.merging.merge_tokens import compute_merge_tokens
from .cache_checks import Rotary
from .cache_mass import LastQueries, received_of_last
from .rotary import rotate

_MAX_EXPONENT = 600.0  # of e in float64, below its overflow
_MAX_SHIFT = 3.0  # a calibrated bias differs at most by this from log Σ e^b


class Plan(NamedTuple):
    """The groups of S sequences of N entries."""

    labels: Any  # (S, N)
    groups: GroupCounts
    mass: Any  # (S, N)
    leading: tuple[int, ...]

    def mean(self, x: Any, weighted: bool = True) -> Any:
        """Return the means (..., K, w) of x (..., N, w), weighted by mass or plain."""
        flat = x.reshape(*self.labels.shape, x.shape[-1])
        mass = self.mass if weighted else None
        merged = compute_merge_tokens(flat, self.labels, self.groups, mass=mass)
        return merged.reshape(*self.leading, -1, x.shape[-1])

    def sizes(self) -> Any:
        """Return the sizes of the groups (S, K)."""
        return compute_group_sizes(self.labels, self.groups)

    def sum(self, x: Any, sizes: Any) -> Any:
        """Return the sums (S, K) of x (..., N) over the members of each group."""
        mean = self.mean(x[..., None], weighted=False).reshape(sizes.shape)
        return mean * sizes.astype(mean.dtype)


def unrotated(keys: Any, positions: Any, rotary: Rotary | None) -> Any:
    """Return the keys before their rotation, in float32 or float64."""
    wide = keys.astype(accumulation_dtype(keys.dtype), copy=False)
    if rotary is None:
        return wide
    return rotate(wide, positions, *rotary_arguments(rotary), inverse=True)


def rotated_means(
    plan: Plan, straight: Any, positions: Any, rotary: Rotary | None, at: str
) -> Any:
    """Return means of the unrotated keys, rotated to one member (..., K, d).

    `at` is "first" or "last": the member.
    """
    num_entries = straight.shape[-2]
    labels = plan.labels
    if at == "first":
        # The last member in reverse order.
        backwards = compute_group_positions(labels[:, ::-1], plan.groups)
        member = num_entries - 1 - backwards
    else:
        member = compute_group_positions(labels, plan.groups)
    member = np.clip(member, 0, num_entries - 1)  # padded groups have none
    every = np.broadcast_to(positions, straight.shape[:-1]).reshape(labels.shape)
    where = np.take_along_axis(every, member.astype(np.int64), -1)
    return rotate(
        plan.mean(straight),
        where.reshape(*plan.leading, -1),
        *rotary_arguments(rotary),
    )


def summed_bias(plan: Plan, bias: Any, sizes: Any) -> Any:
    """Return log Σ e^b of each group (..., K), and -inf for padded groups."""
    dtype = plan.mass.dtype
    summed = np.log(np.maximum(sizes, 1).astype(dtype))
    if bias is not None:
        # Relative to the mean of its group, so that no sum overflows or vanishes, and
        # an entry that does not merge keeps the bits of its bias.
        b = np.where(np.isfinite(bias), bias, bias.dtype.type(0)).astype(np.float64)
        centre = plan.mean(b[..., None], weighted=False)[..., 0]
        label = np.maximum(plan.labels, 0).astype(np.int64).reshape(b.shape)
        shift = b - np.take_along_axis(centre, label, -1)
        total = plan.sum(np.exp(np.clip(shift, -_MAX_EXPONENT, _MAX_EXPONENT)), sizes)
        summed = np.log(np.where(total > 0, total, 1.0)) + centre.reshape(sizes.shape)
        summed = summed.astype(dtype)
    return np.where(sizes > 0, summed, dtype.type(-np.inf)).reshape(*plan.leading, -1)


def calibrated_bias(
    plan: Plan, last: LastQueries, received: Any, keys: Any, bias: Any, sizes: Any
) -> Any:
    """Return the biases (..., K) with which merged keys get their members' attention.

    Where the attention is too small to say so, and for entries that did not merge, the
    bias stays `bias`.
    """
    wanted = plan.sum(received.astype(plan.mass.dtype), sizes)
    without = received_of_last(last._replace(causal=False), keys, None, None)
    without = without.reshape(wanted.shape).astype(wanted.dtype)
    tiny = wanted.dtype.type(np.finfo(np.float32).tiny * 2**20)
    known = (wanted > tiny) & (without > tiny) & (sizes > 1)
    flat = bias.reshape(wanted.shape)
    ratio = np.where(known, wanted, tiny) / np.where(known, without, tiny)
    base = np.where(known, flat, wanted.dtype.type(0))
    shift = np.clip(np.log(ratio) - base, -_MAX_SHIFT, _MAX_SHIFT)
    return np.where(known, base + shift, flat).reshape(bias.shape)


def rotary_arguments(rotary: Rotary | None) -> tuple[Any, ...]:
    """Return the arguments of `rotate` after the positions."""
    assert rotary is not None
    return tuple(rotary)
