"""The command line: compress a file of tokens, look at a picture, look at the setup."""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import __version__, _cuda
from ._checks import check_tokens
from ._doctor import doctor
from ._files import Mask, Stored, check_output, open_tokens, write_merged
from ._progress import Step, progress
from ._replacing import replacing
from .budget import token_budget
from .clustering import METHODS, ORDERS
from .pipeline import quickmerge
from .results import Merged

_CHUNK = 64 * 2**20  # bytes of tokens worked on at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 after an error in one line, 130 if interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("qm-cupy: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"qm-cupy: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or "not enough memory"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # one line, as every other error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qm-cupy", description="Token sequences made shorter.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_compress(commands.add_parser("compress", help="merge the tokens of a file"))
    _add_demo(commands.add_parser("demo", help="merge the patches of a picture"))
    check = commands.add_parser("doctor", help="say what is installed and missing")
    check.set_defaults(run=lambda arguments: doctor())
    return parser


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.description = "Merge the tokens (N, D) or (B, N, D) of a file into an .npz."
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help=".npy, .npz or .safetensors")
    _add_budget(parser, required=True)
    add("-o", "--output", type=Path, required=True, metavar="OUT.npz")
    add("--key", metavar="NAME", help='the tokens in INPUT (default: "tokens")')
    add("--mask", metavar="NAME", help="a boolean (B, N) in INPUT, True = token")
    add("--method", choices=METHODS, default="average", help="default: average")
    add("--order", choices=ORDERS, default="last", help="default: last")
    add("--seed", type=int, default=0, help="of the Gumbel noise (default: 0)")
    add("--temperature", type=float, default=0.1, metavar="T", help="default: 0.1")
    add("--epsilon", type=float, default=0.01, metavar="E", help="default: 0.01")
    add("--weights", choices=("mass", "saliency", "uniform"), default="mass")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=_compress)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Merge the patches of a picture and draw what became of it."
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="default: a portrait photograph")
    _add_budget(parser, default=0.2)
    add("--output", type=Path, default=Path("qm-cupy-demo"), metavar="FOLDER")
    add("--method", choices=METHODS, default="ward", help="default: ward")
    add("--seed", type=int, default=0, help="of the Gumbel noise (default: 0)")
    parser.set_defaults(run=_demo)


def _add_budget(parser: argparse.ArgumentParser, **kind: Any) -> None:
    text = "tokens to keep (20) or their share (0.2; 1.0 is all)"
    parser.add_argument("--budget", type=_budget, metavar="K", help=text, **kind)


def _budget(text: str) -> int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number K nor a share")


def _demo(arguments: argparse.Namespace) -> None:
    from ._demo import run_demo

    run_demo(
        arguments.image,
        arguments.budget,
        arguments.output,
        method=arguments.method,
        seed=arguments.seed,
    )


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
        with replacing(output) as file, progress(num_sequences, sys.stderr) as step:
            merge = functools.partial(_merge_chunk, on_gpu, arguments.budget, options)
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
    count = tokens.shape[0] if single else max(1, _CHUNK // num_bytes)
    start = 0
    for block in tokens.blocks(count):
        chunk = block[None] if single else block  # (b, N, D)
        stop = start + len(chunk)
        valid = None if mask is None else np.atleast_2d(mask)[start:stop]
        yield _pad(merge(chunk, valid, start), most)
        step(stop)
        start = stop


def _merge_chunk(
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
            options["mask"] = _cuda.to_device(mask)
        merged = quickmerge(_cuda.to_device(chunk), budget, **options)
        return Merged(*map(_cuda.to_host, merged))
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
