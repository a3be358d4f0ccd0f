"""Merge the tokens of a file, a few sequences at a time.

A file of several sequences may be larger than memory: only a few of its sequences and
of their results are in memory at the same time. One sequence is always in memory.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_mask, check_tokens
from ..arrays.protect import protected_tokens
from ..composition import with_defaults
from ..cuda.device import to_device, to_host
from ..files.outputs import Output
from ..files.stored import file_size
from ..files.write import Layout, write_arrays
from ..group_counts import num_groups_of
from ..pipeline import quickmerge
from ..progress import listen
from ..results import Merged
from ..sources import Sources
from ..stages.clustering.cluster_tokens import Method
from ..stages.clustering.labels import Order
from ..stages.clustering.metrics import Metric
from ..stages.saliency.norm_saliency import norm_saliency
from .token_file import TokenFile, naming

CHUNK_BYTES = 2**25  # bytes of the arrays that are merged at a time
_HINT_BYTES = 2**20  # bytes of masks and protected tokens that are checked at a time


class MergeOptions(NamedTuple):
    """Options of `quickmerge`, with its names. None is the default of `quickmerge`."""

    budget: int | float | None = None
    max_error: float | None = None
    max_distance: float | None = None
    # Where the saliency comes from: the norms or the entropies of the tokens. Its
    # default is the source of `quickmerge`: the attention, or else the tokens.
    saliency: str | None = None
    causal: bool = False
    method: Method | None = None
    metric: Metric = "cosine"
    step: int | None = None
    order: Order = "last"
    temperature: float | None = None
    epsilon: float | None = None
    weights: Any = None
    weighted_linkage: bool | None = None
    noise_seed: int | None = None

    def resolved(self, has_attention: bool) -> tuple[str, str, bool]:
        """Return method, weights and weighted linkage, defaults included."""
        # `with_defaults` asks only which sources there are.
        attention = True if has_attention else None
        sources = Sources(self.saliency, attention, None, None, None)
        return with_defaults(
            sources, self.method, self.weights, self.weighted_linkage, self.max_error
        )


class Seconds:
    """Where the time goes, in seconds."""

    def __init__(self) -> None:
        # Until the first tokens are read: imports and checks.
        self.spent = {"starting": 0.0, "reading": 0.0, "merging": 0.0, "writing": 0.0}
        self._last = time.perf_counter()

    def spend(self, name: str) -> None:
        """Add the time since the last call."""
        now = time.perf_counter()
        self.spent[name] += now - self._last
        self._last = now


class Plan(NamedTuple):
    """How a file is merged."""

    file: TokenFile
    options: MergeOptions
    on_gpu: bool
    max_groups: int | None  # the largest K; None if the tokens decide
    chunk_size: int  # sequences that are merged at a time
    num_tokens: int  # of all sequences, without padding

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(K, D) or (B, K, D), or None if K is not known."""
        if self.max_groups is None:
            return None
        return self.shape_with(self.max_groups)

    def shape_with(self, max_groups: int) -> tuple[int, ...]:
        """Return the shape (K, D) or (B, K, D) of the result for this K."""
        *batch, _, dim = self.file.tokens.shape
        return (*batch, max_groups, dim)


