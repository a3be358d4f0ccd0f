"""Sources of the saliency: the arrays that a caller of `quickmerge` passes for it.

There are B sequences of N tokens of width D. A source may have L layers with H heads
each. For one sequence, no array has the axis B.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import any_of, check_is_array, check_shape
from .arrays.libraries import is_cuda
from .arrays.shapes import check_key, expand_mask, row_blocks
from .settings import finite_checked
from .stages.saliency.layers import layers_of
from .stages.saliency.query_key_entropy import check_causal, check_scale

# The last axes of the sources from which saliency is computed.
_LAST_AXES = {"hidden_states": "ND", "attention": "NN", "query": "Nd", "key": "Nd"}


class Sources(NamedTuple):
    """The source of the saliency: one of these, or the tokens if all are None.

    `query` and `key` are one source. A source may be a tuple of layers.
    """

    hidden_states: Any
    attention: Any
    query: Any
    key: Any
    saliency: Any

    def arrays(self) -> dict[str, Any]:
        """Return all arrays by name, such as "attention[1]" for a layer of a tuple."""
        arrays: dict[str, Any] = {}
        for name, x in self._asdict().items():
            if isinstance(x, tuple):
                arrays |= {f"{name}[{i}]": layer for i, layer in enumerate(x)}
            elif x is not None:
                arrays[name] = x
        return arrays

    def with_arrays(self, arrays: Iterable[Any]) -> "Sources":
        """Return the sources with other arrays, in the order of `arrays`."""
        others = iter(arrays)
        return Sources(
            *(
                tuple(next(others) for _ in x)
                if isinstance(x, tuple)
                else x
                if x is None
                else next(others)
                for x in self
            )
        )


NO_SOURCES = Sources(None, None, None, None, None)


def check_sources(sources: Sources) -> None:
    """Raise if there is more than one source of saliency, or only half of one."""
    # `query` and `key` are one source, so only `query` is counted.
    source_names = [
        name
        for name in ("saliency", "hidden_states", "attention", "query")
        if getattr(sources, name) is not None
    ]
    if len(source_names) > 1:
        raise ValueError(
            "give at most one source of saliency, got "
            f"{' and '.join(source_names)}: keep one"
        )
    if (sources.query is None) != (sources.key is None):
        raise ValueError("`query` and `key` go together: give both or neither")
    if sources.saliency is not None:
        check_is_array("saliency", sources.saliency)
    layers_of({"hidden_states": sources.hidden_states})
    layers_of({"attention": sources.attention})
    layers_of({"query": sources.query, "key": sources.key})


def checked_scale(scale: Any, sources: Sources) -> float | None:
    """Return the factor of the scores of queries and keys, or raise.

    `torch.compile` traces through this code, so a valid float is only compared.
    """
    if scale is None:
        return None
    if sources.query is None:
        raise ValueError(
            f"`scale` applies to `query` and `key` only, got scale={scale!r} without "
            "them: leave it out"
        )
    if type(scale) is float and 0 < scale < math.inf:
        return scale
    return check_scale(scale)


def check_causal_sources(causal: Any, sources: Sources) -> None:
    """Raise unless `causal` is a bool, and False if the source has no attention."""
    check_causal(causal)
    if causal and sources.attention is None and sources.query is None:
        raise ValueError(
            "`causal` applies to `attention`, or `query` and `key`, only, got "
            "causal=True without them: leave it out"
        )


def check_causal_attention(sources: Sources, mask: NDArray[np.bool_] | None) -> None:
    """Raise if a token attends to a later one; padding may. GPU arrays are not read.

    The attention has the axis B.
    """
    layers = sources.attention
    for x in layers if isinstance(layers, tuple) else (layers,):
        if x is None or is_cuda(x) or not finite_checked():
            return
        matrix_mask = expand_mask(mask, x.shape[:-1])  # (..., N)
        # Blocks of rows, because a part of the matrix needs less memory.
        blocks = [*row_blocks(*x.shape[-2:])]
        for index, rows in itertools.product(np.ndindex(x.shape[:-2]), blocks):
            # False for NaN, which padding may be
            later = np.triu(x[index][rows], 1 + rows.start) > 0
            if matrix_mask is not None:
                valid = matrix_mask[index]
                later &= valid[rows, None] & valid
            if later.any():
                i, j = map(int, np.argwhere(later)[0] + (rows.start, 0))
                raise ValueError(
                    "`attention` must be 0 after the diagonal if `causal` is True, "
                    f"got {x[index][i, j]:.3g} from token {i} to token {j}"
                )


def lift_sources(sources: Sources, tokens: Any) -> Sources:
    """Return the sources with the axis B; raise if a shape does not fit the tokens.

    The values are not read, so a source that nothing needs costs nothing.
    """
    lifted = {
        name: _lift_source(name, x, tuple(tokens.shape))  # checks B and N
        for name, x in sources._asdict().items()
        if x is not None and name != "saliency"
    }
    sources = sources._replace(**lifted)
    if sources.saliency is not None:
        check_shape("saliency", sources.saliency, "BN", tuple(tokens.shape[:-1]))
    if sources.query is not None:
        layered = isinstance(sources.query, tuple)
        pairs = zip(sources.query, sources.key, strict=True)
        for query, key in pairs if layered else [(sources.query, sources.key)]:
            check_key(tuple(query.shape), tuple(key.shape))
    return sources


def _lift_source(name: str, source: Any, tokens: tuple[int, ...]) -> Any:
    """Return a source of saliency with the axis B; raise if it does not fit the tokens.

    `source` is an array or a tuple of layers, and `tokens` is the shape of the tokens.
    The axis B is inserted for one sequence: (H, N, N) becomes (1, H, N, N).
    """
    last = _LAST_AXES[name]
    # Hidden states have no heads. Four axes would be layers to the caller, and heads to
    # the function that computes the entropies, so they are refused. For one sequence,
    # four axes could be layers of heads, or a batch: they are refused too.
    leading = ["B"] if last == "ND" else ["B", "BH"]
    layer = [axes + last for axes in leading]  # the layouts of one layer
    if isinstance(source, tuple):
        names = [f"{name}[{i}]" for i in range(len(source))]
        return tuple(
            _lift(x_name, x, layer, tokens)
            for x_name, x in zip(names, source, strict=True)
        )
    return _lift(name, source, layer + ["LBH" + last] * (last != "ND"), tokens)


def _lift(
    name: str, source: Any, layouts: Sequence[str], tokens: tuple[int, ...]
) -> Any:
    """Return one array with the axis B; `layouts` are those of several sequences."""
    shape, single = tuple(source.shape), len(tokens) == 2
    sizes = {"N": tokens[-2]} if single else {"B": tokens[0], "N": tokens[-2]}
    # The arrays of one sequence have no axis B, and its layers are a tuple.
    without = [x.replace("B", "") for x in layouts if not x.startswith("L")]
    allowed = without if single else layouts
    for layout in allowed:
        if _fits(shape, layout, sizes):
            return source[None] if single else source
    way_out = ""
    if single and any(_fits(shape, x, {"B": 1, **sizes}) for x in layouts):
        way_out = ": pass `tokens[None]`, a batch of one"
    elif tokens[0] == 1 and any(_fits(shape, x, sizes) for x in without):
        way_out = ": pass `tokens[0]`, one sequence"
    elif (layouts == ["BND"] and len(shape) == len(tokens) + 1) or (
        not single and len(shape) == 4 and _fits(shape[1:], layouts[0], sizes)
    ):
        way_out = f": pass `tuple({name})`, a tuple of layers"
    elif single and any(_fits(shape[1:], x, sizes) for x in without):
        way_out = (
            f": pass `tuple({name})` if the first axis has layers, or `{name}[b]` for "
            "one sequence of a batch"
        )
    wanted = any_of([f"({', '.join(layout)})" for layout in allowed])
    axes = ", ".join("ND" if single else "BND")
    raise ValueError(
        f"`{name}` must have shape {wanted} for `tokens` of shape ({axes}) = {tokens}, "
        f"got {shape}{way_out}"
    )


def _fits(shape: Sequence[int], layout: str, sizes: Mapping[str, int]) -> bool:
    """Return whether a shape has the axes of a layout, with the known `sizes`."""
    return len(shape) == len(layout) and all(
        sizes.get(axis, size) == size for axis, size in zip(layout, shape, strict=True)
    )
