"""The command line: compress a file of tokens, look at a picture, look at the setup."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__

_COMMANDS = {  # each a module of its name, which has `add_arguments`
    "compress": "merge the tokens of a file",
    "demo": "merge the patches of a picture",
    "doctor": "say what is installed and missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 after an error in one line, 130 if interrupted."""
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(words).parse_args(words)
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


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of these words; only the command among them is imported."""
    parser = _Parser(prog="qm-cupy", description="Token sequences made shorter.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in words:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
    return parser
