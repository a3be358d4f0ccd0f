"""A file of tokens, and the arrays that come with them: mask, protected tokens, ….

Axes: B sequences of N tokens of width D. A file may also hold one sequence (N, D).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_batch_shape, check_tokens, wrong_mask_dtype
from ..arrays.protect import token_positions
from ..files.inputs import Input, open_arrays
from ..files.stored import Arrays as StoredArrays
from ..files.stored import Stored
from ..settings import check_finite

Arrays = dict[str, NDArray[Any]]  # for each argument of `quickmerge`
Result = TypeVar("Result")

NO_MASK = "none"  # the value of --mask that refuses a mask
# The names that a mask has if it is used without being asked for.
_MASKS = "mask", "attention_mask"
_SIZES = "sizes"  # of the groups of merged tokens
# Arrays of integers with these names, one entry for each sequence or one more, say that
# the rows of the tokens belong to several sequences, or that some are padding.
_RAGGED = "offsets", "cu_seqlens", "lengths", "doclens"


class Selection(NamedTuple):
    """Which arrays of a file are used: their names, as options give them."""

    key: str | None = None  # the tokens
    mask: str | None = None  # or `NO_MASK`
    protect: str | None = None  # or positions, such as "0,-1"
    attention: str | None = None


class TokenFile(NamedTuple):
    """An open file, and the names of the arrays that are used."""

    source: Input
    names: Mapping[str, str]  # of the array for each argument of `quickmerge`
    positions: list[int] | None  # of protected tokens, if no array holds them
    mask_by_default: bool  # whether the mask is used without being asked for

    @property
    def tokens(self) -> Stored:
        """The tokens (N, D) or (B, N, D)."""
        return self.array("tokens")

    def array(self, argument: str) -> Stored:
        """Return the array that is used as an argument of `quickmerge`."""
        return self.source.arrays[self.names[argument]]

    @property
    def num_sequences(self) -> int:
        """B, or 1 for one sequence (N, D)."""
        return self.tokens.shape[0] if len(self.tokens.shape) == 3 else 1

    @property
    def padded_tokens(self) -> int:
        """The number of tokens of all sequences, padding included."""
        return self.num_sequences * self.tokens.shape[-2]

    def chunks(self, count: int, *arguments: str) -> Iterator[tuple[int, int, Arrays]]:
        """Yield the arrays of a few sequences: start, stop, and arrays with the axis B.

        `arguments` are the arrays to read. Those that every sequence has in common are
        repeated without the axis B. One sequence (N, D) gets this axis.
        """
        if len(self.tokens.shape) == 2:
            common = "protect" if self._has_positions() else None
            whole = {x: self.common(x) for x in arguments}
            yield 0, 1, {k: x if k == common else x[None] for k, x in whole.items()}
            return
        total = self.num_sequences
        streams = {
            x: self.array(x).chunks(count) for x in arguments if self.is_per_sequence(x)
        }
        fixed = {x: self.common(x) for x in arguments if x not in streams}
        # Without an array for each sequence, all sequences are alike.
        step = count if streams else max(1, total)
        for start in range(0, max(1, total), step):
            # Not `zip`, which keeps the last chunk while the next one is read.
            arrays = {x: self._clean(x, next(part)) for x, part in streams.items()}
            yield start, min(start + step, total), {**arrays, **fixed}
            del arrays

    def for_sequences(
        self, call: Callable[[Arrays, int], Result], arrays: Arrays, start: int
    ) -> Result:
        """Return the result of a call for the arrays of some sequences.

        `start` is the index of the first sequence in the file, which is the second
        argument of the call. If the call fails, it is repeated for each sequence alone,
        so that the error is that of a sequence and names it.
        """
        try:
            return call(arrays, start)
        except ValueError as error:
            # Arrays of one axis are those that all sequences have in common.
            counts = [len(x) for x in arrays.values() if x.ndim > 1]
            for index in range(min(counts, default=0)):
                alone = {k: x if x.ndim == 1 else x[index] for k, x in arrays.items()}
                try:
                    call(alone, start + index)
                except ValueError as fault:
                    several = len(self.tokens.shape) == 3
                    where = f"sequence {start + index}: " if several else ""
                    raise ValueError(where + self._with_names(fault)) from error
            raise

    def common(self, argument: str) -> NDArray[Any]:
        """Return an array of all sequences together, or of the only one."""
        return self._clean(argument, self.array(argument).whole())

    def _with_names(self, error: Exception) -> str:
        """Return a message with the names of arrays in the file."""
        text = str(error)
        for argument, name in self.names.items():
            text = text.replace(f"`{argument}`", f"`{name[:60]}`")
        return text

    def bytes_per_sequence(self) -> int:
        """Return the bytes of all arrays that one sequence has."""
        used = (self.array(x) for x in self.names if self.is_per_sequence(x))
        if len(self.tokens.shape) == 2:
            used = (self.array(x) for x in self.names)
        return sum(x.num_bytes for x in used) // max(1, self.num_sequences)

    def is_per_sequence(self, argument: str) -> bool:
        """Return whether an array has the axis B, for tokens (B, N, D)."""
        if argument in ("mask", "protect"):
            return len(self.array(argument).shape) == 2
        return True

    def _has_positions(self) -> bool:
        return "protect" in self.names and self.array("protect").dtype.kind in "iu"

    def _clean(self, argument: str, x: NDArray[Any]) -> NDArray[Any]:
        """Return an array as `quickmerge` takes it."""
        if x.dtype == np.bool_:  # the bytes of a file may have other values than 0, 1
            return x.view(np.uint8) != 0
        return x != 0 if (argument, self.names[argument]) == ("mask", _SIZES) else x


@contextmanager
def open_tokens(
    path: str | Path, selection: Selection, folder: Path | None = None
) -> Iterator[TokenFile]:
    """Open a file of tokens and check dtypes and shapes; no values are read yet.

    Parameters
    ----------
    path : str or path
        A .npy, .npz or .safetensors file, or "-" for the standard input.
    selection : Selection
        The names of the arrays to use.
    folder : path, optional
        Folder of the temporary file for a pipe.
    """
    with open_arrays(path, folder) as source:
        with naming(source.name):
            file = select(source, selection)
        yield file


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let errors about the content of a file name the file."""
    try:
        yield
    except (MemoryError, TypeError, ValueError) as error:
        # Not `in`: a short name, such as "a", is part of many messages.
        if str(error).startswith((f"{name} ", f"{name}: ")):
            raise
        # Not the type of the error itself: some take several arguments.
        [error_type, *_] = (
            x for x in (MemoryError, TypeError, ValueError) if isinstance(error, x)
        )
        # A MemoryError of Python has an empty message.
        raise error_type(f"{name}: {str(error) or 'not enough memory'}") from error


