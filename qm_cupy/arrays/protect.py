"""Protected tokens: booleans (N,) or (B, N), or the positions (P,) of P tokens.

There are B sequences of N tokens. Positions are those of every sequence, and count its
tokens without padding: 0 is its first token, and -1 its last one.
"""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_batch_shape, check_is_array
from .libraries import is_cuda


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
    if is_positions(protect):
        return None, protect
    if protect is not None and not hasattr(protect, "dtype"):
        raise TypeError(
            "`protect` must be a boolean array or a list of positions such as [0], got "
            f"{type(protect).__name__}"
        )
    return protect, None


def token_positions(positions: Any, num_tokens: int) -> list[int]:
    """Return positions within -N..N-1 as a list, or raise."""
    if isinstance(positions, np.ndarray):
        if positions.ndim != 1:
            raise TypeError(
                "`protect` must be boolean (N) or (B, N), or have integer positions "
                f"(P), got {positions.dtype} of shape {positions.shape}"
            )
        positions = positions.tolist()
    indices = [position(x) for x in positions]
    for x in indices:
        if not -num_tokens <= x < num_tokens:
            raise ValueError(
                f"`protect` must have positions within 0..{num_tokens - 1} (-1 is the "
                f"last token), got {x}"
            )
    if len({x % num_tokens for x in indices}) < len(indices):
        # The 0 and 1 of an integer mask would be read as positions.
        raise ValueError(
            "`protect` must have distinct positions; a mask must be boolean "
            f"(`protect.astype(bool)`), got {_first_few(positions)}"
        )
    return indices


def protected_tokens(
    protect: Any, positions: Any, tokens: NDArray[Any], mask: Any
) -> Any:
    """Return converted booleans or positions as booleans (B, N); None stays None.

    `mask` is boolean (B, N), or None.
    """
    wanted = tokens.shape[:-1]
    if positions is not None and mask is not None:
        indices = token_positions(positions, wanted[-1])
        if not is_cuda(mask):  # otherwise the CPU would have to wait
            check_positions_exist(indices, mask)
        return of_valid_tokens(indices, mask)
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


def check_positions_exist(positions: list[int], mask: NDArray[np.bool_]) -> None:
    """Raise if a sequence has no token at one of the positions."""
    counts = np.count_nonzero(mask, axis=-1)  # () or (B,)
    for x in positions:
        wrong = np.argwhere(counts < (x + 1 if x >= 0 else -x))
        if len(wrong):
            at = tuple(wrong[0])
            where = f"sequence {int(at[0])}" if at else "the sequence"
            raise ValueError(
                f"`protect` has position {x}, but {where} has {counts[at]} tokens "
                "(positions count tokens without padding)"
            )


def of_valid_tokens(positions: list[int], mask: Any) -> Any:
    """Return positions as booleans (B, N) of the mask's library.

    `mask` is boolean (B, N), of any library.
    """
    rank = mask.cumsum(-1)  # of a token: 1, 2, ...; padding has that of the last token
    count = rank[..., -1:]
    protect = rank < 0  # False
    for x in positions:
        protect = protect | (rank == (x + 1 if x >= 0 else count + (x + 1)))
    return protect & mask


def position(x: Any) -> int:
    """Return a position as an integer, or raise."""
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
