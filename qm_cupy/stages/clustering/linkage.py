"""Dendrograms of tokens.

On the CPU they are computed by SciPy, or by `weighted_linkage` if tokens have masses.
linkage_cuda.py computes them on a GPU.

A dendrogram (N - 1, 4) has SciPy's format. A row is a merge: two groups, their distance
(the height of the merge), and the number of tokens in the new group. Tokens are groups
0..N-1, and row r makes group N + r. With a mask, tokens keep the numbers of the padded
sequence. If n of its N tokens are valid, the first n - 1 rows are merges, and the other
rows are (-1, -1, inf, 0).
"""

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_choice, check_mass, check_tokens
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.libraries import is_cuda
from ...cuda.constants import LEAST_MASS
from ...progress import span
from .checks import check_mass_method
from .clustering_memory import IN_PLACE, check_linkage_memory
from .linkage_cuda import dendrograms_cuda
from .metrics import METRICS, Metric, half_squared_distances, metric_vectors
from .weighted_linkage import Floats, weighted_linkage

# A row without a merge: no groups, an infinite distance, no tokens.
PADDED_ROW = (-1.0, -1.0, np.inf, 0.0)


LinkageMethod = Literal["average", "ward", "complete", "single"]
LINKAGES: tuple[LinkageMethod, ...] = get_args(LinkageMethod)


@on_callers_stream
def linkage(
    tokens: Array,
    method: LinkageMethod = "average",
    *,
    metric: Metric = "cosine",
    mass: FloatArray | None = None,
    mask: BoolArray | None = None,
) -> FloatArray:
    r"""Return the dendrogram of each sequence's tokens by cosine or distance.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    method : {"average", "ward", "complete", "single"}, default "average"
        Distance between groups.
    metric : {"cosine", "euclidean"}, default "cosine"
        Distance between two tokens. "cosine": 1 - cos, or for "ward" without masses
        √(2 - 2 cos), the distance of their unit vectors. "euclidean": the distance of
        the tokens, ‖x - y‖.
    mass : ndarray of shape (N,) or (B, N), optional
        For "average" and "ward": a token of mass w counts as w equal tokens. A mass
        below a millionth of the sequence's largest mass counts as that millionth, so
        that a token of mass 0 still joins its nearest group. If all masses are 0, each
        counts as 1.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token.

    Returns
    -------
    ndarray of shape (N - 1, 4) or (B, N - 1, 4)
        float64, in SciPy's format. Each row is a merge, in the order of distance: the
        two groups that merge (tokens are 0..N-1, row r makes group N + r), their
        distance, and the number of tokens in the new group. If a mask keeps n tokens,
        the first n - 1 rows are merges and all other rows are (-1, -1, inf, 0).

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If a shape is wrong, an entry is not finite, a mass is negative, masses are
        given for another method, a sequence has no tokens, or `method` or `metric` is
        unknown.
    MemoryError
        If the CPU has not enough memory.

    See Also
    --------
    scipy.cluster.hierarchy.linkage : The same dendrogram from given distances.

    Notes
    -----
    Let w be the masses, W_A the sum of the masses of group A, d the distance of two
    tokens, and μ_A the weighted mean of the unit tokens of A (of its tokens for
    "euclidean"). The average distance is

    .. math:: \frac{1}{W_A W_C} \sum_{i \in A, j \in C} w_i w_j d_{ij}

    and Ward's distance is

    .. math:: \sqrt{\frac{2 W_A W_C}{W_A + W_C}} \lVert \mu_A - \mu_C \rVert.

    On the CPU, the computation handles one sequence at a time, and needs about 8 N²
    bytes of memory (12 N² up to 1024 tokens without masses), and 8 N D bytes at first.
    If they are not available, it raises a MemoryError before the work. On a GPU, one
    launch handles as many sequences as fit in three quarters of the free memory. The
    cosines of a sequence need 4 N² bytes there, or 8 N² for float64 tokens. Euclidean
    distances are computed from products of tokens, so rounding limits them. A distance
    below 2e-7 of the distances of both tokens to the mean token counts as 0. On a GPU,
    this limit is 0.2 % (except for float64 tokens), and for ward it is relative to the
    largest distance to the mean; for 16-bit tokens, the norms replace the distances to
    the mean. At equal distances the order of merges follows a fixed rule, so the same
    call always gives the same dendrogram. On a GPU, and with masses, the rule is not
    SciPy's.

    Examples
    --------
    >>> import numpy as np
    >>> linkage(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    array([[0., 1., 0., 2.],
           [2., 3., 1., 3.]])
    """
    convert_back, tokens, mass, mask = convert_inputs(
        {"tokens": tokens, "mass": mass, "mask": mask}
    )
    mask = check_tokens(tokens, mask=mask)
    check_choice("method", method, LINKAGES)
    check_choice("metric", metric, METRICS)
    check_mass_method(mass, method)
    check_mass(mass, tokens.shape[:-1], mask=mask)
    if is_cuda(tokens):
        return convert_back(dendrograms_cuda(tokens, method, mass, mask, metric=metric))
    check_linkage_memory(tokens.shape, method, mass is not None)
    return convert_back(linkage_reference(tokens, method, metric, mass, mask))


