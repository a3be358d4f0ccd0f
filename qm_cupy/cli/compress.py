"""The command `compress`: a file of tokens, worked on a few sequences at a time."""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_tokens
from ..atomic_write import atomic_write
from ..corpus.readers import Mask, Stored, open_tokens
from ..corpus.writers import check_output, write_merged
from ..cuda.device import to_device, to_host
from ..pipeline import quickmerge
from ..results import Merged
from ..stages.budget import token_budget
from ..stages.clustering.labels import ORDERS
from .options import add_budget, add_method, add_seed
from .progress import Step, progress

CHUNK_BYTES = 64 * 2**20  # of tokens worked on at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Merge the tokens (N, D) or (B, N, D) of a file into an .npz."
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help=".npy, .npz or .safetensors")
    add_budget(parser)
    add("-o", "--output", type=Path, required=True, metavar="OUT.npz")
    add("--key", metavar="NAME", help='the tokens in INPUT (default: "tokens")')
    add("--mask", metavar="NAME", help="a boolean (B, N) in INPUT, True = token")
    add_method(parser, default="average")
    add("--order", choices=ORDERS, default="last", help="default: last")
    add_seed(parser)
    add("--temperature", type=float, default=0.1, metavar="T", help="default: 0.1")
    add("--epsilon", type=float, default=0.01, metavar="E", help="default: 0.01")
    add("--weights", choices=("mass", "saliency", "uniform"), default="mass")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=_compress)


def _compress(arguments: argparse.Namespace) -> None:
    begun = time.perf_counter()
    on_gpu = _on_gpu(arguments.device)
    names = ("method", "order", "temperature", "epsilon", "weights", "seed")
    options = {name: getattr(arguments, name) for name in names}
    quickmerge(np.ones((1, 1)), 1, **options)  # a wrong option fails here, not later
    source, output = arguments.input, arguments.output
    with open_tokens(source, arguments.key, arguments.mask) as (tokens, mask):
        check_output(output, source)
        shape, most = _result_shape(tokens, mask, arguments.budget)
        dtype = tokens.dtype.newbyteorder("=")
        num_sequences = math.prod(tokens.shape[:-2])
        with atomic_write(output) as file, progress(num_sequences, sys.stderr) as step:
            merge = functools.partial(merge_chunk, on_gpu, arguments.budget, options)
            parts = _merge_parts(tokens, mask, merge, most, step)
            write_merged(file, shape, dtype, parts)
    seconds = time.perf_counter() - begun
    sizes = [f"{path.stat().st_size:,} bytes" for path in (source, output)]
    axes = " x ".join(map(str, tokens.shape))
    where = "a GPU" if on_gpu else "the CPU"
    print(f"{source} -> {output}")
    print(
        f"{axes} {dtype} -> {' x '.join(map(str, shape))} in {seconds:.2f} s on {where}"
    )
    print(f"{sizes[0]} -> {sizes[1]}")


def _on_gpu(device: str) -> bool:
    """Whether to compute on a GPU: where there is one, or as asked."""
    if device == "cpu":
        return False
    try:
        import cupy

        found, missing = bool(cupy.is_available()), "CuPy finds no CUDA device"
    except ImportError:
        found, missing = False, "CuPy is not installed"
    if device == "cuda" and not found:
        raise ValueError(f"--device cuda: {missing}; `qm-cupy doctor` says more")
    return found


def _result_shape(
    tokens: Stored, mask: Mask, budget: int | float
) -> tuple[tuple[int, ...], int]:
    """Return the shape of the merged tokens, and K: the largest, under a mask."""
    *batch, num_tokens, dim = tokens.shape
    counts = token_budget(budget, num_tokens if mask is None else mask.sum(axis=-1))
    most = int(np.max(counts, initial=0))
    return (*batch, most, dim), most


def _merge_parts(
    tokens: Stored, mask: Mask, merge: Callable[..., Merged[Any]], most: int, step: Step
) -> Iterator[Merged[Any]]:
    """Merge a chunk at a time, to the bit as if it were the whole; with batch axis."""
    single = len(tokens.shape) == 2
    num_bytes = math.prod(tokens.shape[-2:]) * tokens.dtype.itemsize  # of a sequence
    count = tokens.shape[0] if single else max(1, CHUNK_BYTES // num_bytes)
    start = 0
    for block in tokens.blocks(count):
        chunk = block[None] if single else block  # (b, N, D)
        stop = start + len(chunk)
        valid = None if mask is None else np.atleast_2d(mask)[start:stop]
        yield _pad(merge(chunk, valid, start), most)
        step(stop)
        start = stop


def merge_chunk(
    on_gpu: bool,
    budget: int | float,
    options: dict[str, Any],
    chunk: NDArray[Any],
    mask: Mask,
    start: int,
) -> Merged[Any]:
    options = {**options, "mask": mask, "sequence_offset": start}
    try:
        if not on_gpu:
            return quickmerge(chunk, budget, **options)
        check_tokens(chunk)  # here, where values can be looked at
        if mask is not None:
            options["mask"] = to_device(mask)
        merged = quickmerge(to_device(chunk), budget, **options)
        return Merged(*map(to_host, merged))
    except ValueError as error:
        wrong = np.argwhere(~np.isfinite(chunk))
        if not len(wrong):
            last = start + len(chunk) - 1
            raise ValueError(f"sequences {start}..{last}: {error}") from error
        sequence, token, axis = map(int, wrong[0])
        value = chunk[sequence, token, axis]
        raise ValueError(
            f"tokens must be finite, got {value} in sequence {start + sequence}, "
            f"token {token}"
        ) from error


def _pad(merged: Merged[Any], most: int) -> Merged[Any]:
    """Pad the groups of a chunk to the largest K of the whole file."""
    extra = ((0, 0), (0, most - merged.sizes.shape[-1]))
    return merged._replace(
        tokens=np.pad(merged.tokens, (*extra, (0, 0))),
        sizes=np.pad(merged.sizes, extra),
        positions=np.pad(merged.positions, extra, constant_values=-1),
    )
