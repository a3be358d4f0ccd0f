"""The weights of the members of groups in their means, for the NumPy references.

There are B sequences of N tokens, and K groups in each sequence. m_j is the mass of
token j, k is its group, and W_k is the mass of the group.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .groups import flat_groups


def member_weights(
    labels: NDArray[Any], num_groups: int, mass: NDArray[Any] | None
) -> Any:
    """Return m_j / W_k of each token in its group, as a csr_array (B·K, B·N)."""
    # Imported here: at the top of the file it doubles the time of `import qm_cupy`.
    from scipy.sparse import csr_array

    # The matrix has num_rows = B·K rows. Below, arrays have one entry for each token
    # that is not padding.
    flat, group, num_rows = flat_groups(labels, num_groups)
    masses = np.ones(labels.size) if mass is None else mass.ravel().astype(np.float64)
    masses = masses[flat]
    # Divide the masses of a group by the largest of them, which cancels in m_j / W_k.
    # Then no total overflows or becomes 0.
    largest = np.zeros(num_rows)  # (B·K,)
    np.maximum.at(largest, group, masses)
    masses /= np.where(largest > 0, largest, 1)[group]
    # W_k and |G_k| of the group of each token
    total = np.bincount(group, masses, num_rows)[group]
    size = np.bincount(group, minlength=num_rows)[group]
    # A group of mass 0 gets the plain mean: weights 1 / |G_k|.
    weights = np.where(total > 0, masses / np.where(total > 0, total, 1), 1 / size)
    return csr_array((weights, (group, flat)), shape=(num_rows, labels.size))


def clip_to_members(merged: NDArray[Any], weights: Any, tokens: NDArray[Any]) -> None:
    """Limit means that are not finite to the range of their members, in place.

    Rounding can put a mean of the largest numbers of a dtype above them.
    """
    for k in np.flatnonzero(~np.isfinite(merged).all(axis=-1)):
        members = tokens[weights.indices[weights.indptr[k] : weights.indptr[k + 1]]]
        merged[k] = np.clip(merged[k], members.min(axis=0), members.max(axis=0))