def linkage_reference(
    tokens: NDArray[Any],
    method: str,
    metric: str,
    mass: NDArray[Any] | None,
    mask: NDArray[np.bool_] | None,
) -> Floats:
    """Return the dendrograms (B, N - 1, 4) of tokens (B, N, D)."""
    *batch, num_tokens, _ = tokens.shape
    dendrogram = np.empty((*batch, num_tokens - 1, 4))
    count = math.prod(batch)
    for number, index in enumerate(np.ndindex(*batch)):
        x, sequence_mass = tokens[index], None if mass is None else mass[index]
        if mask is not None:  # remove the padding
            position = np.flatnonzero(mask[index])
            x = x[position]
            sequence_mass = None if sequence_mass is None else sequence_mass[position]
        with span(number / count, (number + 1) / count):
            tree = linkage_sequence(x, method, metric, sequence_mass)
        if mask is None:
            dendrogram[index] = tree
            continue
        # Replace the numbers of tokens and groups by their numbers in the padded
        # sequence.
        node = np.concatenate((position, num_tokens + np.arange(len(tree))))
        dendrogram[index] = PADDED_ROW  # all rows, then the n - 1 merges
        dendrogram[index][: len(tree), :2] = node[tree[:, :2].astype(np.intp)]
        dendrogram[index][: len(tree), 2:] = tree[:, 2:]
    return dendrogram


def linkage_sequence(
    tokens: NDArray[Any], method: str, metric: str, mass: NDArray[Any] | None = None
) -> Floats:
    """Return the dendrogram (N - 1, 4) of one sequence without padding."""
    # One token has no merge, and SciPy would raise.
    if len(tokens) == 1:
        return np.empty((0, 4))
    vectors, unit = metric_vectors(tokens, metric)
    # The times per pair of tokens: 6 ns and 0.02 ns for each component for distances,
    # 12 ns for SciPy's linkage, and about 50 ns for rounds.
    cost = 300 + tokens.shape[-1]
    distance_part = cost / (cost + (600 if mass is None else 2500))
    with span(0, distance_part):
        distance = half_squared_distances(vectors, metric)  # 1 - cos for "cosine"
    del vectors  # the linkage needs the memory
    if mass is None:
        distance = above_diagonal(distance)
    # ‖x - y‖ = √(2 · ½‖x - y‖²). `weighted_linkage` takes ½‖x - y‖² for ward and
    # computes ward's distances itself.
    by_root = mass is None if method == "ward" else metric == "euclidean"
    if by_root:
        distance *= 2
        np.sqrt(distance, out=distance)
    with span(distance_part, 1):
        tree = _tree(distance, method, mass)
    with np.errstate(over="ignore"):
        tree[:, 2] *= unit  # the distances were those of the vectors
    if np.isinf(tree[:, 2]).any():  # ward's heights can exceed all distances
        raise ValueError(
            "`tokens` or `mass` are too large: the heights exceed the range of "
            f"float64, got entries up to {np.abs(tokens).max():.3g}"
        )
    return tree


def above_diagonal(square: Floats) -> Floats:
    """Return the entries of a matrix (N, N) above its diagonal, row after row.

    This is the form of distances that SciPy reads. `square` must not be used again.
    """
    # Imported here, because at the top it would double the time of `import qm_cupy`.
    from scipy.spatial.distance import squareform

    num_rows = len(square)
    if num_rows <= IN_PLACE:
        return squareform(square, checks=False)  # needs another 4 N² bytes
    # The entries move towards the start of the memory, so none is overwritten before it
    # has moved. Then the second half of the memory is given back.
    flat, stop = square.reshape(-1), 0
    for row in range(num_rows - 1):
        start, stop = stop, stop + num_rows - 1 - row
        flat[start:stop] = square[row, row + 1 :]
    del flat
    square.resize(stop, refcheck=False)
    return square


def _tree(distance: Floats, method: str, mass: NDArray[Any] | None) -> Floats:
    """Return the dendrogram of distances above the diagonal, or (N, N) with masses."""
    # Imported here, for the same reason as above.
    from scipy.cluster import hierarchy

    tree: Floats
    if mass is None:
        tree = hierarchy.linkage(distance, method)
        return tree
    # SciPy does not support masses. The masses are divided by the largest one, so that
    # their products neither overflow nor vanish. This division divides ward's distances
    # by the root of the largest mass, so ward's heights are multiplied by this root. An
    # average distance does not change by this division.
    relative, peak = relative_mass(mass)
    tree, _ = weighted_linkage(distance, relative, method)
    tree[:, 2] *= np.sqrt(peak) if method == "ward" else 1
    return tree


def relative_mass(
    mass: NDArray[Any], free: NDArray[np.bool_] | None = None
) -> tuple[Floats, float]:
    """Return the masses (N,) divided by the largest mass, all > 0, and this mass.

    With `free` (N,), the largest mass is that of the free tokens.
    """
    peak = float(mass.max() if free is None else mass[free].max())
    # If all masses are 0, each token counts as 1.
    if peak == 0:
        return np.ones(len(mass)), 1.0
    return np.maximum(mass.astype(np.float64) / peak, LEAST_MASS), peak
