"""The command `compress`: merge a file of tokens, a few sequences at a time.

A file of several sequences may be larger than memory: only one chunk of its tokens, the
mask, and the small arrays of the results are in memory. A file of one sequence is one
chunk.
"""

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
from .options import add_budget, add_method, add_noise_seed, add_weights
from .progress import Step, progress

CHUNK_BYTES = 64 * 2**20  # bytes of the tokens that are merged at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compress`: files, device, some options of `quickmerge`."""
    parser.description = (
        "Merge the tokens (N, D) or (B, N, D) of a file: B sequences of N tokens of "
        "width D. The result is written to OUT.npz, with the arrays tokens, labels, "
        "sizes, positions and mass (the weights)."
    )
    add = parser.add_argument
    add(
        "input",
        type=Path,
        metavar="INPUT",
        help="file that contains the tokens: .npy, .npz or .safetensors",
    )
    add_budget(parser)
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT.npz",
        help="file to write the result to; an existing file is replaced",
    )
    add(
        "--key",
        metavar="NAME",
        help='name of the token array in INPUT (default: "tokens", or the only array)',
    )
    add(
        "--mask",
        metavar="NAME",
        help="name of an array (B, N) or (N) in INPUT; True or 1 = token",
    )
    add_method(parser, default="average")
    add(
        "--order",
        choices=ORDERS,
        default="last",
        help="order in which groups are numbered: by the position of their last or of "
        "their first token (default: last)",
    )
    add_weights(parser)
    add_noise_seed(parser)
    add(
        "--temperature",
        type=float,
        default=0.1,
        metavar="T",
        help="temperature of the Gumbel-softmax, for the weights mass (default: 0.1)",
    )
    add(
        "--epsilon",
        type=float,
        default=0.01,
        metavar="E",
        help="mass of tokens that are not selected, for the weights mass "
        "(default: 0.01)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute: on the CPU or on a GPU; auto uses a GPU if CuPy finds "
        "one (default: auto)",
    )
    parser.set_defaults(run=_compress)


def _compress(arguments: argparse.Namespace) -> None:
    """Merge the file that the arguments name, and print sizes and time."""
    start_time = time.perf_counter()
    on_gpu = _on_gpu(arguments.device)
    names = (
        "method", "metric", "step", "order", "temperature", "epsilon", "weights",
        "noise_seed",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    # Merge one token now, so that a wrong value of these options fails before the file
    # is opened. The budget is checked later, because it depends on the tokens.
    quickmerge(np.ones((1, 1)), 1, **options)
    source, output = arguments.input, arguments.output
    with open_tokens(source, arguments.key, arguments.mask) as (tokens, mask):
        check_output(output, source)
        # The header of the output contains the shape, so K is needed before the merge.
        shape, max_groups = _result_shape(tokens, mask, arguments.budget)
        dtype = tokens.dtype.newbyteorder("=")  # results are in native byte order
        num_sequences = math.prod(tokens.shape[:-2])  # 1 for tokens (N, D)
        with atomic_write(output) as file, progress(num_sequences, sys.stderr) as step:
            merge = functools.partial(merge_chunk, on_gpu, arguments.budget, options)
            # A generator: each part is written before the next one is computed.
            parts = _merge_parts(tokens, mask, merge, max_groups, step)
            write_merged(file, shape, dtype, parts)
    seconds = time.perf_counter() - start_time
    sizes = [f"{path.stat().st_size:,} bytes" for path in (source, output)]
    axes = " x ".join(map(str, tokens.shape))
    where = "a GPU" if on_gpu else "the CPU"
    print(f"{source} -> {output}")
    print(
        f"{axes} {dtype} -> {' x '.join(map(str, shape))} in {seconds:.2f} s on {where}"
    )
    print(f"{sizes[0]} -> {sizes[1]}")


def _on_gpu(device: str) -> bool:
    """Return whether to compute on a GPU; for "auto", whether there is one."""
    if device == "cpu":
        return False
    try:
        import cupy

        available, reason = bool(cupy.is_available()), "CuPy finds no CUDA device"
    except ImportError:
        available, reason = False, "CuPy is not installed"
    if device == "cuda" and not available:  # "auto" falls back to the CPU instead
        raise ValueError(
            f"--device cuda: {reason}; run `qm-cupy doctor` for details, or use "
            "--device cpu"
        )
    return available


def _result_shape(
    tokens: Stored, mask: Mask, budget: int | float
) -> tuple[tuple[int, ...], int]:
    """Return the shape of the merged tokens, and the largest K of all sequences."""
    *batch, num_tokens, dim = tokens.shape
    # With a mask, a ratio can give a different K for each sequence.
    counts = token_budget(budget, num_tokens if mask is None else mask.sum(axis=-1))
    max_groups = int(np.max(counts, initial=0))
    return (*batch, max_groups, dim), max_groups


def _merge_parts(
    tokens: Stored,
    mask: Mask,
    merge: Callable[..., Merged[Any]],
    max_groups: int,
    step: Step,
) -> Iterator[Merged[Any]]:
    """Yield the result of each chunk of b sequences; its arrays have the axis b.

    Results are bit for bit those of one call for the whole file.
    """
    single = len(tokens.shape) == 2  # tokens (N, D) are one chunk
    bytes_per_sequence = math.prod(tokens.shape[-2:]) * tokens.dtype.itemsize
    count = tokens.shape[0] if single else max(1, CHUNK_BYTES // bytes_per_sequence)
    start = 0  # index of the chunk's first sequence in the file
    for part in tokens.chunks(count):  # (b, N, D), or (N, D) for one sequence
        chunk = part[None] if single else part  # (b, N, D)
        stop = start + len(chunk)
        valid = None if mask is None else np.atleast_2d(mask)[start:stop]  # (b, N)
        yield _pad(merge(chunk, valid, start), max_groups)
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
    """Merge one chunk whose first sequence has the index `start` in the file.

    Errors name the sequence of the file, not of the chunk.
    """
    # The Gumbel noise of a sequence depends on its index in the file, and not on its
    # index in the chunk, so that the size of a chunk does not change results.
    options = {**options, "mask": mask, "sequence_offset": start}
    try:
        if not on_gpu:
            return quickmerge(chunk, budget, **options)
        check_tokens(chunk)  # here, because the values of GPU arrays are not checked
        if mask is not None:
            options["mask"] = to_device(mask)
        merged = quickmerge(to_device(chunk), budget, **options)
        return Merged(*map(to_host, merged))
    except ValueError as error:
        # For a NaN or Inf, the message of the library has the index in the chunk:
        # replace it by the index in the file. For other errors, add the sequences.
        wrong = np.argwhere(~np.isfinite(chunk))
        if not len(wrong):
            last = start + len(chunk) - 1
            raise ValueError(f"sequences {start}..{last}: {error}") from error
        sequence, token, component = map(int, wrong[0])  # in the chunk (b, N, D)
        value = chunk[sequence, token, component]
        raise ValueError(
            f"tokens must be finite, got {value} in sequence {start + sequence}, "
            f"token {token}"
        ) from error


def _pad(merged: Merged[Any], max_groups: int) -> Merged[Any]:
    """Pad the groups of a chunk to the largest K of the whole file."""
    extra = ((0, 0), (0, max_groups - merged.sizes.shape[-1]))  # axes B and K
    return merged._replace(
        tokens=np.pad(merged.tokens, (*extra, (0, 0))),
        sizes=np.pad(merged.sizes, extra),
        positions=np.pad(merged.positions, extra, constant_values=-1),
    )
