"""The command `info`: what is in a file, and what `compress` would do with it."""

import argparse
import json
from typing import Any

from ..corpus.merge_options import check_options
from ..corpus.plan import Plan, plan
from ..corpus.token_file import naming, select
from ..files.inputs import Input, open_arrays
from ..files.stored import axes
from .options import (
    add_merge_options,
    add_selection,
    merge_options,
    on_gpu,
    selection,
)
from .output import device_text, method_text, visible, waiting_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `info`: those of `compress` that concern the input."""
    parser.description = (
        "Show the arrays of a file, which of them `compress` would use with the same "
        "options, and what it would do. Only headers, masks and protected tokens are "
        "read."
    )
    add_selection(parser)
    add_merge_options(parser, required=False)
    parser.add_argument(
        "--json", action="store_true", help="print everything as one JSON object"
    )
    # So that the arguments of `compress` can be used unchanged.
    for name in ("-o", "--output", "--format"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> None:
    """Print what is in the file that the arguments name."""
    gpu, options = on_gpu(arguments.device), merge_options(arguments)
    check_options(options, arguments.attention is not None)
    with (
        waiting_for(arguments.input) as arrived,
        open_arrays(arguments.input) as source,
    ):
        arrived()
        used: dict[str, str] = {}
        try:
            with naming(source.name):
                file = select(source, selection(arguments))
            used = {name: argument for argument, name in file.names.items()}
            merge = _merge(plan(file, options, gpu))
        except (ImportError, MemoryError, TypeError, ValueError) as error:
            merge = {"error": str(error).removeprefix(f"{source.name}: ")}
        contents = _contents(source, used) | {"merge": merge}
    lines = [json.dumps(contents)] if arguments.json else _lines(contents)
    # The names of arrays may contain control characters.
    print("\n".join(map(visible, lines)))


def _contents(source: Input, used: dict[str, str]) -> dict[str, Any]:
    """Return what is in a file; `used` says as what each array is used."""
    arrays = {
        name: {
            "dtype": None if x.fault else str(x.dtype),
            "shape": x.shape,
            "used_as": used.get(name),
            "fault": x.fault or None,
        }
        for name, x in source.arrays.items()
    }
    return {
        "file": source.name,
        "format": source.format.removeprefix("."),
        "bytes": source.num_bytes,
        "arrays": arrays,
    }


def _merge(work: Plan) -> dict[str, Any]:
    """Return what `compress` would do."""
    options = work.options
    # Without a budget and without a limit, nothing says how many groups there are.
    limited = options.max_error is not None or options.max_distance is not None
    return {
        **work.describe(),
        "merged_shape": work.shape,
        "groups": "limited" if limited else "by budget" if work.shape else None,
        "sequences_at_a_time": min(work.chunk_size, work.file.num_sequences),
        "memory_bytes": work.needed_bytes,
    }


def _lines(contents: dict[str, Any]) -> list[str]:
    """Return the contents as lines: the file, its arrays, the merge."""
    lines = [
        f"{contents['file']}: {contents['format']} file, {contents['bytes']:,} bytes"
    ]
    width = max((len(name) for name in contents["arrays"]), default=0)
    for name, x in contents["arrays"].items():
        text = x["fault"] or f"{x['dtype']:<8} {axes(x['shape']) or 'one number'}"
        note = f"  (used as {x['used_as']})" if x["used_as"] else ""
        lines.append(f"  {name:<{min(width, 30)}}  {text}{note}")
    merge = contents["merge"]
    if "error" in merge:
        return [*lines, f"compress cannot merge it: {merge['error']}"]
    result = "? (give --budget, --max-error or --max-distance)"
    if merge["merged_shape"]:
        result = axes(merge["merged_shape"])
    elif merge["groups"]:
        result = "as many groups as the limit allows"
    return [
        *lines,
        f"compress would merge {axes(merge['shape'])} -> {result}",
        f"  {merge['tokens']:,} tokens, {merge['padding']:,} padding",
        f"  {method_text(merge)}",
        f"  sequences at a time: {merge['sequences_at_a_time']:,}, on "
        f"{device_text(merge)}, with up to {_size(merge['memory_bytes'])} of memory",
    ]


def _size(num_bytes: int) -> str:
    if num_bytes < 1e9:
        return f"{max(1, round(num_bytes / 1e6))} MB"
    return f"{num_bytes / 1e9:.1f} GB"
