"""Options that several commands have."""

import argparse

from ..stages.clustering.cluster_tokens import METHODS
from ..stages.clustering.metrics import METRICS


def add_budget(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Add `--budget`; it is required if it has no default."""
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="K",
        required=default is None,
        default=default,
        help="how many tokens to keep: an integer is their number (20), a decimal is "
        "their fraction (0.2); 1.0 keeps all tokens, 1 keeps one token",
    )


def _budget(text: str) -> int | float:
    """Return K for an integer such as "1", and a ratio for a decimal such as "1.0"."""
    for number in (int, float):  # `int` first, so that "1" becomes an integer
        try:
            return number(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a number of tokens, such as 20, nor a ratio, such as 0.2"
    )


def add_method(
    parser: argparse.ArgumentParser, default: str, metric: str = "cosine"
) -> None:
    """Add `--method`, `--metric` and `--step`; `default` and `metric` are defaults."""
    text = f"how tokens are grouped (default: {default})"
    parser.add_argument("--method", choices=METHODS, default=default, help=text)
    text = "compare tokens by direction (cosine), or by distance, which depends on "
    text += f"their lengths too (euclidean) (default: {metric})"
    parser.add_argument("--metric", choices=METRICS, default=metric, help=text)
    text = "largest number of groups that the method bipartite merges at a time "
    text += "(default: half of the groups)"
    parser.add_argument("--step", type=int, metavar="R", help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add `--weights`, without "attention": the command has only tokens."""
    parser.add_argument(
        "--weights",
        choices=("uniform", "saliency", "mass"),
        default="uniform",
        help="weights of the tokens in the mean of their group (default: uniform)",
    )


def add_noise_seed(parser: argparse.ArgumentParser) -> None:
    """Add `--noise-seed`."""
    parser.add_argument(
        "--noise-seed",
        type=int,
        metavar="S",
        help="seed of the Gumbel noise, which changes the weights mass and the anchors "
        "of the method nearest (default: no noise)",
    )
