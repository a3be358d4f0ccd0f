"""The command `compress`: merge a file of tokens, a few sequences at a time."""

import argparse
import json
import sys
from typing import Any

from ..corpus.merge_file import Seconds, merge_parts
from ..corpus.merge_options import check_options
from ..corpus.plan import Plan, plan
from ..corpus.token_file import naming, open_tokens
from ..corpus.write_merged import Written, write_merged
from ..files.outputs import check_output
from ..files.stored import axes
from .options import (
    add_merge_options,
    add_selection,
    merge_options,
    on_gpu,
    selection,
)
from .output import device_text, method_text, print_summary, visible, waiting_for
from .progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compress`: files, arrays, and those of `quickmerge`."""
    parser.description = (
        "Merge the tokens (N, D) or (B, N, D) of a file: B sequences of N tokens of "
        "width D. The result has the arrays tokens, labels, sizes, positions and mass "
        "(the weights); a .npy file has the tokens only."
    )
    add_selection(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUTPUT",
        help="file to write the result to: .npz, .safetensors or .npy; an existing "
        "file is replaced; - is the standard output",
    )
    parser.add_argument(
        "--format",
        choices=("npz", "safetensors", "npy"),
        help="format of the result (default: by the ending of OUTPUT, else npz)",
    )
    add_merge_options(parser, required=True)
    parser.add_argument(
        "--json", action="store_true", help="print the summary as one JSON object"
    )
    parser.set_defaults(run=_compress)


def _compress(arguments: argparse.Namespace) -> None:
    """Merge the file that the arguments name, and print sizes and time."""
    seconds = Seconds()
    gpu, options = on_gpu(arguments.device), merge_options(arguments)
    # Everything that can be wrong is checked before a pipe is read.
    check_options(options, arguments.attention is not None)
    # Whether the output is the input is checked later.
    folder = check_output(arguments.output, arguments.format, None).folder()
    with (
        waiting_for(arguments.input) as arrived,
        open_tokens(arguments.input, selection(arguments), folder) as file,
    ):
        arrived()
        status = file.source.status
        output = check_output(arguments.output, arguments.format, status)
        work = plan(file, options, gpu)
        seconds.spend("starting")
        with naming(file.source.name), progress(file.padded_tokens) as step:
            parts = merge_parts(work, seconds, step)
            written = write_merged(work, output, parts)
        seconds.spend("writing")
        summary = _summary(work, output.name, written, seconds)
    text = json.dumps(summary) if arguments.json else "\n".join(_lines(summary))
    print_summary(text, sys.stderr if output.is_stdout else sys.stdout)


def _summary(
    work: Plan, output: str, written: Written, seconds: Seconds
) -> dict[str, Any]:
    """Return what was done, for `--json`."""
    file = work.file
    return {
        **work.describe(),
        "input": file.source.name,
        "output": output,
        "arrays": dict(file.names),
        "mask_by_default": file.mask_by_default,
        "merged_shape": work.shape_with(written.max_groups),
        "dtype": str(file.tokens.dtype.newbyteorder("=")),
        "merged_tokens": written.num_groups,
        "input_bytes": file.source.num_bytes,
        "output_bytes": written.num_bytes,
        "seconds": {name: round(x, 3) for name, x in seconds.spent.items()},
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary as a few lines, without control characters."""
    seconds = sum(summary["seconds"].values())
    merging = summary["seconds"]["merging"] / max(seconds, 1e-9)
    before, after = (axes(summary[name]) for name in ("shape", "merged_shape"))
    lines = [
        f"{summary['input']} -> {summary['output']}",
        f"{before} {summary['dtype']} -> {after} in {seconds:.2f} s on "
        f"{device_text(summary)} ({merging:.0%} of it merging)",
    ]
    if mask := summary["arrays"].get("mask"):
        note = " (--mask none merges padding too)" if summary["mask_by_default"] else ""
        lines.append(
            f"mask {mask}: {summary['tokens']:,} tokens, {summary['padding']:,} "
            f"padding{note}"
        )
    lines.append(f"{summary['tokens']:,} tokens -> {summary['merged_tokens']:,}")
    lines.append(method_text(summary))
    sizes = [summary["input_bytes"], summary["output_bytes"]]
    lines.append(" -> ".join(f"{x:,} bytes" for x in sizes))
    return [visible(line) for line in lines]
