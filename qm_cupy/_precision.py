"""Whether float32 may be multiplied as TF32; off, unless the user allows it."""

import functools
from typing import Any

import numpy as np

TF32 = "tf32"  # float32 to all but the multiplication: a kernel's dtype, not an array's

_allowed = False


class allow_tf32:  # noqa: N801
    """Let the optimized kernels multiply float32 as TF32 on tensor cores, or not.

    TF32 keeps 11 significant bits of every factor; sums stay float32. It is off unless
    it is allowed, and needs a GPU of sm_80 (Ampere) or later.

    Parameters
    ----------
    enabled : bool, default True
        Whether TF32 is allowed.

    Raises
    ------
    TypeError
        If it is no bool.

    Notes
    -----
    A sum of products changes by at most 2⁻⁹ of the sum of their magnitudes. float64,
    products of 16-bit tokens and the basic kernels stay as they are. What changes:

    - Cosine similarities, by at most 2⁻⁹ = 0.002, and near ties between them.
    - Scores of `query_key_entropy` and `self_attention_entropy`, by at most
      e = 2⁻⁹ · scale · Σ|q_d k_d|. An entropy then changes by at most
      e √(1 + ¼ ln² N) [1]_, where e is the largest of its row: by 0.005 for normal
      tokens at N = 257, D = 64. Gradients changed by 0.3 % of their largest entry.
    - The linear maps of priors, whatever dtype the tokens have. The hidden layer of an
      `MLPPrior` stays float32, because the signs of its sums decide which units a
      gradient passes. So gradients of `alignment_loss` are those of the float32
      network, to 0.3 % of their largest entry. A prediction of a `TransformerPrior`
      of one block changed by 0.002.

    References
    ----------
    .. [1] D. Reeb and M. M. Wolf, "Tight bound on relative entropy by entropy
       difference", IEEE Trans. Inf. Theory 61(3), 2015, arXiv:1304.0036: the variance
       of log p is at most 1 + ¼ ln² (N - 1).

    Examples
    --------
    >>> with allow_tf32():  # within the block, and only there
    ...     ...
    Ellipsis
    >>> choice = allow_tf32(False)  # from here on
    """

    def __init__(self, enabled: bool = True) -> None:
        global _allowed
        if not isinstance(enabled, bool):
            raise TypeError(f"`enabled` must be True or False, got {enabled!r}")
        self._before = _allowed
        _allowed = enabled

    def __enter__(self) -> None:
        """Keep the choice until the end of the ``with``."""

    def __exit__(self, *exception: object) -> None:
        """Go back to the choice before."""
        global _allowed
        _allowed = self._before


def kernel_dtype(file: str, dtype: Any) -> str:
    """Return the dtype that a file's kernels are compiled for: TF32 for float32?"""
    name = _name(np.dtype(dtype))
    by_tensor_cores = _allowed and name == "float32" and file.startswith("optimized/")
    return TF32 if by_tensor_cores else name


@functools.lru_cache(maxsize=16)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which NumPy composes anew, at the price of a launch
