"""The three settings: which kernels run, whether TF32 is allowed, and finite checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Implementation = Literal["basic", "optimized"]

_chosen: Implementation = "optimized"
_allowed = False
_finite_checked: ContextVar[bool] = ContextVar("finite_checked", default=True)


class use_kernels:  # noqa: N801
    """Choose the kernels that run: ``"optimized"`` (the default) or ``"basic"``.

    Parameters
    ----------
    implementation : {"basic", "optimized"}
        ``"basic"`` is one thread, one output: slow, plain, and the cross-check.

    Raises
    ------
    ValueError
        If it is another word.

    Examples
    --------
    >>> with use_kernels("basic"):  # within the block, and only there
    ...     ...
    Ellipsis
    >>> choice = use_kernels("optimized")  # from here on
    """

    def __init__(self, implementation: Implementation) -> None:
        global _chosen
        if implementation not in ("basic", "optimized"):
            raise ValueError(
                '`implementation` must be "basic" or "optimized", '
                f"got {implementation!r}"
            )
        self._before = _chosen
        _chosen = implementation

    def __enter__(self) -> None:
        """Keep the choice until the end of the ``with``."""

    def __exit__(self, *exception: object) -> None:
        """Go back to the choice before."""
        global _chosen
        _chosen = self._before


def implementation() -> Implementation:
    """Return which kernels run now."""
    return _chosen


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


def tf32_allowed() -> bool:
    """Return whether float32 may be multiplied as TF32."""
    return _allowed


@contextmanager
def check_finite(enabled: bool) -> Iterator[None]:
    """Switch the search for NaN and Inf in the inputs on or off within a block.

    Parameters
    ----------
    enabled : bool
        Whether inputs are searched, for negative weights too. They are by default,
        with one pass over each; CUDA arrays never, as the CPU would have to wait.

    Examples
    --------
    >>> import numpy as np, qm_cupy
    >>> with qm_cupy.check_finite(False):
    ...     qm_cupy.norm_saliency(np.array([[1.0], [3.0], [2.0]]))
    array([0. , 1. , 0.5])
    """
    token = _finite_checked.set(enabled)
    try:
        yield
    finally:
        _finite_checked.reset(token)


def finite_checked() -> bool:
    """Return whether inputs are searched for NaN and Inf."""
    return _finite_checked.get()
