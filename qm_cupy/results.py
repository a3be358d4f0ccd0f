"""The results of functions: named tuples of arrays.

Axes: B sequences of N tokens of width D are merged to K groups each. H is the number of
heads of a key-value cache, and d is the width of a head.
"""

import math
import sys
from os import PathLike
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import (
    check_finite_values,
    check_is_array,
    check_labels,
    check_layout,
    check_mass,
    check_out,
    check_shape,
)
from .arrays.conversion import Array, BoolArray, FloatArray, IntArray, convert_inputs
from .arrays.counts import GroupCounts
from .arrays.libraries import is_cuda, library, no_grad
from .autodiff.dispatch import (
    as_constants_like,
    on_callers_stream_unless_traced,
    tracing_framework,
)
from .cuda.device import to_device, to_host
from .merged_file import check_suffix, load_arrays, save_arrays
from .stages.merging.groups import group_positions, group_sizes
from .stages.merging.merge_tokens import compute_merge_tokens, merge_tokens
from .stages.merging.unmerge_tokens import unmerge_tokens

# The array that `Merged.apply` merges may have another dtype, or another library.
Values = TypeVar("Values", bound=Any)


class Merged(NamedTuple, Generic[Array]):
    """Result of `quickmerge`, as arrays of the caller's library.

    It is also a plan: `apply` merges other arrays over the same tokens in the same way,
    `unmerge` returns to the length of the original sequences, and `save` and `load`
    keep the plan in a file. The axis B is absent for one sequence.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> merged = qm.quickmerge(np.eye(4, 3), 3)
    >>> merged
    Merged(4 tokens → 3 groups, width 3, float64, numpy)
    """

    tokens: Array
    """(B, K, D), the dtype of the input: the merged tokens."""
    labels: IntArray
    """(B, N) int32: the group of each token, -1 for padding."""
    sizes: IntArray
    """(B, K) int32: the number of tokens in each group, 0 for padding."""
    positions: IntArray
    """(B, K) int32: the position of each group's last token, -1 for padding."""
    mass: FloatArray
    """(B, N): the weights that were used: 1 for uniform weights, 0 for padding. They
    are float64 if they are computed from a float64 array, otherwise float32."""

    def __repr__(self) -> str:
        """Return sizes, dtype and library in one line; no values are read."""
        try:
            *_, num_groups, dim = self.tokens.shape
            *batch, num_tokens = self.labels.shape
            dtype = str(self.tokens.dtype).rpartition(".")[2]  # not "torch.float32"
            name = library(self.tokens).name
        except (AttributeError, TypeError, ValueError):
            # Frameworks also put other objects into the fields, such as placeholders.
            return f"Merged{tuple(self)!r}"
        count = f"{batch[0]} × " if batch else ""
        return (
            f"Merged({count}{num_tokens} tokens → {count}{num_groups} groups, "
            f"width {dim}, {dtype}, {name})"
        )

    @property
    def valid(self) -> BoolArray:
        """(B, K) boolean: which groups exist. The others are padding, of size 0."""
        return self.sizes > 0

    def unmerge(self) -> Array:
        """Return tokens (B, N, D), each of which is the merged token of its group.

        Returns
        -------
        ndarray of shape (N, D) or (B, N, D)
            The result of `unmerge_tokens`, in the dtype of the tokens; 0 for padding.

        Examples
        --------
        >>> import numpy as np
        >>> import qm_cupy as qm
        >>> qm.quickmerge(np.array([[1.0], [3.0], [-4.0]]), 2).unmerge().ravel()
        array([ 2.,  2., -4.])
        """
        return unmerge_tokens(self.tokens, self.labels)

    def apply(self, x: Values) -> Values:
        """Merge another array over the same tokens, by the same groups and weights.

        Gradients flow to `x`, as in `merge_tokens`.

        Parameters
        ----------
        x : ndarray of shape (B, N, D) or (B, H, N, d)
            Values of the tokens, or those of each head, such as the keys of a key-value
            cache. For one sequence the axis B is absent: (N, D) or (H, N, d). Any width
            and any dtype of float16, bfloat16, float32 and float64. The arrays of this
            `Merged` must be of the same library and on the same device, or NumPy
            arrays, which are then converted.

        Returns
        -------
        ndarray of shape (B, K, D) or (B, H, K, d)
            Merged values in the dtype of `x`. Groups of size 0 are 0.

        Raises
        ------
        TypeError
            If `x` is not floating or of another library.
        ValueError
            If the shape does not fit or an entry is not finite. Padding is not read.

        Examples
        --------
        >>> import numpy as np
        >>> import qm_cupy as qm
        >>> merged = qm.quickmerge(np.array([[1.0], [3.0], [-4.0]]), 2)
        >>> merged.apply(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        array([[1., 2.],
               [4., 5.]])
        """
        return _apply(x, self.labels, self.mass, self.tokens.shape[-2])

    def save(self, path: str | PathLike[str]) -> None:
        """Write all arrays to a file, which is replaced if it exists.

        Parameters
        ----------
        path : str or path
            The name of the file. It ends in .npz, or in .safetensors, which needs the
            package safetensors. Arrays have the names of the fields.

        Raises
        ------
        OSError
            If the file cannot be written. A file of that name is then unchanged.
        TypeError
            If a field has the wrong dtype.
        ValueError
            If the name has another ending, or the fields do not fit together.
        """
        path = Path(path)
        check_suffix(path)
        with no_grad(self.tokens):  # a file has no gradient
            _, *arrays = convert_inputs(self._asdict())
        fields = Merged(*map(to_host, arrays))
        _check_fields(fields)
        save_arrays(path, fields._asdict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Merged[NDArray[Any]]":
        """Return the `Merged` of a file, as NumPy arrays.

        Parameters
        ----------
        path : str or path
            A file that `save` or ``qm-cupy compress`` has written. bfloat16 needs the
            package ml_dtypes.

        Returns
        -------
        Merged
            The saved arrays. `apply` also accepts arrays of other libraries.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If the name does not end in .npz or .safetensors, the file is damaged, an
            array is missing, or the arrays do not fit together. Pickled objects are
            never loaded.
        """
        path = Path(path)
        check_suffix(path)
        loaded = Merged(**load_arrays(path, cls._fields))
        try:
            _check_fields(loaded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a Merged: {error}") from error
        return loaded


@on_callers_stream_unless_traced
def _apply(x: Any, labels: Any, mass: Any, num_groups: int) -> Any:
    """Return `x` merged by the labels and weights of a `Merged`."""
    check_is_array("x", x)
    plan = tuple(labels.shape)
    batch, heads = plan[:-1], _heads_of(tuple(x.shape), plan)
    wanted = (*batch, *heads, num_groups, x.shape[-1])  # (B, H, K, d)
    framework = tracing_framework((x, labels, mass))
    from_file = isinstance(labels, np.ndarray) and not isinstance(x, np.ndarray)
    if framework is not None:
        if from_file:
            labels, mass = as_constants_like(x, (labels, mass))
        xp = sys.modules["jax"].numpy if framework == "jax" else sys.modules["torch"]
        flat = _one_sequence_per_head(xp, x, labels, mass, heads)
        merged = merge_tokens(flat[0], flat[1], num_groups, mass=flat[2])
        return merged.reshape(wanted)
    if from_file:
        convert_back, x = convert_inputs({"x": x})
        if is_cuda(x):
            labels, mass = to_device(labels), to_device(mass)
    else:
        convert_back, x, labels, mass = convert_inputs(
            {"x": x, "labels": labels, "mass": mass}
        )
    check_layout("x", x, "BHND" if heads and batch else "BND"[-x.ndim :])
    groups = GroupCounts(np.full(batch, num_groups), num_groups)
    check_labels(labels, plan, groups.counts)
    # Padding may have any value. On a GPU no values are checked.
    valid = None if is_cuda(x) else labels >= 0  # (B, N)
    check_mass(mass, plan, mask=valid)
    if valid is not None:
        per_row = valid[..., None, :] if heads else valid  # (B, 1, N), for all heads
        check_finite_values("x", x, per_row[..., None])
    flat = _one_sequence_per_head(np, x, labels, mass, heads)  # `np` is for CuPy too
    merged = compute_merge_tokens(flat[0], flat[1], groups, mass=flat[2])
    return convert_back(merged.reshape(wanted))


def _heads_of(shape: tuple[int, ...], plan: tuple[int, ...]) -> tuple[int, ...]:
    """Return (H,), or () without heads; raise if `x` does not fit the labels.

    `shape` is that of `x`, and `plan` is that of the labels: (N,) or (B, N).
    """
    batch = plan[:-1]
    heads = shape[len(batch) : -2]
    if shape[:-1] == (*batch, *heads, plan[-1]) and len(heads) <= 1:
        return heads
    axes = "B, N" if batch else "N"
    layouts = "(B, N, D) or (B, H, N, d)" if batch else "(N, D) or (H, N, d)"
    raise ValueError(
        f"`x` must have shape {layouts} with ({axes}) = {plan}, as the labels of this "
        f"Merged, got {shape}"
    )


def _one_sequence_per_head(
    xp: Any, x: Any, labels: Any, mass: Any, heads: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """Return `x`, labels and mass with the heads as sequences: (B·H, N, d), (B·H, N).

    `xp` is the namespace of the arrays. Without heads, nothing changes.
    """
    if not heads:
        return x, labels, mass
    *leading, num_tokens, head_dim = x.shape
    rows = (math.prod(leading), num_tokens)
    # All heads of a sequence have its labels and weights: (B, N) -> (B, H, N).
    labels, mass = (
        xp.broadcast_to(y[..., None, :], (*leading, num_tokens)).reshape(rows)
        for y in (labels, mass)
    )
    return x.reshape((*rows, head_dim)), labels, mass


def _check_fields(merged: Merged[NDArray[Any]]) -> None:
    """Raise unless the fields, NumPy arrays, are a result of `quickmerge`."""
    tokens, labels, sizes, positions, mass = merged
    check_layout("tokens", tokens, "KD", "BKD")
    *batch, max_groups, _ = tokens.shape
    per_group = (*batch, max_groups)
    for name in ("labels", "sizes", "positions"):
        if getattr(merged, name).dtype != np.int32:
            raise TypeError(
                f"`{name}` must be int32, got {getattr(merged, name).dtype}"
            )
    num_tokens = labels.shape[-1] if labels.ndim else 1
    check_labels(labels, (*batch, num_tokens), max_groups)
    check_shape("sizes", sizes, "BK", per_group)
    check_shape("positions", positions, "BK", per_group)
    check_mass(mass, labels.shape, mask=labels >= 0)
    if (group_sizes(labels, max_groups) != sizes).any():
        raise ValueError("`sizes` must be the numbers of tokens with each label")
    if (group_positions(labels, max_groups) != positions).any():
        raise ValueError("`positions` must be those of the last token of each group")


def arrays_of(out: Any) -> dict[str, Any]:
    """Return the arrays of `out` by the names that error messages use."""
    if out is None:
        return {}
    if not isinstance(out, Merged):
        raise TypeError(
            f"`out` must be a Merged, got {type(out).__name__}: pass the result of an "
            "earlier call"
        )
    return {f"out.{field}": x for field, x in out._asdict().items()}


def check_target(
    target: Merged[Any],
    max_groups: int,
    tokens: NDArray[Any],
    mass_dtype: np.dtype[Any],
) -> None:
    """Raise if an array of `out` has the wrong shape or dtype."""
    *leading, num_tokens, dim = tokens.shape
    per_token, per_group = (*leading, num_tokens), (*leading, max_groups)
    wanted: tuple[tuple[str, tuple[int, ...], Any], ...] = (  # fields of `Merged`
        ("BKD", (*per_group, dim), tokens.dtype),  # tokens
        ("BN", per_token, np.dtype(np.int32)),  # labels
        ("BK", per_group, np.dtype(np.int32)),  # sizes
        ("BK", per_group, np.dtype(np.int32)),  # positions
        ("BN", per_token, mass_dtype),  # mass
    )
    for name, x, (axes, shape, dtype) in zip(
        target._fields, target, wanted, strict=True
    ):
        check_out(x, shape, dtype, name=f"out.{name}", axes=axes)


class Choice(NamedTuple, Generic[Array]):
    """Result of `choose_merge` for C candidates, as arrays of the caller's library.

    The axis B is absent for one sequence.
    """

    merged: Merged[Array]
    """The result of the best candidate of each sequence, padded to the largest K."""
    scores: Array
    """(C, B), float32 or float64: the score of every candidate; lower is better."""
    best: Array
    """(B,) int32: the index of the selected candidate of each sequence."""