def plan(file: TokenFile, options: MergeOptions, on_gpu: bool) -> Plan:
    """Return how to merge a file; raise if the budget or an array is wrong.

    The options are those that `check_options` accepts. The tokens are not read.
    """
    with naming(file.source.name):
        max_groups, num_tokens = _count(file, options)
    count = max(1, CHUNK_BYTES // max(1, file.bytes_per_sequence()))
    return Plan(file, options, on_gpu, max_groups, count, num_tokens)


def check_options(options: MergeOptions, has_attention: bool) -> None:
    """Raise if a value is wrong whatever the tokens are, or would have no effect."""
    method, weights, _ = options.resolved(has_attention)
    by_saliency = weights in ("saliency", "mass") or method == "nearest"
    reasons = {
        "--saliency": options.saliency and not by_saliency,
        "--noise-seed": options.noise_seed is not None
        and weights != "mass"
        and method != "nearest",
        "--temperature": options.temperature is not None and weights != "mass",
        "--epsilon": options.epsilon is not None and weights != "mass",
        "--causal": options.causal and not has_attention,
    }
    needs = {
        "--saliency": "the weights saliency or mass, or the method nearest",
        "--noise-seed": "the weights mass or the method nearest",
        "--causal": "--attention",
    }
    for option, wrong in reasons.items():
        if wrong:
            raise ValueError(
                f"{option} would have no effect: it needs "
                f"{needs.get(option, 'the weights mass')}"
            )
    # Merge one token, so that wrong values are found now.
    arrays = {"tokens": np.ones((1, 1, 1))}
    if has_attention:
        arrays["attention"] = np.ones((1, 1, 1))
    limited = options.max_error is not None or options.max_distance is not None
    _merge(arrays, options._replace(budget=None if limited else 1), 0)


def _count(file: TokenFile, options: MergeOptions) -> tuple[int | None, int]:
    """Return the largest K, or None if limits decide, and the number of tokens.

    All masks and protected tokens are read and checked.
    """
    method, _, _ = options.resolved("attention" in file.names)
    hints = [name for name in ("mask", "protect") if name in file.names]
    num_tokens = file.tokens.shape[-2]
    max_groups, total = 0, 0
    count = max(1, _HINT_BYTES // num_tokens)
    for start, stop, arrays in file.chunks(count, *hints):
        shape = (stop - start if hints else min(1, file.num_sequences), num_tokens)
        with _naming_sequences(start, stop):
            mask = check_mask(arrays.get("mask"), shape)
            protect = _protected(file, arrays, mask, shape)
            if options.budget is not None:
                groups = num_groups_of(shape, options.budget, protect, method, mask)
                max_groups = max(max_groups, groups.max_groups)
        total += math.prod(shape) if mask is None else int(np.count_nonzero(mask))
        if not hints:
            total = file.num_sequences * num_tokens
    return (None if options.budget is None else max_groups), total


def _protected(
    file: TokenFile,
    arrays: Mapping[str, NDArray[Any]],
    mask: NDArray[np.bool_] | None,
    shape: tuple[int, ...],
) -> Any:
    """Return the protected tokens (b, N) of a chunk as booleans, or None."""
    protect = arrays.get("protect", file.positions)
    is_positions = protect is not None and not (
        isinstance(protect, np.ndarray) and protect.dtype == np.bool_
    )
    # Only the shape of the tokens is needed.
    tokens = np.broadcast_to(np.zeros((), np.float32), (*shape, 1))
    flags, positions = (None, protect) if is_positions else (protect, None)
    return protected_tokens(flags, positions, tokens, mask)


def _naming_sequences(start: int, stop: int) -> Any:
    return naming(f"sequences {start}..{stop - 1}" if start else "")


def merge_parts(
    plan: Plan, seconds: Seconds, progress: Callable[[float], None]
) -> Iterator[Merged[Any]]:
    """Yield the result of each chunk of b sequences; its arrays have the axis b.

    Results are bit for bit those of one call for the whole file. `progress` is called
    with the number of finished tokens, padding included.
    """
    file = plan.file
    arguments = [*file.names]
    num_tokens = file.tokens.shape[-2]
    for start, stop, arrays in file.chunks(plan.chunk_size, *arguments):
        seconds.spend("reading")
        size = stop - start

        def step(fraction: float, start: int = start, size: int = size) -> None:
            progress((start + fraction * size) * num_tokens)

        with listen(step):
            merged = merge_chunk(plan, arrays, start)
        seconds.spend("merging")
        progress(stop * num_tokens)
        del arrays  # before the next chunk is read
        yield merged
        seconds.spend("writing")


def merge_chunk(plan: Plan, arrays: dict[str, NDArray[Any]], start: int) -> Merged[Any]:
    """Merge one chunk whose first sequence has the index `start` in the file.

    Errors name the sequence of the file, not of the chunk.
    """
    if plan.file.positions is not None:
        arrays = {**arrays, "protect": np.array(plan.file.positions)}
    tokens = arrays["tokens"]
    try:
        if not plan.on_gpu:
            return _merge(arrays, plan.options, start)
        # Check here, because the values of GPU arrays are not checked.
        mask = check_mask(arrays.get("mask"), tokens.shape[:-1])
        check_tokens(tokens, mask=mask)
        on_device = {
            name: x if name == "protect" and x.ndim == 1 else to_device(x)
            for name, x in arrays.items()
        }
        merged = _merge(on_device, plan.options, start)
        return Merged(*map(to_host, merged))
    except ValueError as error:
        # For a NaN or Inf, the message of the library has the index in the chunk:
        # replace it by the index in the file. For other errors, add the sequences.
        mask = arrays.get("mask")
        wrong = ~np.isfinite(tokens)
        if mask is not None:
            wrong &= (mask != 0)[..., None]
        if not wrong.any():
            last = start + len(tokens) - 1
            raise ValueError(f"sequences {start}..{last}: {error}") from error
        sequence, token, component = map(int, np.argwhere(wrong)[0])  # in the chunk
        value = tokens[sequence, token, component]
        raise ValueError(
            f"tokens must be finite, got {value} in sequence {start + sequence}, "
            f"token {token}"
        ) from error


def _merge(
    arrays: Mapping[str, Any], options: MergeOptions, sequence_offset: int
) -> Merged[Any]:
    """Call `quickmerge` for the arrays of some sequences."""
    tokens, mask = arrays["tokens"], arrays.get("mask")
    saliency = None
    if options.saliency == "norm":
        saliency = norm_saliency(tokens, mask=mask)
    attention = arrays.get("attention")
    return quickmerge(
        tokens,
        options.budget,
        max_error=options.max_error,
        max_distance=options.max_distance,
        hidden_states=tokens if options.saliency == "entropy" else None,
        attention=attention,
        saliency=saliency,
        causal=options.causal,
        mask=mask,
        protect=arrays.get("protect"),
        method=options.method,
        metric=options.metric,
        step=options.step,
        order=options.order,
        temperature=0.1 if options.temperature is None else options.temperature,
        epsilon=0.01 if options.epsilon is None else options.epsilon,
        weights=options.weights,
        weighted_linkage=options.weighted_linkage,
        noise_seed=options.noise_seed,
        # The Gumbel noise of a sequence depends on its index in the file, and not on
        # its index in the chunk: the size of a chunk does not change results.
        sequence_offset=sequence_offset,
    )


def write_merged(
    plan: Plan, output: Output, parts: Iterator[Merged[Any]]
) -> tuple[int, int]:
    """Write the results of all chunks; return the largest K, and the bytes written.

    A .npy file holds the merged tokens only.
    """
    folder: Path | None = output.folder()
    with output.open() as file, tempfile.TemporaryFile(dir=folder) as spool:
        max_groups = plan.max_groups
        if max_groups is None:
            # The header of the output contains K, so all results are needed first.
            max_groups = _spool(spool, parts)
            parts = _spooled(spool)
        first = next(parts)
        layout = _layout(plan, max_groups, first)
        is_single = len(plan.file.tokens.shape) == 2
        rows = (_fields(x, max_groups, is_single) for x in _chain(first, parts))
        write_arrays(file, output.format, layout, rows, folder)
        num_bytes = file_size(file)
    return max_groups, num_bytes


def _chain(first: Merged[Any], parts: Iterator[Merged[Any]]) -> Iterator[Merged[Any]]:
    yield first
    del first
    yield from parts


def _layout(plan: Plan, max_groups: int, first: Merged[Any]) -> Layout:
    """Return the shapes and dtypes of the result; `first` is the first part of it."""
    *batch, _, dim = plan.shape_with(max_groups)
    num_tokens = plan.file.tokens.shape[-2]
    per_group, per_token = (*batch, max_groups), (*batch, num_tokens)
    shapes = Merged((*per_group, dim), per_token, per_group, per_group, per_token)
    return {
        name: (shape, x.dtype)
        for name, shape, x in zip(Merged._fields, shapes, first, strict=True)
    }


def _fields(
    merged: Merged[Any], max_groups: int, is_single: bool
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a chunk, with its groups padded to the K of the file."""
    missing = max_groups - merged.sizes.shape[-1]
    if missing:
        extra = ((0, 0), (0, missing))  # axes B and K
        merged = merged._replace(
            tokens=np.pad(merged.tokens, (*extra, (0, 0))),
            sizes=np.pad(merged.sizes, extra),
            positions=np.pad(merged.positions, extra, constant_values=-1),
        )
    return {name: x[0] if is_single else x for name, x in merged._asdict().items()}


def _spool(file: Any, parts: Iterator[Merged[Any]]) -> int:
    """Write results to a temporary file, and return the largest K."""
    max_groups = 0
    for part in parts:
        max_groups = max(max_groups, part.sizes.shape[-1])
        np.save(file, np.array([x.dtype.name for x in part]))
        for x in part:
            np.save(file, x, allow_pickle=False)
    return max_groups


def _spooled(file: Any) -> Iterator[Merged[Any]]:
    """Yield the results that `_spool` has written."""
    size = file.tell()
    file.seek(0)
    while file.tell() < size:
        dtypes = np.load(file)
        # NumPy's format has no bfloat16, so the dtype is restored.
        yield Merged(*(np.load(file).view(str(dtype)) for dtype in dtypes))