def select(source: Input, selection: Selection) -> TokenFile:
    """Return the file with the arrays that are used, or raise."""
    arrays = source.arrays
    key, mask, protect, attention = selection
    named = {"--key": key, "--mask": mask, "--attention": attention}
    if source.format == ".npy":
        wrong = [x for x, name in named.items() if name and name != NO_MASK]
        if wrong:
            raise ValueError(
                f"a .npy file holds one array only, so {wrong[0]} needs a .npz or "
                ".safetensors file"
            )
    names = {"tokens": _choose(arrays) if key is None else key}
    tokens = _get(arrays, names["tokens"])
    # Check dtype and shape with zeros of the same shape. They contain no NaN, so a
    # search for NaN would only cost time.
    with check_finite(False):
        check_tokens(stand_in(tokens), names["tokens"])
    if mask is None:
        _refuse_ragged(arrays, tokens)
        mask = _default_mask(arrays, names["tokens"], tokens)
        by_default = mask is not None
    else:
        by_default = False
    if mask is not None and mask != NO_MASK:
        names["mask"] = mask
        _check_mask(arrays, mask, tokens, by_default)
    positions = None
    if protect is not None:
        positions = _positions(protect, tokens.shape[-2])
    if protect is not None and positions is None:
        names["protect"] = protect
        _check_protect(_get(arrays, protect), protect, tokens)
    if attention is not None:
        names["attention"] = attention
        _check_attention(_get(arrays, attention), attention, tokens)
    return TokenFile(source, names, positions, by_default)


def _choose(arrays: StoredArrays) -> str:
    """Return the name of the only array that can be the tokens, or raise."""
    if "tokens" in arrays:
        return "tokens"
    # Tokens are floating and have two or three axes. The kind "V" is a dtype that NumPy
    # does not have: if it is selected, a clear error follows later. The only array of a
    # file is always selected, so that its own error is shown.
    names = [
        name
        for name, x in arrays.items()
        if len(arrays) == 1 or (_can_be_tokens(x) and name not in _MASKS)
    ]
    if len(names) != 1:
        raise ValueError(
            f"give the name of the token array with --key; {_listing(arrays)}"
        )
    return names[0]


def _can_be_tokens(array: Stored) -> bool:
    return len(array.shape) in (2, 3) and array.dtype.kind in "fV"


