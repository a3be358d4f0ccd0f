"""Options that several commands have."""

import argparse

from ..corpus.merge_options import MergeOptions
from ..corpus.token_file import Selection
from ..stages.clustering.cluster_tokens import METHODS
from ..stages.clustering.labels import ORDERS
from ..stages.clustering.metrics import METRICS


def integer(text: str) -> int:
    """Return an integer of at most 64 bits."""
    if not _is_integer(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    # 20 digits are enough, and Python refuses to convert some thousand digits.
    number = int(text) if len(text) < 30 else 2**64
    if not -(2**63) <= number < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} has more than 64 bits")
    return number


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").removeprefix("+").isdecimal()


def budget(text: str) -> int | float:
    """Return K for an integer such as "1", and a ratio for a decimal such as "1.0"."""
    if _is_integer(text):
        return integer(text)
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of tokens, such as 20, nor a ratio, such as "
            "0.2"
        ) from None


def add_budget(
    parser: argparse._ActionsContainer, default: float | None = None
) -> None:
    """Add `--budget`."""
    parser.add_argument(
        "--budget",
        type=budget,
        metavar="K",
        default=default,
        help="how many tokens to keep: an integer is their number (20), a decimal is "
        "their fraction (0.2); 1.0 keeps all tokens, 1 keeps one token",
    )


def add_method(
    parser: argparse._ActionsContainer, default: str | None, metric: str = "cosine"
) -> None:
    """Add `--method`, `--metric` and `--step`; `default` and `metric` are defaults."""
    shown = default or "ward with the weights attention or --max-error, else average"
    text = f"how tokens are grouped (default: {shown})"
    parser.add_argument("--method", choices=METHODS, default=default, help=text)
    text = "compare tokens by direction (cosine), or by distance, which depends on "
    text += f"their lengths too (euclidean) (default: {metric})"
    parser.add_argument("--metric", choices=METRICS, default=metric, help=text)
    text = "largest number of groups that the method bipartite merges at a time "
    text += "(default: half of the groups)"
    parser.add_argument("--step", type=integer, metavar="R", help=text)


def add_weights(
    parser: argparse._ActionsContainer, default: str | None = "uniform"
) -> None:
    """Add `--weights`, with "attention" unless the command has a default."""
    words = ["uniform", "saliency", "mass"] + ([] if default else ["attention"])
    shown = default or "attention with --attention, saliency with --saliency, else "
    shown += "" if default else "uniform"
    parser.add_argument(
        "--weights",
        choices=words,
        default=default,
        help="weights of the tokens in the mean of their group: all 1 (uniform), the "
        "saliency, the saliency mass of the paper"
        + ("" if default else ", or the attention that tokens give and receive")
        + f" (default: {shown})",
    )


def add_noise_seed(parser: argparse._ActionsContainer) -> None:
    """Add `--noise-seed`."""
    parser.add_argument(
        "--noise-seed",
        type=integer,
        metavar="N",
        help="seed of the Gumbel noise, which changes the weights mass and the anchors "
        "of the method nearest (default: no noise)",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the input file, and the options that name arrays of it."""
    add = parser.add_argument
    add(
        "input",
        metavar="INPUT",
        help="file of tokens: .npy, .npz or .safetensors; - is the standard input",
    )
    add(
        "--key",
        metavar="NAME",
        help="name of the token array in INPUT (default: tokens, or the only array of "
        "floats with two or three axes)",
    )
    add(
        "--mask",
        metavar="NAME",
        help="name of an array (B, N) or (N) in INPUT, True or 1 = token (default: "
        "mask or attention_mask, if INPUT has one of them); none merges padding too",
    )
    add(
        "--attention",
        metavar="NAME",
        help="name of an array (B, H, N, N) or (B, N, N) in INPUT: the attention of "
        "the layer before the merge",
    )
    add(
        "--causal",
        action="store_true",
        help="the attention is causal, as in language models",
    )
    add(
        "--protect",
        metavar="LIST",
        help="tokens that stay groups of their own: positions, such as 0,3 "
        "(--protect=-1,0 if the first one is negative; -1 is the last token), or the "
        "name of an array (N) or (B, N) of booleans in INPUT",
    )


def selection(arguments: argparse.Namespace) -> Selection:
    """Return the options of `add_selection`."""
    names = (arguments.key, arguments.mask, arguments.protect, arguments.attention)
    return Selection(*names)


def add_merge_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of `quickmerge`; one of the budgets may be required."""
    group = parser.add_mutually_exclusive_group(required=required)
    add_budget(group)
    parser.add_argument(
        "--clip",
        action="store_true",
        help="let short sequences keep all of their tokens, and protected tokens and "
        "one more at least, where the budget would be an error",
    )
    group.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="instead of a budget, by ward linkage: as few groups as possible whose "
        "squared error per unit token is at most E",
    )
    group.add_argument(
        "--max-distance",
        type=float,
        metavar="D",
        help="instead of a budget: merge groups whose distance is at most D",
    )
    add_method(parser, default=None)
    add = parser.add_argument
    add(
        "--order",
        choices=ORDERS,
        default="last",
        help="order in which groups are numbered: by the position of their last or of "
        "their first token (default: last)",
    )
    add_weights(parser, default=None)
    add(
        "--saliency",
        choices=("norm", "entropy"),
        help="what makes a token salient: its norm, or the entropy of its similarity "
        "to the other tokens (default: the attention if there is one, else entropy)",
    )
    add(
        "--weighted-linkage",
        action=argparse.BooleanOptionalAction,
        help="whether tokens count by their weights in the linkage (average, ward) too "
        "(default: only with the weights attention)",
    )
    add_noise_seed(parser)
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="temperature of the Gumbel-softmax, for the weights mass (default: 0.1)",
    )
    add(
        "--epsilon",
        type=float,
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


def merge_options(arguments: argparse.Namespace) -> MergeOptions:
    """Return the options of `add_merge_options` and `--causal`."""
    return MergeOptions(*(getattr(arguments, name) for name in MergeOptions._fields))


def on_gpu(device: str) -> bool:
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
