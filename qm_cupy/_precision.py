"""Whether float32 may be multiplied as TF32; off, unless the user allows it."""

import functools
from typing import Any

import numpy as np

TF32 = "tf32"  # float32 to all but the multiplication: a kernel's dtype, not an array's

_allowed = False


class allow_tf32:  # noqa: N801
    """Let the optimized kernels multiply float32 as TF32 on tensor cores, or not.

    Of every factor 10 bits of mantissa are left, as of float16; the sums stay float32.
    It is off unless it is allowed, and needs a GPU of sm_80 (Ampere) or later.

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
    It changes cosine similarities and what follows from them, the scores of
    `query_key_entropy` and `self_attention_entropy`, and the linear maps of priors, by
    up to 2⁻⁹ of the sum of the products' magnitudes. float64 and the basic kernels stay
    as they are.

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
