"""Norm mass: the sum of the K largest token norms, divided by the sum of all.

x_i is token i, and ‖x_i‖ is its norm. X is the matrix of all tokens of a sequence, and
γ(X, K) is this quotient. In fidelity_loss.py and budget.py, the norm mass is the sum of
the norms, without a division, and γ is a fraction of it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_tokens
from ...arrays.conversion import Array, BoolArray, convert_inputs, on_callers_stream
from ...arrays.counts import check_num_groups
from ...arrays.libraries import is_cuda
from ...arrays.shapes import num_valid
from ...cuda.device import empty
from ...cuda.launch import counts_on_device, launch
from ..budget import top_norm_mass
from ..saliency.token_norms import token_norms_cuda
from ..selection.select_tokens import top_tokens_cuda


@on_callers_stream
def norm_mass(
    tokens: Array, num_groups: Any, *, mask: BoolArray | None = None
) -> Array:
    r"""Return the sum of the K largest token norms, divided by the sum of all: γ.

    X are the tokens of a sequence, and :math:`x_i` is token i.

    .. math:: \gamma(X, K) = \sum_{i \in \operatorname{top}K} \lVert x_i \rVert \Big/
        \sum_i \lVert x_i \rVert

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    num_groups : int or ndarray of int of shape (B,)
        K, or K of each sequence.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token. Padded tokens do not count.

    Returns
    -------
    ndarray of shape () or (B,)
        γ within (0, 1]; float32, or float64 for float64 input. For a sequence of zeros
        γ is 1: there is no mass to lose.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, or K exceeds the number of
        tokens.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm_mass(np.array([[4.0], [1.0], [3.0]]), 2))
    0.875
    """
    convert_back, tokens, mask, num_groups = convert_inputs(
        {"tokens": tokens, "mask": mask}, counts={"num_groups": num_groups}
    )
    mask = check_tokens(tokens, mask=mask)
    limit = num_valid(tokens.shape[:-1], mask)  # the largest K
    counts = check_num_groups(num_groups, tokens.shape[:-2], limit)
    if is_cuda(tokens):
        return convert_back(_norm_mass_cuda(tokens, counts, mask))
    return convert_back(_norm_mass_reference(tokens, counts, mask))


def _norm_mass_reference(
    tokens: NDArray[Any], counts: NDArray[np.int64], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    # top_sums[K - 1] is the sum of the K largest norms, in float64, so top_sums[-1] is
    # the sum of all norms. `top_norm_mass` divides all norms by the largest entry of
    # the sequence. Both sums have this factor, so it cancels in the ratio.
    top_sums = top_norm_mass(tokens, mask)  # (B, N)
    total = top_sums[..., -1]  # (B,)
    kept = np.take_along_axis(top_sums, counts[..., None] - 1, axis=-1)[..., 0]  # (B,)
    # The inner `where` avoids 0 / 0 for a sequence of zeros.
    ratio = np.where(total > 0, kept / np.where(total > 0, total, 1), 1)
    return ratio.astype(np.result_type(tokens.dtype, np.float32))


def _norm_mass_cuda(tokens: Any, counts: NDArray[np.int64], mask: Any) -> Any:
    norms = token_norms_cuda(tokens, mask)  # (B, N); 0 for padding
    # One kernel marks the K largest norms. The next one adds the marked norms and all
    # norms of each sequence, and divides. The optimized one has a block for each
    # sequence, and the basic one has a thread.
    selected = top_tokens_cuda(norms, *counts_on_device(counts))  # (B, N) bool
    batch, num_tokens = math.prod(norms.shape[:-1]), norms.shape[-1]
    out = empty(norms.shape[:-1], norms.dtype)
    args = (norms, selected, batch, num_tokens, out)
    launch("norm_mass", "norm_mass", norms.dtype, args, blocks=batch)
    return out
