"""Dendrograms: grown by SciPy, or by rounds where tokens have masses.

Rows are SciPy's: two groups, their distance, the tokens of the new group. Under a mask
tokens keep their places in the padded sequence, row r makes group N + r, and the rows
that padding leaves over are (-1, -1, inf, 0).
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_choice, check_mask, check_mass, check_tokens
from ...arrays.conversion import Array, BoolArray, FloatArray, enter, on_callers_stream
from ...arrays.libraries import is_cuda
from ...cuda.constants import LEAST_MASS
from .checks import check_mass_method
from .cosine_similarity import gram
from .linkage_cuda import dendrograms_cuda
from .unit_tokens import unit_tokens
from .weighted_linkage import Floats, weighted_linkage

PADDED_ROW = (-1.0, -1.0, np.inf, 0.0)


LinkageMethod = Literal["average", "ward", "complete", "single"]
LINKAGES: tuple[LinkageMethod, ...] = get_args(LinkageMethod)


@on_callers_stream
def linkage(
    tokens: Array,
    method: LinkageMethod = "average",
    *,
    mass: FloatArray | None = None,
    mask: BoolArray | None = None,
) -> FloatArray:
    r"""Dendrogram of each sequence's tokens by cosine similarity, in SciPy's format.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    method : {"average", "ward", "complete", "single"}, default "average"
        Distance between groups. Between tokens it is 1 - cos, for ward √(2 - 2 cos),
        the distance of unit vectors.
    mass : ndarray of shape (N,) or (B, N), optional
        For "average" and "ward": a token of mass w counts as w equal tokens. What is
        below a millionth of the sequence's largest mass counts as that millionth, so
        that a token of no mass still joins its nearest; if all are 0, as 1 each.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean, True = token.

    Returns
    -------
    ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        float64, a merge a row, nearest first: the two groups merged (tokens are
        0..N-1, row r makes group N + r), their distance, the tokens of the new group.
        n tokens that a mask keeps have n - 1 rows, and (-1, -1, inf, 0) follows.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a mass is negative or for
        another method, a sequence has no tokens, or there is no such method.

    See Also
    --------
    scipy.cluster.hierarchy.linkage : The algorithm, after the distances.

    Notes
    -----
    With weights w, sums W_A of them and weighted means μ_A of unit tokens, the average
    distance is

    .. math:: \frac{1}{W_A W_C} \sum_{i \in A, j \in C} w_i w_j (1 - \cos_{ij})

    and ward's

    .. math:: \sqrt{\frac{2 W_A W_C}{W_A + W_C}} \lVert \mu_A - \mu_C \rVert.

    Takes 16 N² bytes or so for each sequence in turn. Equal distances are taken in an
    order that depends on the tokens alone.

    Examples
    --------
    >>> import numpy as np
    >>> linkage(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    array([[0., 1., 0., 2.],
           [2., 3., 1., 3.]])
    """
    leave, tokens, mass, mask = enter({"tokens": tokens, "mass": mass, "mask": mask})
    check_tokens(tokens)
    check_choice("method", method, LINKAGES)
    check_mask(mask, tokens.shape[:-1])
    check_mass_method(mass, method)
    check_mass(mass, tokens.shape[:-1])
    if is_cuda(tokens):
        return leave(dendrograms_cuda(tokens, method, mass, mask))
    return leave(linkage_reference(tokens, method, mass, mask))


def linkage_reference(
    tokens: NDArray[Any],
    method: str,
    mass: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
) -> Floats:
    """Return the dendrograms (B, N - 1, 4) of tokens (B, N, D)."""
    *batch, num_tokens, _ = tokens.shape
    dendrogram = np.empty((*batch, num_tokens - 1, 4))
    for index in np.ndindex(*batch):
        weight = None if mass is None else mass[index]
        if mask is None:
            dendrogram[index] = linkage_sequence(tokens[index], method, weight)
            continue
        place = np.flatnonzero(mask[index])
        weight = None if weight is None else weight[place]
        tree = linkage_sequence(tokens[index][place], method, weight)
        node = np.concatenate((place, num_tokens + np.arange(len(tree))))
        dendrogram[index] = PADDED_ROW
        dendrogram[index][: len(tree), :2] = node[tree[:, :2].astype(np.intp)]
        dendrogram[index][: len(tree), 2:] = tree[:, 2:]
    return dendrogram


def linkage_sequence(
    tokens: NDArray[Any], method: str, mass: NDArray[Any] | None = None
) -> Floats:
    """Return the dendrogram (N - 1, 4) of one sequence without padding."""
    # Here, or `import qm_cupy` takes twice as long.
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(tokens) == 1:
        return np.empty((0, 4))
    unit = unit_tokens(tokens.astype(np.float64))
    distance = np.empty((len(unit), len(unit)))
    gram(unit, distance)
    if mass is None:
        distance = squareform(distance, checks=False)  # what is above the diagonal
    np.subtract(1, distance, out=distance)
    np.clip(distance, 0, 2, out=distance)
    if mass is not None:
        weight, peak = relative_mass(mass)
        tree, _ = weighted_linkage(distance, weight, method)
        tree[:, 2] *= np.sqrt(peak) if method == "ward" else 1
        return tree
    if method == "ward":
        distance *= 2
        np.sqrt(distance, out=distance)
    found: Floats = hierarchy.linkage(distance, method)
    return found


def relative_mass(mass: NDArray[Any]) -> tuple[Floats, float]:
    """Return masses (N,) over the largest, none of them 0, and the largest."""
    peak = float(mass.max())
    if peak == 0:
        return np.ones(len(mass)), 1.0
    return np.maximum(mass.astype(np.float64) / peak, LEAST_MASS), peak
