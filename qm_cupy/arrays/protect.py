"""Protected tokens: booleans (N,) or (B, N), or the positions (P,) of P tokens.

There are B sequences of N tokens. Positions are those of every sequence.
"""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_batch_shape, check_is_array


def is_positions(protect: Any) -> bool:
    """Return whether protected tokens are given by positions, not by booleans."""
    # The dtypes of all libraries have names such as "int64" and "torch.uint8".
    return isinstance(protect, list | tuple | range) or "int" in str(
        getattr(protect, "dtype", "")
    )


def split_positions(protect: Any) -> tuple[Any, Any]:
    """Return booleans and positions; one of them, or both, is None.

    `convert_inputs` converts the booleans as an array, and the positions as counts.
    """
    return (None, protect) if is_positions(protect) else (protect, None)


def token_positions(positions: Any, num_tokens: int) -> list[int]:
    """Return positions within 0..N-1, or raise. -1 is the last token."""
    if isinstance(positions, np.ndarray):
        if positions.ndim != 1:
            raise TypeError(
                "`protect` must be boolean (N) or (B, N), or have integer positions "
                f"(P), got {positions.dtype} of shape {positions.shape}"
            )
        positions = positions.tolist()
    indices = [_index(x) for x in positions]
    for x in indices:
        if not -num_tokens <= x < num_tokens:
            raise ValueError(
                f"`protect` must have positions within 0..{num_tokens - 1} (-1 is the "
                f"last token), got {x}"
            )
    indices = [x % num_tokens for x in indices]
    if len(set(indices)) < len(indices):
        # The 0 and 1 of an integer mask would be read as positions.
        raise ValueError(
            "`protect` must have distinct positions; a mask must be boolean "
            f"(`protect.astype(bool)`), got {_first_few(positions)}"
        )
    return indices


def protected_tokens(protect: Any, positions: Any, tokens: NDArray[Any]) -> Any:
    """Return converted booleans or positions as booleans (B, N); None stays None."""
    wanted = tokens.shape[:-1]
    if positions is not None:
        protect = np.zeros(wanted[-1], np.bool_, like=tokens)
        # One by one: a list as an index would be copied to a GPU, which a CUDA graph
        # cannot capture.
        for index in token_positions(positions, wanted[-1]):
            protect[index] = True
    if protect is None:
        return None
    check_is_array("protect", protect)
    if protect.dtype != np.bool_:
        raise TypeError(
            f"`protect` must be boolean or have integer positions, got {protect.dtype}"
        )
    check_batch_shape("protect", protect, wanted)
    return protect if protect.shape == wanted else np.broadcast_to(protect, wanted)


def _index(x: Any) -> int:
    if isinstance(x, bool | np.bool_):
        raise TypeError(
            "`protect` must have integer positions or be a boolean array, got a list "
            "of bools: pass `np.array(protect)`"
        )
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(
            f"`protect` must have integer positions, got {type(x).__name__}"
        ) from None


def _first_few(positions: Iterable[Any]) -> str:
    """Return up to eight positions as text."""
    values = list(positions)
    shown = ", ".join(map(str, values[:8]))
    return f"[{shown}, ...]" if len(values) > 8 else f"[{shown}]"
