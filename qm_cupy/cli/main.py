"""The command line: compress a file of tokens, look at a picture, look at the setup."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..clustering import METHODS, ORDERS
from .compress import compress
from .doctor import doctor


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
    parser.set_defaults(run=compress)


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
    from .demo import run_demo

    run_demo(
        arguments.image,
        arguments.budget,
        arguments.output,
        method=arguments.method,
        seed=arguments.seed,
    )