def _default_mask(arrays: StoredArrays, key: str, tokens: Stored) -> str | None:
    """Return the name of the mask that the file has, or None."""
    names = [name for name in _MASKS if name in arrays and name != key]
    # A file that `compress` has written: groups of size 0 are padding.
    if not names and key == "tokens" and {_SIZES, "positions"} <= {*arrays}:
        names = [_SIZES] if arrays[_SIZES].shape == tokens.shape[:-1] else []
    if len(names) > 1:
        raise ValueError(
            "it has the arrays `mask` and `attention_mask`: name one of them with "
            "--mask, or refuse both with --mask none"
        )
    return names[0] if names else None


def _check_mask(
    arrays: StoredArrays, name: str, tokens: Stored, by_default: bool
) -> None:
    """Raise unless the array can be the mask (N,) or (B, N) of the tokens."""
    array = _get(arrays, name)
    try:
        if array.dtype != np.bool_ and array.dtype.kind not in "iu":
            raise wrong_mask_dtype(array.dtype)
        check_batch_shape(name, stand_in(array), tokens.shape[:-1])
    except (TypeError, ValueError) as error:
        if not by_default:
            raise
        raise ValueError(f"{error} (to merge without it: --mask none)") from error


def _refuse_ragged(arrays: StoredArrays, tokens: Stored) -> None:
    """Raise if the rows of the tokens belong to sequences of different lengths."""
    for name in _RAGGED:
        x = arrays.get(name)
        if x is None or x.dtype.kind not in "iu" or len(x.shape) != 1:
            continue
        # Offsets of one sequence are its start and its end; a length is one number.
        if x.shape[0] > (2 if name in ("offsets", "cu_seqlens") else 1):
            rows = " x ".join(map(str, tokens.shape[:-1]))
            raise ValueError(
                f"`{name}` says that the {rows} tokens are sequences of different "
                "lengths, which cannot be merged yet: pad them to (B, N, D) and save a "
                f"mask (to merge without `{name}`: --mask none)"
            )


def _positions(protect: str, num_tokens: int) -> list[int] | None:
    """Return the positions of a list such as "0,-1"; None for the name of an array."""
    try:
        positions = [int(x) for x in protect.split(",")]
    except ValueError:
        return None
    return token_positions(positions, num_tokens)


def _check_protect(array: Stored, name: str, tokens: Stored) -> None:
    """Raise unless the array holds positions (P,), or booleans (N,) or (B, N)."""
    if array.dtype.kind in "iu" and len(array.shape) == 1:
        return
    if array.dtype != np.bool_:
        raise ValueError(
            f"`{name}` must be boolean (N) or (B, N), or hold integer positions (P), "
            f"got {array.describe()}: save it as booleans (`.astype(bool)`)"
        )
    check_batch_shape(name, stand_in(array), tokens.shape[:-1])


def _check_attention(array: Stored, name: str, tokens: Stored) -> None:
    """Raise unless the array has an N × N matrix, or one of each head, per sequence."""
    *batch, num_tokens, _ = tokens.shape
    shape, ndim = array.shape, len(batch) + 2
    square = shape[-2:] == (num_tokens, num_tokens)
    if not square or shape[: len(batch)] != tuple(batch) or len(shape) - ndim > 1:
        layouts = "(B, N, N) or (B, H, N, N)" if batch else "(N, N) or (H, N, N)"
        sizes = (*batch, num_tokens)
        raise ValueError(
            f"`{name}` must have shape {layouts} with ({'B, N' if batch else 'N'}) = "
            f"{sizes if batch else num_tokens}, got {shape}"
        )


def stand_in(array: Stored) -> NDArray[Any]:
    """Return zeros of the same shape and dtype: a view of one number."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _get(arrays: StoredArrays, name: str) -> Stored:
    """Return the array of a name; raise if it is missing or cannot be read."""
    if name not in arrays:
        raise ValueError(f"it has no array {name[:60]!r}; {_listing(arrays)}")
    if arrays[name].fault:
        raise ValueError(f"`{name[:60]}` {arrays[name].fault}")
    return arrays[name]


def _listing(arrays: StoredArrays) -> str:
    """Return some arrays of a file for errors: those that can be tokens first."""
    order = sorted(arrays.items(), key=lambda item: not _can_be_tokens(item[1]))
    first = [
        f"{name if len(name) <= 20 else name[:17] + '...'} "
        f"{'unreadable' if x.fault else x.dtype}{x.shape}"
        for name, x in order[:3]
    ]
    more = f"; and {len(arrays) - 3} more" if len(arrays) > 3 else ""
    return f"it holds {'; '.join(first) or 'no arrays'}{more}"
