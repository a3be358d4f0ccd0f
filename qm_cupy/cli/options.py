"""Options that several commands take."""

import argparse

from ..stages.clustering.cluster_tokens import METHODS


def add_budget(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Add `--budget`, which must be there if it has no default."""
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="K",
        required=default is None,
        default=default,
        help="tokens to keep (20) or their share (0.2; 1.0 is all)",
    )


def _budget(text: str) -> int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number K nor a share")


def add_method(parser: argparse.ArgumentParser, default: str) -> None:
    text = f"default: {default}"
    parser.add_argument("--method", choices=METHODS, default=default, help=text)


def add_seed(parser: argparse.ArgumentParser) -> None:
    text = "of the Gumbel noise (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)
